"""Charts, sheets and heatmaps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset
import inference
import train
from dataset import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Sheets


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=60), st.integers(40, 300))
def test_text_fits(text, width):
    font = dataset.load_font(13)
    assert font.getlength(dataset.fit_text(text, font, width)) <= width
    lines = dataset.wrap_text(text, font, width, 99)
    assert all(font.getlength(line) <= width for line in lines)
    few = dataset.wrap_text(text, font, width, 2)
    assert few == lines if len(lines) <= 2 else len(few) == 2 and few[0] == lines[0] and few[1].endswith("...")
    if not any(font.getlength(word) > width for word in text.split()):
        assert " ".join(lines).split() == text.split()


def test_a_sheet_has_room_for_every_line():
    cells = [(Image.new("RGB", size, "red"), [("name", "black")] * lines) for size, lines in (
        ((10, 10), 1), ((500, 20), 9), ((20, 500), 0), ((1, 1), 2))]
    sheet = dataset.draw_sheet(cells, "title", columns=2, width=100)
    pixels = np.asarray(sheet)
    assert sheet.width == 2 * 114 + 14 and (pixels[-8:] == 255).all()  # nothing reaches the lower edge
    red = (pixels == (255, 0, 0)).all(axis=2)
    assert red.sum() == 100 * 100 + 100 * 4 + 4 * 100 + 100 * 100  # each whole, as large as it can be
    assert dataset.draw_sheet([], "nothing").size[1] > 20


def test_a_label_sheet_shows_a_bad_image_too(demo, tmp_path):
    table = dataset.read_labels(demo)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    table.paths[0] = tmp_path / "bad.jpg"
    assert dataset.label_sheet(table, count=80).width == dataset.label_sheet(table.subset([1] * 6)).width


def test_mistakes_are_shown_most_confident_first(make_data, monkeypatch):
    table = dataset.read_labels(make_data("a.jpg 1 0\nb.jpg 0 NA\nc.jpg 1 1\n"))
    sheets = []
    monkeypatch.setattr(dataset, "draw_sheet", lambda cells, title: sheets.append((cells, title)))
    inference.mistakes_sheet(table, np.array([[0.4, 0.1], [0.95, 0.9], [0.9, 0.02]]), [0.5, 0.5])
    (cells, title), = sheets
    assert title == "3 of 3 images have a mistake; the most confident ones first"
    assert [[text for text, _ in lines] for _, lines in cells] == [
        ["c.jpg", "- missed: Attr2 0.02", "true: Attr1, Attr2", "said: Attr1"],
        ["b.jpg", "+ false alarm: Attr1 0.95", "true: none", "said: Attr1, Attr2", "NA: Attr2"],
        ["a.jpg", "- missed: Attr1 0.40", "true: Attr1", "said: none"],
    ]
    inference.mistakes_sheet(table, table.targets, [0.5, 0.5])
    assert sheets[1] == ([], "0 of 3 images have a mistake")


def test_names_are_distinct():
    paths = ["x/a.jpg", "y/a.jpg", "z/y/a.jpg", "y/b.jpg", "a.jpg"]
    names = dataset.distinct_names(paths)
    assert names == ["a.jpg", "y_a.jpg", "y_a_2.jpg", "b.jpg", "_a.jpg"] and len(set(names)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Heatmaps


def classifier_of(backbone, head="linear", size=64):
    torch.manual_seed(0)
    network = inference.build_model(backbone, head, 3).eval()
    return inference.Classifier(network, backbone, head, inference.HEADS[head], ["a", "b", "c"], {}, [0.0] * 3, size)


@pytest.mark.parametrize("backbone", inference.BACKBONES)
def test_every_backbone_has_heatmaps(backbone, demo):
    image = next((demo / "images").iterdir())
    maps = inference.heatmaps(classifier_of(backbone, "mlp"), image, [2, 0])
    assert maps.shape == (2, 64, 64) and maps.dtype == np.float32 and np.isfinite(maps).all()
    assert maps.min() >= 0 and set(maps.max(axis=(1, 2)).tolist()) <= {0.0, 1.0}
    assert inference.heatmaps(classifier_of(backbone), image, []).shape == (0, 64, 64)


def test_the_heatmap_of_a_linear_head_is_the_class_activation_map(demo):
    """CAM (Zhou et al. 2016): the last feature maps, weighted by the row of the head."""
    classifier, image = classifier_of("resnet18"), next((demo / "images").iterdir())
    network, kept = classifier.network, []
    network.layer4.register_forward_hook(lambda _, __, output: kept.append(output))
    pixels = torch.from_numpy(np.array(dataset.load_image(image, 64))).permute(2, 0, 1)[None]
    with torch.no_grad():
        network(dataset.normalize(pixels))
    for label in range(3):
        cam = sum(weight * plane for weight, plane in zip(network.fc.weight[label], kept[0][0])).relu().detach().numpy()
        heat = inference.heatmaps(classifier, image, [label])[0]
        middles = heat[16::32, 16::32]  # of the 2 x 2 cells
        assert cam.max() > 0 and np.unravel_index(cam.argmax(), (2, 2)) == np.unravel_index(middles.argmax(), (2, 2))


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)])
def test_a_map_is_highest_in_the_middle_of_its_highest_cell(row, column):
    seen = torch.zeros(1, 1, 3, 3)
    seen[0, 0, row, column] = 1
    heat = inference._enlarge(seen, 90)[0].numpy()
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y - (30 * row + 14.5)) <= 1 and abs(x - (30 * column + 14.5)) <= 1


def test_pictures_are_saved_for_all_images_of_a_folder(trained, demo, tmp_path, capsys):
    images = sorted((demo / "images").iterdir())[:2]
    call = [*map(str, images), "--model", str(trained[0] / "model.pth"), "--device", "cpu", "--threshold", "0"]
    inference.main([*call, "--save", str(tmp_path / "plain")])
    inference.main([*call, "--save", str(tmp_path / "heat"), "--heatmap"])
    assert f"drawn: {tmp_path / 'heat' / images[0].stem}.png and 1 more" in capsys.readouterr().out
    for image in images:
        plain, heat = (Image.open(tmp_path / name / f"{image.stem}.png") for name in ("plain", "heat"))
        assert plain.width < heat.width and heat.height > 2 * 360  # seven pictures in rows of four
    with pytest.raises(InputError, match="--heatmap draws into the folder of --save DIR"):
        inference.main([*call, "--heatmap"])


# ---------------------------------------------------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize("losses, epochs", [([0.5], 1), ([1.0, math.nan, 0.5], 3), (list(range(5000)), 200), ([], 1)])
def test_loss_curves_draw_from_one_point_to_many(losses, epochs):
    history = [{"epoch": i + 1, "train_loss": 1 / (i + 1), "val_loss": math.nan} for i in range(epochs)]
    image = train.loss_curves(losses, history, [(1, "best epoch: 1"), (epochs, "layer4 unfrozen")], "A title")
    assert image.size == (900, 840)
    assert not losses or len(image.getcolors(10**6)) > 20


def test_marks_are_of_the_best_epoch_the_unfreezing_and_new_rates():
    history = [{"epoch": i + 1, "lr": rate} for i, rate in enumerate((1e-3, 1e-3, 1e-4))]
    options = SimpleNamespace(unfreeze="layer4", unfreeze_epoch=2, schedule="multistep")
    run = SimpleNamespace(options=options, stopping=SimpleNamespace(best_epoch=3), epoch=3, history=history)
    assert train.epoch_marks(run) == [(3, "best epoch: 3"), (2, "layer4 unfrozen"), (3, "lr 0.0001")]
    options.unfreeze, options.schedule, run.stopping.best_epoch = None, "cosine", 0
    assert train.epoch_marks(run) == []


@pytest.mark.parametrize("classes, size", [(1, (300, 324)), (4, (1200, 324)), (6, (1200, 604)), (80, (1200, 1444))])
def test_curves_of_few_and_of_many_classes(classes, size):
    rng = np.random.default_rng(0)
    targets = (rng.random((50, classes)) < 0.3).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    targets[:, 0] = np.nan
    names = [f"a class with a rather long name, number {c}" for c in range(classes)]
    assert train.pr_curves(targets, rng.random((50, classes)), [0.5] * classes, names).size == size


def test_curves_are_of_the_worst_classes_with_the_point_of_the_threshold(monkeypatch):
    charts = []
    monkeypatch.setattr(train, "stack", lambda drawn, columns, title: title)
    monkeypatch.setattr(train, "draw_chart", lambda series, title, *_, dots, **__: charts.append((title, series, dots)))
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.1], [0.7, 0.9, 0.1]])
    title = train.pr_curves(targets, scores, [0.8, 0.7, 0.5], ["good", "bad", "none"], most=2)
    assert "the 2 of 3 classes with the lowest average precision" in title
    assert [chart[0] for chart in charts] == ["none", "bad"] and charts[0][2] == []
    assert charts[1][2] == [(0.5, 0.5)] and charts[1][1][0][0] == "AP 0.833, 2 positives"


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_cover_the_values(low, span):
    ticks = train.nice_ticks(low, low + span)
    slack = 1e-9 * (abs(low) + span)
    assert 2 <= len(ticks) <= 9 and ticks[0] <= low + slack and ticks[-1] >= low + span - slack


def test_smooth_is_the_running_mean():
    values = np.random.default_rng(0).random(50)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(train.smooth(values, 7), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a data folder, in words


def test_the_summary_in_words(make_data, capsys):
    data = make_data("image A B C\na.jpg 1 1 NA\nb.jpg 1 0 1\nc.jpg 1 1 0\n")
    dataset.main([str(data), "--sheet", str(data / "sheet.png")])
    out = capsys.readouterr().out
    assert f"{'A':5} {3:9} {0:9} {0:7} {1:10.1%}  {'#' * 20}" in out
    assert f"{'C':5} {1:9} {1:9} {1:7} {0.5:10.1%}  {'#' * 7}{'-' * 7}\n" in out
    assert "        2  A + B\n        1  A + C" in out and "B + C" not in out
    assert "3 of 3 images opened: width 12 to 12, median 12; height 10 to 10, median 10\n3 RGB JPEG" in out
    assert Image.open(data / "sheet.png").width == 3 * 214 + 14
