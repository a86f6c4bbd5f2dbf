"""Models, predictions, their reports and their pictures."""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import dataset
import inference
import metrics
import train
from conftest import (
    BACKBONES,
    SMALL,
    as_command,
    classifier_of,
    files_of,
    head_of,
    label_cells,
    read_json,
    read_rows,
    refused,
    size_for,
)
from dataset import ImageError, InputError

CPU = ["--device", "cpu", "--precision", "fp32", "-j", "0"]


@pytest.fixture(scope="module")
def model(trained):
    """Return the path of a trained model."""
    return str(trained[0] / "model.pth")


@pytest.fixture(scope="module")
def classifier(model):
    return inference.load_model(model, "cpu", "fp32")


@pytest.fixture(scope="module")
def images(demo):
    """Return the paths of five images of the demo data."""
    return sorted((demo / "images").iterdir())[:5]


def run(capsys, *arguments):
    """Run inference.py, and return what it prints."""
    inference.main([*map(str, arguments), *CPU])
    return capsys.readouterr().out


def make_classifier(backbone="resnet18", head="linear", size=64, classes=("a", "b", "c")):
    """Return a classifier that nobody trained."""
    torch.manual_seed(0)
    network = inference.build_model(backbone, head, len(classes)).eval()
    return classifier_of(network, backbone, head, inference.HEADS[head], list(classes), {}, [0.5] * len(classes), size)


# ----------------------------------------------------------------------------------------------------------
# Networks


HEAD_LAYERS = {"linear": ["LinearHead"], "bn": ["Linear", "BatchNorm1d"],
               "mlp": ["BatchNorm1d", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_takes_every_head(real_networks, backbone):
    size = size_for(backbone)
    for head, expected in HEAD_LAYERS.items():
        with inference.WithoutValues():
            network = inference.build_model(backbone, head, 7, size=size).to("meta").eval()
        assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)
        layers = [layer for layer in head_of(network).modules() if not list(layer.children())]
        assert [type(layer).__name__ for layer in layers] == expected


def fill(network):
    """Give a network without values random weights, faster than its own initial ones."""
    torch.manual_seed(0)
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            state[name] = torch.empty_like(tensor, device="cpu").uniform_(-0.2, 0.2)
            if tensor.dim() >= 2:
                state[name].normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                state[name].uniform_(0.5, 1.5)
    network.load_state_dict(state, assign=True)

    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0  # the statistics are those of the last batch
    return network


@pytest.mark.parametrize("number, backbone", list(enumerate(BACKBONES)))
def test_every_backbone_trains_saves_loads_and_predicts(real_networks, number, backbone, tmp_path):
    head = list(inference.HEADS)[number % 3]
    size = size_for(backbone)
    with inference.WithoutValues():
        network = inference.build_model(backbone, head, 3, size=size)
    network = fill(network)
    rng = np.random.default_rng(0)
    count = 17 if size < 200 else 4  # more than inference.FEW, where that is quick
    images = list(rng.integers(0, 256, (count, size, size, 3), np.uint8))
    batch = torch.from_numpy(np.stack(images[:8]))
    before = head_of(network).state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5)
    logits = network(dataset.normalize(batch.permute(0, 3, 1, 2)))
    (logits * torch.randn_like(logits)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    after = head_of(network).state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before if name.endswith("weight"))

    dropout = inference.HEADS[head]
    made = classifier_of(network.eval(), backbone, head, dropout, list("abc"), {}, [0.5] * 3, size)
    inference.save_model(made, tmp_path / "model.pth")
    loaded = inference.load_model(tmp_path / "model.pth", "cpu", "fp32")
    (tmp_path / "model.pth").unlink()
    few = np.concatenate([inference.predict(loaded, images[:8]), inference.predict(loaded, images[8:])])
    np.testing.assert_allclose(few[:8], inference.predict(made, images[:8]), rtol=0, atol=5e-4)
    assert few.std(axis=0).max() > 5e-4
    many = inference.predict(loaded, images)  # in another way, whose rounding these networks magnify
    np.testing.assert_allclose(many, few, rtol=0, atol=2e-3)

    maps = inference.heatmaps(loaded, images[0], [2, 0])
    assert (maps.shape, maps.dtype) == ((2, size, size), np.float32)
    assert np.isfinite(maps).all() and maps.min() >= 0
    assert set(maps.max(axis=(1, 2)).tolist()) <= {0.0, 1.0}
    assert inference.heatmaps(loaded, images[0], []).shape == (0, size, size)


@pytest.mark.parametrize("head, dropout", [("linear", None), ("linear", [0.2]), ("mlp", None),
                                           ("mlp", [0.6]), ("bn", None)])
def test_heads_save_load_and_predict_the_same(head, dropout, tmp_path, images):
    torch.manual_seed(0)
    network = inference.build_model("resnet18", head, 3, dropout).eval()
    made = classifier_of(network, "resnet18", head, dropout or inference.HEADS[head], ["a", "b", "c"],
                         {"x": ["a", "b"]}, [0.5, 0.25, 1], 32, epoch=7, scores={"map": 0.5}, options={"lr": 1e-3})
    inference.save_model(made, tmp_path / "model.pth")
    loaded = inference.load_model(tmp_path / "model.pth", "cpu", "fp32")
    np.testing.assert_allclose(inference.predict(loaded, images), inference.predict(made, images), atol=1e-4)
    for one, other in ((made, loaded), (made.members[0], loaded.members[0])):
        for field in dataclasses.fields(one):
            if field.name not in ("network", "members"):
                assert getattr(one, field.name) == getattr(other, field.name), field.name


@pytest.mark.parametrize("capability, expected", [((6, 1), torch.float32), ((7, 0), torch.float16),
                                                  ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                                  ((9, 0), torch.bfloat16)])
def test_the_precision_on_a_gpu_is_one_that_is_fast_there(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    precision, reason = inference.choose_precision("auto", torch.device("cuda"), 1000)
    assert precision == expected
    assert "{}.{}".format(*capability) in reason
    assert inference.choose_precision("fp32", torch.device("cuda"))[0] == torch.float32


def test_the_precision_on_a_processor():
    cpu = torch.device("cpu")
    assert inference.choose_precision("auto", cpu, 1)[0] == torch.float32
    assert inference.choose_precision("bf16", cpu)[0] == torch.bfloat16
    precision, reason = inference.choose_precision("auto", cpu)
    assert precision in (torch.float32, torch.bfloat16)
    assert reason


@pytest.mark.parametrize("error", [
    "RuntimeError('operator torchvision::nms does not exist')",
    "AttributeError('partially initialized module torchvision has no attribute extension')",
    "ImportError('_C.so: undefined symbol: _ZN3c10')",
], ids=["nms", "extension", "symbol"])
def test_a_torchvision_that_does_not_fit_is_not_called_a_damaged_model(
    model, images, tmp_path, monkeypatch, capsys, error
):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}\n")
    for name in list(sys.modules):
        if name.partition(".")[0] == "torchvision":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    error = refused(capsys, inference.main, images[0], "--model", model, *CPU)
    assert error.startswith("error: torchvision")
    assert "damaged" not in error


# ----------------------------------------------------------------------------------------------------------
# Predictions


def test_probabilities_of_one_image_and_of_several(classifier, images):
    probabilities = inference.predict(classifier, images)
    assert (probabilities.shape, probabilities.dtype) == ((5, 6), np.float32)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    np.testing.assert_allclose(inference.predict(classifier, images[0]), probabilities[:1], atol=1e-4)
    np.testing.assert_allclose(inference.predict(classifier, str(images[1])), probabilities[1:2], atol=1e-4)
    assert inference.predict(classifier, []).shape == (0, 6)
    one = inference.predict(classifier, images, batch_size=1)
    np.testing.assert_allclose(inference.predict(classifier, images, batch_size=4), one, rtol=0, atol=1e-5)
    np.testing.assert_allclose(inference.predict(classifier, images, workers=3), one, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """Return the path of a large photograph with odd sides, a JPEG file."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (26, 35, 3), np.uint8))
    smooth = np.asarray(coarse.resize((901, 703), Image.Resampling.BICUBIC))
    values = smooth + rng.normal(0, 12, smooth.shape)
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def test_a_photograph_has_the_same_probabilities_however_it_is_given(classifier, photograph):
    expected = inference.predict(classifier, photograph)
    content = photograph.read_bytes()
    opened = Image.open(photograph)
    for image in (str(photograph), content, bytearray(content), io.BytesIO(content), opened, opened):
        np.testing.assert_array_equal(inference.predict(classifier, [image]), expected)
    with open(photograph, "rb") as file:
        np.testing.assert_array_equal(inference.predict(classifier, file), expected)
    np.testing.assert_array_equal(inference.predict(classifier, content), expected)
    np.testing.assert_array_equal(inference.predict(classifier, Image.open(photograph)), expected)

    # What was decoded before is scaled in another way
    loaded = Image.open(photograph)
    loaded.load()
    decoded = inference.predict(classifier, [loaded])
    np.testing.assert_array_equal(inference.predict(classifier, np.asarray(loaded)), decoded)
    np.testing.assert_array_equal(inference.predict(classifier, [np.asarray(loaded)]), decoded)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("turned", [False, True])
def test_a_photograph_that_was_decoded_before_has_nearly_the_same_pixels(photograph, tmp_path, size, turned):
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(photograph).save(tmp_path / "turned.jpg", exif=exif, quality=95)
        photograph = tmp_path / "turned.jpg"
    loaded = Image.open(photograph)
    loaded.load()
    fast = np.asarray(dataset.load_image(photograph, size)).astype(int)
    slow = np.asarray(dataset.load_image(loaded, size)).astype(int)
    assert np.abs(fast - slow).mean() < 1


def test_predict_names_a_bad_image_and_predict_all_goes_on(classifier, images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.jpg: not an image"):
        inference.predict(classifier, [images[0], tmp_path / "bad.jpg"])
    with pytest.raises(ImageError, match="not an image"):
        inference.predict(classifier, [b"no image" * 1000])
    probabilities, errors = inference.predict_all(classifier, [images[0], tmp_path / "bad.jpg"])
    assert list(errors) == [1]
    assert np.isnan(probabilities[1]).all() and not np.isnan(probabilities[0]).any()


def test_threads_may_share_a_classifier(classifier, images):
    maps = [inference.heatmaps(classifier, path, [0, 3, 5]) for path in images]
    probabilities = inference.predict(classifier, images)

    def work(number):
        path = images[number % 5]
        if number % 3 == 2:
            return inference.predict(classifier, images, workers=0)
        return inference.heatmaps(classifier, path, [0, 3, 5])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(48)))
    for number, result in enumerate(results):
        expected = probabilities if number % 3 == 2 else maps[number % 5]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    assert not classifier.network.training
    assert all(not module._forward_hooks for module in classifier.network.modules())


# ----------------------------------------------------------------------------------------------------------
# Output


def test_prediction_rows_with_groups_and_without():
    classes = ["bolt", "nut", "rust"]
    groups = {"components": ["bolt", "nut"], "defects": ["rust"]}
    probabilities = np.array([[0.6, 0.9, 0.8], [0.1, 0.2, 0.3]])
    rows = list(inference.prediction_rows(["x", "y"], probabilities, [0.5] * 3, classes, groups))
    assert rows[0] == ["ID", "components", "defects", "components_confidence", "defects_confidence",
                       "avg_component_confidence", "avg_defect_confidence", "overall_avg_confidence"]
    assert rows[1] == ["x", "nut;bolt", "rust", "nut:0.9000;bolt:0.6000", "rust:0.8000", "0.7500", "0.8000",
                       "0.7667"]
    assert rows[2] == ["y", "", "", "", "", "", "", ""]
    rows = list(inference.prediction_rows(["x"], probabilities, [0.7] * 3, classes, {}))
    assert rows[0] == ["ID", "labels", "labels_confidence", "avg_confidence"]
    assert rows[1:] == [["x", "nut;rust", "nut:0.9000;rust:0.8000", "0.8500"]]


def test_the_labels_of_many_rows_are_those_of_each_row_alone():
    rng = np.random.default_rng(0)
    classes = list("abcdefgh")
    groups = {"two": ["d", "b"], "five": ["a", "h", "e", "c", "g"], "none": [], "one": ["f"]}
    probabilities = rng.integers(0, 20, (4200, 8)).astype(np.float32) / 20  # with many equal ones
    cuts = np.array([0.1, 0.95, 0.5, 0.7, 0.3, 0.6, 1.1, 0.4])
    rows = inference.prediction_rows([str(i) for i in range(4200)], probabilities, cuts, classes, groups)
    assert next(rows)[-1] == "overall_avg_confidence"
    for number, (row, p) in enumerate(zip(rows, probabilities.tolist(), strict=True)):
        found = [[c for c in map(classes.index, names) if p[c] >= cuts[c]] for names in groups.values()]
        found = [sorted(columns, key=lambda c: -p[c]) for columns in found]
        labels = [";".join(classes[c] for c in columns) for columns in found]
        confidences = [";".join(f"{classes[c]}:{p[c]:.4f}" for c in columns) for columns in found]
        found.append([c for columns in found for c in columns])
        means = [f"{np.mean([p[c] for c in columns]):.4f}" if columns else "" for columns in found]
        assert row == [str(number), *labels, *confidences, *means]

    text = inference.format_predictions("json", list(map(str, range(4200))), probabilities, cuts,
                                        make_classifier(classes=classes))
    assert list(json.loads(text).values()) == [np.flatnonzero(row).tolist() for row in probabilities >= cuts]


def test_one_image_gives_the_table(model, images, capsys):
    text = run(capsys, images[0], "--model", model, "--threshold", 0.0)
    lines = text[text.index(images[0].name):].splitlines()
    assert lines[1].split() == ["attribute", "probability", "threshold", "status"]
    assert [line.split()[0] for line in lines[2:8]] == ["bolt", "bracket", "ring", "rust", "crack", "hole"]
    assert all(line.endswith("[PRESENT]") for line in lines[2:8])
    assert len({len(line) for line in lines[2:8]}) == 1
    assert "present: bolt, bracket, ring, rust, crack, hole" in lines
    text = run(capsys, "--image", images[0], "--model", model, "--threshold", 1)
    assert text.count("[absent]") == 6
    assert "present: none\n" in text


def test_folders_csv_json_probabilities_and_out(model, classifier, demo, images, capsys, tmp_path):
    text = run(capsys, demo / "images", "--model", model)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("part_")] == sorted(
        path.name for path in (demo / "images").iterdir())
    rows = list(csv.DictReader(io.StringIO(run(capsys, *images, "--model", model, "--format", "csv"))))
    assert [row["ID"] for row in rows] == [path.name for path in images]
    assert "overall_avg_confidence" in rows[0]
    found = json.loads(run(capsys, *images, "--model", model, "--format", "json", "--threshold", 0))
    assert found == {path.stem: [0, 1, 2, 3, 4, 5] for path in images}
    for style in ("json", "csv", "table"):
        assert run(capsys, *images, "--model", model, "--format", style, "--out", tmp_path / style) == ""
    assert list(json.loads((tmp_path / "json").read_text())) == list(found)
    assert len((tmp_path / "csv").read_text().splitlines()) == 6
    assert images[0].name in (tmp_path / "table").read_text()


NAMES = {  # images -> the keys of their predictions in JSON
    "stems": (["a/000000000139.jpg", "b/c/2.PNG", "3.jpeg"], ["000000000139", "2", "3"]),
    "one stem in two folders": (["a/1.jpg", "b/1.jpg", "b/2.jpg"], ["a/1", "b/1", "2"]),
    "one stem in one folder": (["a/1.jpg", "a/1.png", "a/2.jpg"], ["a/1.jpg", "a/1.png", "2"]),
    "a stem that is another's name": (["1.jpg", "1.png", "1.jpg.png"], ["1.jpg", "1.png", "1.jpg.png"]),
    "a path that is another's name": (["x/1.jpg", "x/1.png", "x/1.jpg.png", "y/1.jpg.png"],
                                      ["x/1.jpg", "x/1.png", "x/1.jpg.png", "y/1.jpg"]),
    "dots that begin no suffix": (["scan.1", "scan.2", "a/scan.1.jpg"], ["scan.1", "scan.2", "a/scan.1"]),
    "Windows": (["a\\1.jpg", "a\\2.jpg", "b\\2.jpg"], ["1", "a/2", "b/2"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_json_names_each_image_as_shortly_as_it_can(case):
    ids, expected = NAMES[case]
    probabilities = np.eye(len(ids), 8)
    text = inference.format_predictions("json", ids, probabilities, [0.5] * 8, make_classifier(classes="abcdefgh"))
    assert json.loads(text) == {name: [c] for c, name in enumerate(expected)}


def test_all_probabilities_of_all_classes_can_be_had(model, classifier, images, capsys):
    text = run(capsys, *images, "--model", model, "--format", "probabilities")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["ID", *classifier.classes]
    values = [[float(row[name]) for name in classifier.classes] for row in rows]
    np.testing.assert_allclose(values, inference.predict(classifier, images), atol=1e-5)


def test_ids_are_those_of_the_label_file_so_that_predictions_join(trained, model, demo, capsys):
    text = run(capsys, demo / "images", "--model", model, "--format", "csv")
    predicted = {row["ID"]: row for row in csv.DictReader(io.StringIO(text))}
    rows = read_rows(trained[0] / "predictions.csv")
    assert len(rows) > 5
    for row in rows:
        assert predicted[row["ID"]]["parts"] == row["parts"]
        assert predicted[row["ID"]]["defects"] == row["defects"]


def test_images_of_one_name_are_kept_apart(model, demo, tmp_path, capsys):
    photos = sorted((demo / "images").iterdir())
    folder = tmp_path / "photos"
    for name, photo in zip(("x/1.jpg", "y/1.jpg"), photos):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(photo, folder / name)
    Image.open(photos[2]).save(folder / "x" / "1.png")

    found = json.loads(run(capsys, folder, "--model", model, "--format", "json"))
    assert list(found) == ["x/1.jpg", "x/1.png", "y/1"]
    thresholds = np.array(inference.load_model(model, "cpu", "fp32").thresholds)
    probabilities = inference.main([str(folder), "--model", model, *CPU])
    expected = [np.flatnonzero(row >= thresholds).tolist() for row in probabilities]
    assert list(found.values()) == expected

    capsys.readouterr()
    named = [folder / "x" / "1.jpg", folder / "y" / "1.jpg"]
    assert len(json.loads(run(capsys, *named, "--model", model, "--format", "json"))) == 2
    text = run(capsys, folder, "--model", model, "--save", tmp_path / "drawn")
    assert "and 2 more" in text
    assert len(list((tmp_path / "drawn").iterdir())) == 3


def test_out_is_written_through_a_link_into_a_pipe(model, images, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    link = tmp_path / "link"  # as /dev/stdout is
    link.symlink_to("pipe")
    reader = os.open(link, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run(capsys, *images[:2], "--model", model, "--format", "json", "--out", link)
        assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
        assert link.is_symlink()
        assert len(json.loads(os.read(reader, 100_000))) == 2
    finally:
        os.close(reader)


def test_the_model_is_named_beside_the_predictions(model, images, capsys):
    inference.main([*map(str, images), "--model", model, *CPU])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert model in text
    for word in ("resnet18", "6 classes", "5 images"):
        assert word in text, word


def test_a_file_name_that_is_not_utf8(model, images, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(images[0], os.fsencode(folder) + b"/f\xfcr.jpg")
    assert "r.jpg" in run(capsys, folder, "--model", model)
    for style in ("table", "csv", "json", "probabilities"):
        run(capsys, folder, "--model", model, "--format", style, "--out", tmp_path / style)
        assert (b'r": ' if style == "json" else b"r.jpg") in (tmp_path / style).read_bytes()
    run(capsys, folder, "--model", model, "--threshold", 0, "--save", tmp_path / "drawn", "--heatmap")
    assert len(list((tmp_path / "drawn").iterdir())) == 1

    shutil.copy(images[0], os.fsencode(folder) + b"/bad\xfc.jpg")
    with open(os.fsencode(folder) + b"/bad\xfc.jpg", "wb") as file:
        file.write(b"no image")
    code, _, errors = as_command(capsys, inference.main, folder, "--model", model, *CPU)
    assert code == 1
    assert "not an image" in errors


@pytest.mark.parametrize("stream", ["none", "closed", "pipe", "ascii"])
def test_predictions_need_no_output(tmp_path, images, monkeypatch, stream):
    inference.save_model(make_classifier(classes=["Größe", "裂纹"]), tmp_path / "model.pth")
    if stream == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        file = os.fdopen(writer, "w")
    elif stream == "ascii":
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    else:
        file = io.StringIO()
        file.close()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None if stream == "none" else file)
        call = [*map(str, images), "--model", str(tmp_path / "model.pth"), "--threshold", "0", *CPU]
        assert inference.main(call).shape == (5, 2)
        inference.main(call[1:])
    if stream == "ascii":
        file.flush()
        assert rb"\u88c2\u7eb9" in file.buffer.getvalue()


def test_wrong_images_are_clear_errors(model, tmp_path):
    for arguments, message in (([str(tmp_path / "x.jpg")], r"x\.jpg does not exist"),
                               ([str(tmp_path)], "holds no files: name a folder of images"),
                               ([], "no images given")):
        with pytest.raises(InputError, match=message):
            inference.main([*arguments, "--model", model])


def test_files_of_a_folder_that_are_not_read_are_counted_by_suffix(model, images, tmp_path, capsys):
    folder = tmp_path / "photos"
    for name in ("a.HEIC", "b/c.heic", "b/d.heic", "scan.dcm", "no_suffix", ".DS_Store", "._e.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0" * 20)
    error = refused(capsys, inference.main, folder, "--model", model, *CPU)
    assert f"{folder} holds no images that can be read, only 3 .heic, 1 without a suffix, 1 .dcm: convert" in error
    shutil.copy(images[0], folder / "b" / "good.jpg")
    code, out, errors = as_command(capsys, inference.main, folder, "--model", model, *CPU)
    assert code == 0 and "b/good.jpg" in out
    assert f"{folder}: skipped 3 .heic, 1 without a suffix, 1 .dcm, which" in errors
    (folder / "only").mkdir()
    shutil.copy(images[0], folder / "only" / "good.jpg")
    assert "skipped" not in as_command(capsys, inference.main, folder / "only", "--model", model, *CPU)[2]


def test_a_folder_has_images_of_every_readable_format_and_those_behind_links(model, images, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(images[0], tmp_path / "elsewhere" / "linked.jpg")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    picture = Image.open(images[0])
    for name in ("a.tga", "b.JP2", "c.webp", "d.tiff"):
        picture.save(folder / name)
    picture.save(folder / "e.jpx", "JPEG2000")
    found = json.loads(run(capsys, folder, "--model", model, "--format", "json"))
    assert list(found) == ["a", "b", "c", "d", "e", "linked"]


def test_a_file_that_is_named_is_an_image_whatever_its_suffix(model, images, tmp_path, capsys):
    for name in ("photo.dat", "photo"):
        shutil.copy(images[0], tmp_path / name)
        assert run(capsys, tmp_path / name, "--model", model).startswith(f"{name}\n")


ORDERS = [  # arguments: models A and B, the latter also as C without a suffix; images 1 and 2
    ("--model A 1 2", "A"), ("--model A -- 1 2", "A"), ("1 2 --model A", "A"), ("1 --model A 2", "A"), ("A 1 2", "A"),
    ("1 --batch-size 4 --model A --format csv 2", "A"), ("--model A B 1 2", "AB"), ("--model A --model B 1 2", "AB"),
    ("1 2 --model A B", "AB"), ("1 --model A B 2", "AB"), ("--model A 1 --model B --image 2", "AB"),
    ("--model A --model C 1 2", "AB"),
]


@pytest.mark.parametrize("words, models", ORDERS, ids=[words for words, _ in ORDERS])
def test_models_and_images_may_be_given_in_any_order(two, images, tmp_path, words, models):
    named = {"A": two[0], "B": two[1], "C": str(tmp_path / "model"), "1": str(images[0]), "2": str(images[1])}
    shutil.copy(named["B"], named["C"])
    printed = inference.main([*(named.get(word, word) for word in words.split()), *CPU])
    expected = probabilities_of([named[model] for model in models], images[:2])
    np.testing.assert_allclose(printed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("words, code, message", [("--model A gone.pth 1", 2, "gone.pth does not exist"),
                                                  ("--model A", 2, "no images given"), ("A", 2, "no images given"),
                                                  ("--model A 1 C", 1, "model: not an image")])
def test_what_is_neither_a_model_nor_an_image_is_named(two, images, tmp_path, capsys, words, code, message):
    named = {"A": two[0], "C": str(tmp_path / "model"), "1": images[0]}
    shutil.copy(two[1], named["C"])
    found, _, errors = as_command(capsys, inference.main, *(named.get(word, word) for word in words.split()), *CPU)
    assert (found, message in errors) == (code, True)


def test_a_file_that_is_read_is_not_replaced(model, images, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    picture = Image.open(images[0])
    for name in ("a.png", "b.png", "more/a.png"):
        picture.save(photos / name)
    shutil.copy(model, tmp_path / "model.pth")
    shutil.copy(images[0], photos / "photo.dat")
    (tmp_path / "link.txt").symlink_to(photos / "photo.dat")
    other, linked = tmp_path / "other", tmp_path / "linked"
    other.mkdir()
    picture.save(other / "a.png")
    linked.mkdir()
    (linked / "b.png").symlink_to(photos / "b.png")

    before = files_of(tmp_path)
    not_drawn = "which was not drawn by --save"
    among = "is inside a folder that images are read from"
    replaces = "would replace a file that is read"

    for call, message in (([photos, "--save", photos], among), ([photos, "--save", f"{photos}/more/../"], among),
                          ([photos, "--save", photos / "more"], among), ([photos, "--save", photos / "new"], among),
                          (["--image", photos, "--save", photos], among),
                          ([photos / "a.png", "--save", photos], not_drawn),
                          ([images[0], photos / "a.png", "--save", other], not_drawn),
                          ([photos / "b.png", "--save", linked], not_drawn),
                          ([photos, "--save", tmp_path / "model.pth"], "is a file"),
                          ([photos, "--out", tmp_path], "is a folder"),
                          ([photos, "--out", photos / "a.png"], "is the name of an image"),
                          ([photos, "--out", tmp_path / "new.JPG"], "is the name of an image"),
                          ([photos, "--out", tmp_path / "model.pth"], replaces),
                          ([photos / "photo.dat", "--out", photos / "photo.dat"], replaces),
                          ([photos / "photo.dat", "--out", tmp_path / "link.txt"], replaces)):
        code, out, errors = as_command(capsys, inference.main, *call, "--model", tmp_path / "model.pth", *CPU)
        assert (code, out, errors.splitlines()[-1].startswith("error: ")) == (2, "", True), call
        assert message in errors and ": resnet18" not in errors  # before the model is loaded
    assert files_of(tmp_path) == before


def test_what_macos_writes_beside_images_is_no_image(model, images, tmp_path, capsys):
    shutil.copy(images[0], tmp_path / "b.jpg")
    (tmp_path / "._b.jpg").write_bytes(b"\0\5\x16\7")
    assert list(json.loads(run(capsys, tmp_path, "--model", model, "--format", "json"))) == ["b"]


def test_a_link_that_loops_is_one_bad_image(model, images, tmp_path, capsys):
    shutil.copy(images[0], tmp_path / "good.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder").symlink_to(tmp_path)
    code, out, errors = as_command(capsys, inference.main, tmp_path, "--model", model, "--format", "json",
                                   *CPU)
    assert code == 1
    assert list(json.loads(out)) == ["good"]
    assert "loop.jpg: " in errors
    assert errors.splitlines()[-1].startswith("error: 1 of ")


def test_bad_images_are_reported_and_the_others_predicted(odd_folder, model, capsys):
    folder, bad = odd_folder
    count = len(list((folder / "images").iterdir()))
    code, out, errors = as_command(capsys, inference.main, folder / "images", "--model", model, "--format",
                                   "json", *CPU)
    assert code == 1
    assert len(json.loads(out)) == count - len(bad)
    assert all(errors.count(f"{name}: ") == 1 for name in bad)
    assert errors.splitlines()[-1] == f"error: {len(bad)} of {count} images could not be read"
    code, out, errors = as_command(capsys, inference.main, folder / "images" / "text.jpg", "--model", model,
                                   "--format", "json", *CPU)
    assert (code, out) == (1, "")
    assert "text.jpg: not an image" in errors


WRONG = [
    (["--threshold", "50"], "--threshold: 50: it must be a number from 0"),
    (["--threshold", "nan"], "--threshold: nan: it must be a number from 0"),
    (["--threshold", "-0.1"], "--threshold: -0.1: it must be a number from 0"),
    (["--heatmap"], "--heatmap draws into the folder of --save DIR"),
    (["--labels", "x.csv"], "--labels goes with --evaluate"),
    (["--evaluate", "data"], "--evaluate"),
    (["--format", "xml"], "--format: invalid choice: 'xml'"),
    (["--batch-size", "0"], "--batch-size: 0: it must be a number from 1 up"),
    (["--device", "abacus"], "--device abacus"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate (see --help)"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_options(model, images, capsys, arguments, message):
    assert message in refused(capsys, inference.main, images[0], "--model", model, *arguments)


@pytest.mark.parametrize("option", [["--save", "x"], ["--save", "x", "--heatmap"], ["--format", "csv"],
                                    ["--format", "probabilities"], ["--image", "a.jpg"]], ids=" ".join)
def test_options_that_do_nothing_beside_evaluate_are_refused(model, demo, in_folder, capsys, option):
    assert "--evaluate" in refused(capsys, inference.main, "--evaluate", demo, "--model", model, *option)
    assert list(in_folder.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluate_reports_on_a_labelled_folder(model, demo, capsys):
    text = run(capsys, "--evaluate", demo, "--model", model)
    assert "80 rows, 80 images" in text
    assert "f1_macro" in text and "bracket" in text and text.count("[0.") >= 6


def test_evaluate_as_json_with_images_elsewhere(model, demo, tmp_path, capsys):
    shutil.copy(demo / "labels.txt", tmp_path)
    call = ["--evaluate", tmp_path, "--images", demo / "images", "--model", model, "--format", "json"]
    report = inference.main([*map(str, call), *CPU])
    written = json.loads(capsys.readouterr().out)
    assert written["rows"] == report["rows"] == 80
    assert written["per_class"].keys() == report["per_class"].keys()
    run(capsys, *call, "--out", tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == written


def label_counts(report):
    """Return {class: (positives, negatives, NA)} of a report."""
    rows = report["per_class"].items()
    return {name: (row["positives"], row["negatives"], row["na"]) for name, row in rows}


def test_a_class_that_a_lists_file_does_not_name_is_absent_there(make_data, tmp_path, capsys):
    data = make_data("ID,parts,defects\na,bolt,Rust\nb,bolt;nut,Rust;odd\nc,bolt,Rust\n",
                     name="image_data.csv")
    model = tmp_path / "model.pth"
    inference.save_model(make_classifier(classes=["Rust", "crack", "bolt"]), model)
    report = inference.main(["--evaluate", str(data), "--model", str(model), *CPU])
    expected = {"Rust": (3, 0, 0), "crack": (0, 3, 0), "bolt": (3, 0, 0)}
    assert label_counts(report) == expected
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"parts": ["bolt", "nut"], "defects": ["Rust", "crack"]}))
    again = inference.main(["--evaluate", str(data), "--label-groups", str(groups), "--model", str(model),
                            *CPU])
    assert label_counts(again) == expected
    assert "odd (1 times)" in capsys.readouterr().out


def test_evaluate_needs_the_classes_of_the_model(model, make_data):
    folder = make_data("a.jpg 1\nb.jpg 0\n")
    with pytest.raises(InputError, match="the data has no labels for bolt, "):
        inference.main(["--evaluate", str(folder), "--model", model])


@pytest.fixture
def labelled(make_data, classifier):
    """Return a data folder with three images and labels of the model's classes."""
    classes = " ".join(classifier.classes)
    return make_data(f"image {classes}\na.jpg 1 0 1 0 1 0\nb.jpg 0 1 0 1 0 1\nc.jpg 1 1 1 0 0 0\n")


def test_evaluate_with_no_readable_image_is_an_error_of_one_line(model, labelled, capsys):
    for path in (labelled / "images").iterdir():
        path.write_text(f"no image {path}")
    code, _, errors = as_command(capsys, inference.main, "--evaluate", labelled, "--model", model, *CPU)
    *others, last = errors.splitlines()
    assert (code, last.startswith("error: ")) == (2, True)
    assert str(labelled) in last
    assert not any(line.startswith("error: ") or "Traceback" in line for line in others)


def test_evaluate_with_one_bad_image_reports_the_others(model, labelled, capsys):
    (labelled / "images" / "a.jpg").write_text("no image")
    report = inference.main(["--evaluate", str(labelled), "--model", model, *CPU])
    assert report["rows"] == 2
    assert "a.jpg" in capsys.readouterr().err


def test_models_are_deployed_without_metrics(two, images, surveyed, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "metrics", None)
    for models in (two[:1], [*two, "--tta"]):
        assert images[0].name in run(capsys, images[0], "--model", *models)
        run(capsys, images[0], "--model", *models, "--threshold", 0, "--save", tmp_path, "--heatmap")
        for option, *out in (["--evaluate"], ["--calibrate", "--out", tmp_path / "new.pth"]):
            error = refused(capsys, inference.main, option, surveyed, "--model", *models, *out, *CPU, warns=True)
            assert f"{option} needs metrics.py" in error


def divided(labelled, parts):
    """Give each image of a data folder its part, by a column of the label file."""
    header, *rows = (labelled / "labels.txt").read_text().replace(" ", ",").splitlines()
    lines = [f"{header},split", *(f"{row},{part}" for row, part in zip(rows, parts))]
    (labelled / "labels.txt").write_text("\n".join(lines))
    return labelled


PARTS = [  # parts of the three images, what --evaluate reports, what --calibrate uses
    (("train", "val", "test"), ("test", [2]), ("val", [1])),
    (("test", "train", "test"), ("test", [0, 2]), ("test", [0, 2])),
    (("val", "", "train"), ("val", [0]), ("val", [0])),
    (("train", "train", "train"), ("all", [0, 1, 2]), ("all", [0, 1, 2])),
    (None, ("all", [0, 1, 2]), ("all", [0, 1, 2])),
]


@pytest.mark.parametrize("parts, evaluated, calibrated", PARTS, ids=[str(case[0]) for case in PARTS])
def test_a_model_is_reported_and_calibrated_on_what_it_was_not_trained_on(model, labelled, tmp_path, capsys, parts,
                                                                          evaluated, calibrated):
    table = dataset.read_labels(labelled)
    data = divided(labelled, parts) if parts else labelled

    for option, (split, rows) in (("--evaluate", evaluated), ("--calibrate", calibrated)):
        out = tmp_path / f"{option}.json" if option == "--evaluate" else tmp_path / "new.pth"
        report = inference.main([option, str(data), "--model", model, "--format", "json", "--out", str(out), *CPU])
        printed, errors = capsys.readouterr()
        written = json.loads(out.read_text() if option == "--evaluate" else printed)
        assert (written["split"], report["split"], report["rows"]) == (split, split, len(rows))
        if split == "all":
            assert f"{option}: all 3 images, including any that the model was trained on" in errors
        else:
            assert f"{option}: the {split} part of the data's own split, {len(rows)} of 3 images" in errors
        counts = [np.count_nonzero(table.targets[rows] == value, axis=0).tolist() for value in (1, 0)]
        found = [[row[name] for row in report["per_class"].values()] for name in ("positives", "negatives")]
        assert found == counts

    text = run(capsys, "--evaluate", data, "--model", model)
    assert f"\n{'all data' if evaluated[0] == 'all' else evaluated[0] + ' split'}, {len(evaluated[1])} images\n" in text


def test_a_test_part_without_labels_is_not_reported(model, labelled, capsys):
    data = divided(labelled, ("train", "val", "test"))
    text = (data / "labels.txt").read_text()
    (data / "labels.txt").write_text(text.replace("c.jpg,1,1,1,0,0,0", "c.jpg,NA,NA,NA,NA,NA,NA"))
    report = inference.main(["--evaluate", str(data), "--model", model, *CPU])
    assert (report["split"], report["rows"]) == ("val", 1)
    capsys.readouterr()


def test_pictures_that_were_drawn_before_are_replaced(model, images, tmp_path, capsys):
    drawn = tmp_path / "drawn" / f"{images[0].stem}.png"
    for threshold in (0, 1):  # all labels, then none
        run(capsys, images[0], "--model", model, "--threshold", threshold, "--save", drawn.parent)
        drawn.rename(tmp_path / f"{threshold}.png")
        shutil.copy(tmp_path / "0.png", drawn)
    run(capsys, images[0], "--model", model, "--threshold", 1, "--save", drawn.parent)
    assert drawn.read_bytes() == (tmp_path / "1.png").read_bytes() != (tmp_path / "0.png").read_bytes()


def test_evaluate_and_calibrate_replace_no_file_that_they_read(model, classifier, labelled, tmp_path, capsys):
    (labelled / "label_groups.json").write_text(json.dumps({"all": classifier.classes}))
    shutil.copy(model, tmp_path / "model.pth")
    shutil.copy(labelled / "label_groups.json", tmp_path / "groups.json")
    before = files_of(tmp_path)

    names = ("labels.txt", "images/../labels.txt", "label_groups.json", "images/a.jpg", "images")
    for option, out in (*itertools.product(("--evaluate", "--calibrate"), names), ("--evaluate", "model.pth"),
                        ("--evaluate", "groups.json")):
        groups = ["--label-groups", tmp_path / "groups.json"] if out == "groups.json" else []
        error = refused(capsys, inference.main, option, labelled, "--model", tmp_path / "model.pth", "--out",
                        labelled / out, *groups, *CPU, warns=True)
        assert error.startswith(f"error: --out {labelled / out} ")
    assert files_of(tmp_path) == before

    report = labelled / "report.json"
    for _ in range(2):  # a report of before is replaced
        run(capsys, "--evaluate", labelled, "--model", model, "--format", "json", "--out", report)
    assert read_json(report)["rows"] == 3


# ----------------------------------------------------------------------------------------------------------
# Heatmaps


def test_the_heatmap_of_a_linear_head_is_the_class_activation_map(images):
    """CAM (Zhou et al. 2016): the last feature maps, weighted by the row of the head."""
    classifier = make_classifier()
    network = classifier.network
    kept = []
    hook = network.layer4.register_forward_hook(lambda _, __, output: kept.append(output))
    pixels = torch.from_numpy(np.array(dataset.load_image(images[0], 64))).permute(2, 0, 1)[None]
    with torch.no_grad():
        network(dataset.normalize(pixels))
    hook.remove()

    for label in range(3):
        cam = torch.einsum("c,chw->hw", network.fc.weight[label], kept[0][0]).relu().detach().numpy()
        heat = inference.heatmaps(classifier, images[0], [label])[0]
        if cam.max() == 0:
            assert heat.max() == 0
            continue
        side = 64 // len(cam)
        middles = heat[side // 2 :: side, side // 2 :: side]  # of the cells
        assert middles.argmax() == cam.argmax()


class Brightness(nn.Module):
    """A network whose last maps are the brightness of 3 x 3 cells."""

    def __init__(self):
        super().__init__()
        self.layer4 = nn.Sequential(nn.AvgPool2d(30), nn.ReLU())
        self.fc = nn.Linear(3, 1)
        nn.init.ones_(self.fc.weight)

    def forward(self, images):
        return self.fc(self.layer4(images).mean((2, 3)))


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)])
def test_a_map_is_highest_in_the_middle_of_its_highest_cell(row, column):
    pixels = np.zeros((90, 90, 3), np.uint8)
    pixels[30 * row : 30 * row + 30, 30 * column : 30 * column + 30] = 255
    classifier = classifier_of(Brightness(), "resnet18", "linear", [0.0], ["bright"], {}, [0.5], 90)
    heat = inference.heatmaps(classifier, pixels, [0])[0]
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y - (30 * row + 14.5)) <= 1
    assert abs(x - (30 * column + 14.5)) <= 1


# ----------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_saved_for_all_images_of_a_folder(model, images, tmp_path, capsys):
    call = [*images[:2], "--model", model, "--threshold", 0]
    run(capsys, *call, "--save", tmp_path / "plain")
    text = run(capsys, *call, "--save", tmp_path / "heat", "--heatmap")
    assert f"drawn: {tmp_path / 'heat' / images[0].stem}.png and 1 more" in text
    for image in images[:2]:
        plain, heat = (Image.open(tmp_path / name / f"{image.stem}.png") for name in ("plain", "heat"))
        assert plain.width < heat.width
        assert heat.height > 2 * 360  # seven pictures in rows of four
    none = inference.save_pictures(inference.load_model(model), images[:1], np.zeros((1, 6)),
                                   tmp_path / "none", True)
    assert Image.open(none[0]).width == plain.width


def test_pictures_of_classes_in_other_scripts(images, tmp_path, capsys):
    classes = ["Größe", "裂纹", "трещина"]
    inference.save_model(make_classifier(classes=classes), tmp_path / "model.pth")
    run(capsys, images[0], "--model", tmp_path / "model.pth", "--threshold", 0, "--save", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 1


def colour_columns(sheet, colour):
    """Return the columns of a picture that have pixels close to a colour."""
    pixels = np.asarray(sheet).astype(int)
    return np.flatnonzero((np.abs(pixels - colour).max(axis=2) < 25).any(axis=0))


def test_mistakes_are_shown_most_confident_first():
    colours = [(200, 200, 0), (0, 200, 200), (200, 0, 200)]
    images = [np.full((40, 40, 3), colour, np.uint8) for colour in colours]
    targets = np.array([[1, 0], [0, np.nan], [1, 1]], np.float32)
    table = dataset.LabelTable(["a", "b", "c"], images, targets, ["x", "y"])
    sheet = inference.mistakes_sheet(table, np.array([[0.4, 0.1], [0.95, 0.9], [0.9, 0.02]]), [0.5, 0.5])

    yellow, cyan, violet = (colour_columns(sheet, colour) for colour in colours)
    assert len(violet) and len(cyan) and len(yellow)
    assert violet.max() < cyan.min() and cyan.max() < yellow.min()  # 0.98, 0.95, 0.6
    red = colour_columns(sheet, (178, 24, 43))  # false alarms
    blue = colour_columns(sheet, (31, 78, 156))  # missed labels
    assert violet.max() < red.min() and red.max() < yellow.min()
    assert blue.min() < cyan.min() and blue.max() > yellow.min() - 20

    none = inference.mistakes_sheet(table, np.nan_to_num(targets), [0.5, 0.5])
    assert none.size[1] < sheet.size[1]
    assert not len(colour_columns(none, (200, 200, 0)))


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_sheet_of_mistakes_does_not_hold_full_size_images(large_images, kind):
    missed = np.full((4, 1), 0.1, np.float32)
    decoded, alive = large_images(kind, lambda table: inference.mistakes_sheet(table, missed, [0.5]))
    assert alive <= 3
    if kind == "jpg":  # which is decoded smaller
        assert max(map(max, decoded)) <= 1300


@pytest.mark.parametrize("losses, epochs", [([0.5], 1), ([1.0, math.nan, 0.5], 3), (list(range(5000)), 200),
                                            ([], 1)])
def test_loss_curves_draw_from_one_point_to_many(losses, epochs):
    history = [{"epoch": i + 1, "train_loss": 1 / (i + 1), "val_loss": math.nan} for i in range(epochs)]
    marks = [(1, "best epoch: 1"), (epochs, "layer4 unfrozen")]
    image = train.loss_curves(losses, history, marks, "A title")
    assert image.size == (900, 840)
    assert not losses or len(image.getcolors(10**6)) > 20


@pytest.mark.parametrize("descending", [False, True])
def test_a_line_of_many_points_is_drawn_as_if_all_were_joined(monkeypatch, descending):
    rng = np.random.default_rng(0)
    ys = np.sin(np.linspace(0, 9, 30_000)) + rng.normal(0, 0.05, 30_000) + 2 * (rng.random(30_000) > 0.9997)
    xs = np.arange(30_000)[:: -1 if descending else 1]
    thinned = np.asarray(inference.draw_chart([("", xs, ys, "#ff0000")], "", "", "", (300, 280)), int)
    monkeypatch.setattr(inference, "_thin_out", lambda line: line)
    whole = np.asarray(inference.draw_chart([("", xs, ys, "#ff0000")], "", "", "", (300, 280)), int)
    differ = np.abs(thinned - whole).max(axis=2)
    assert 0 < np.count_nonzero(differ > 60) < 0.006 * differ.size  # edges of the line, by less than a pixel


def test_the_thick_line_is_the_mean_of_a_fortieth_of_the_losses_before_each_step(monkeypatch):
    drawn = []
    monkeypatch.setattr(inference, "draw_chart", lambda series, *_, **__: drawn.append(series))
    monkeypatch.setattr(inference, "stack_charts", lambda *_: None)
    losses = np.random.default_rng(0).random(410).tolist()
    train.loss_curves(losses, [])
    (name, steps, means, _), (_, all_steps, all_losses, _) = drawn[0]
    assert name == "mean of 10"
    assert list(all_steps) == list(range(1, 411)) and list(all_losses) == losses
    assert list(steps) == list(range(10, 411))
    np.testing.assert_allclose(means, [np.mean(losses[end - 10 : end]) for end in range(10, 411)], rtol=1e-12)


def test_marks_are_of_the_best_epoch_the_unfreezing_and_new_rates(demo, tmp_path, monkeypatch):
    kept = []

    def draw(losses, history, marks=(), title=""):
        kept.append(set(marks))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(train, "loss_curves", draw)
    options = [*SMALL, "--data", str(demo), "--out", str(tmp_path), "--epochs", "3", "--lr", "0.001",
               "--train-layers", "head", "--unfreeze", "layer4", "--unfreeze-epoch", "2", "--monitor", "map"]
    report = train.main([*options, "--schedule", "multistep", "--milestones", "2"])
    assert len(kept) == 3
    best = (report["epoch"], f"best epoch: {report['epoch']}")
    assert kept[-1] == {best, (2, "layer4 unfrozen"), (3, "lr 0.0001")}
    assert kept[0] == {(1, "best epoch: 1")}


def test_curves_of_few_and_of_many_classes():
    rng = np.random.default_rng(0)
    sizes = {}
    for classes in (1, 4, 6, 80):
        targets = (rng.random((50, classes)) < 0.3).astype(np.float32)
        targets[rng.random(targets.shape) < 0.1] = np.nan
        targets[:, 0] = np.nan
        names = [f"a class with a rather long name, number {c}" for c in range(classes)]
        sizes[classes] = inference.pr_curves(targets, rng.random((50, classes)), [0.5] * classes, names).size
    width, height = sizes[1]
    row = sizes[6][1] - height
    assert min(width, height, row) > 200
    assert sizes == {1: (width, height), 4: (4 * width, height), 6: (4 * width, height + row),
                     80: (4 * width, height + 4 * row)}  # the 20 worst


# ----------------------------------------------------------------------------------------------------------
# Several models, mirrored images


def spread_classifier(seed, backbone="resnet18", size=32, classes=("a", "b", "c"), thresholds=(0.5, 0.5, 0.5)):
    """Return a classifier that nobody trained, whose probabilities differ from image to image."""
    noise = np.random.default_rng(9).integers(0, 256, (16, 8, 8, 3), np.uint8)
    pictures = [np.asarray(Image.fromarray(picture).resize((64, 64))) for picture in noise]

    torch.manual_seed(seed)
    network = inference.build_model(backbone, "linear", len(classes))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics are those of these pictures
    with torch.no_grad():
        network(dataset.normalize(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)))
    made = classifier_of(network.eval(), backbone, "linear", [0.0], list(classes), {}, list(thresholds), size)

    logits = metrics.logit(inference.predict(made, pictures, workers=0))
    head = head_of(network)
    factor = torch.tensor(1.5 / logits.std(axis=0), dtype=torch.float32)
    with torch.no_grad():
        head.weight.mul_(factor[:, None])
        head.bias.mul_(factor).sub_(factor * torch.tensor(logits.mean(axis=0), dtype=torch.float32))
    return made


@pytest.fixture
def two(tmp_path):
    """Return the paths of two models of 32 pixels with the same classes."""
    paths = []
    for seed, thresholds in ((1, [0.2, 0.5, 0.6]), (2, [0.4, 0.5, 0.9])):
        paths.append(str(tmp_path / f"model_{seed}.pth"))
        inference.save_model(spread_classifier(seed, thresholds=thresholds), paths[-1])
    return paths


def probabilities_of(paths, images, **options):
    return inference.predict(inference.load_model(paths, "cpu", "fp32"), images, workers=0, **options)


def test_two_models_are_the_mean_of_both(two, images, capsys):
    a, b = (probabilities_of(path, images) for path in two)
    np.testing.assert_allclose(probabilities_of(two, images), (a + b) / 2, rtol=0, atol=1e-6)
    assert np.abs(a - b).max() > 0.1
    classifier = inference.load_model(two)
    assert classifier.thresholds == pytest.approx([0.3, 0.5, 0.75])
    np.testing.assert_allclose(probabilities_of([two[0]] * 2, images), a, rtol=0, atol=1e-6)
    printed = inference.main([*map(str, images), "--model", *two, "--format", "probabilities", *CPU])
    np.testing.assert_allclose(printed, (a + b) / 2, rtol=0, atol=1e-6)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    np.testing.assert_allclose(np.array([row[1:] for row in rows[1:]], float), printed, atol=1e-6)
    both = run(capsys, images[0], "--model", *two)
    assert [line.split()[2] for line in both.splitlines() if line[:2] in ("a ", "b ", "c ")] == [
        "0.3000", "0.5000", "0.7500"]


def test_models_of_other_networks_and_sizes_are_averaged(two, images, tmp_path):
    large = str(tmp_path / "large.pth")
    inference.save_model(spread_classifier(3, "mobilenet_v2", 64), large)
    mixed = inference.load_model([two[0], large], "cpu", "fp32")
    assert mixed.size == 64
    small_part, large_part = (probabilities_of(path, images) for path in (two[0], large))
    assert np.isfinite(large_part).all() and large_part.std(axis=0).max() > 0.05
    np.testing.assert_allclose(inference.predict(mixed, images, workers=0), (small_part + large_part) / 2, rtol=0,
                               atol=0.02)

    with torch.no_grad():  # of the large one alone there is no difference
        for member in mixed.members[:1]:
            member.network.fc.weight.zero_()
            member.network.fc.bias.zero_()
    np.testing.assert_allclose(inference.predict(mixed, images, workers=0), (0.5 + large_part) / 2, rtol=0, atol=1e-6)
    maps = inference.heatmaps(mixed, images[0], [0, 1])
    assert maps.shape == (2, 64, 64) and np.isfinite(maps).all()


def test_models_of_other_classes_are_an_error_that_names_the_file(two, model, images, tmp_path, capsys):
    turned = str(tmp_path / "turned.pth")
    inference.save_model(spread_classifier(1, classes=("b", "a", "c")), turned)
    for other in (model, turned):
        error = refused(capsys, inference.main, images[0], "--model", *two, other, *CPU)
        assert error.startswith(f"error: {other} has different classes")
    missing = tmp_path / "none.pth"
    assert "none.pth does not exist" in refused(capsys, inference.main, images[0], "--model", two[0], missing, *CPU)


def test_an_image_is_decoded_once_for_all_models_and_views(two, images, tmp_path, monkeypatch, capsys):
    large = str(tmp_path / "large.pth")
    inference.save_model(spread_classifier(3, size=64), large)
    load = dataset.load_image
    loaded = []

    def counted(image, *more, **options):
        loaded.append(str(image))
        return load(image, *more, **options)

    monkeypatch.setattr(dataset, "load_image", counted)
    inference.main([*map(str, images), "--model", *two, large, "--tta", *CPU])
    assert sorted(loaded) == sorted(map(str, images))


def test_tta_is_the_mean_with_the_mirrored_image(two, images, capsys):
    pictures = [np.array(dataset.load_image(path, 32)) for path in images]
    for path in two:
        straight = probabilities_of(path, [Image.fromarray(picture) for picture in pictures])
        flipped = probabilities_of(path, [ImageOps.mirror(Image.fromarray(picture)) for picture in pictures])
        assert np.abs(straight - flipped).max() > 0.01
        mirrored = inference.load_model(path, "cpu", "fp32")
        mirrored.mirrored = True
        np.testing.assert_allclose(inference.predict(mirrored, pictures), (straight + flipped) / 2, rtol=0, atol=1e-5)
        printed = inference.main([*map(str, images), "--model", path, "--tta", *CPU])
        np.testing.assert_allclose(printed, (straight + flipped) / 2, rtol=0, atol=1e-5)
    assert "mirrored images" in capsys.readouterr().err
    singles = [inference.main([*map(str, images), "--model", path, "--tta", *CPU]) for path in two]
    both = inference.main([*map(str, images), "--model", *two, "--tta", *CPU])
    np.testing.assert_allclose(both, np.mean(singles, axis=0), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Calibration


def write_labels(folder, demo, classes, targets, rows=slice(None)):
    """Write a data folder with the images of the demo data and these labels, and return its path."""
    paths = sorted((demo / "images").iterdir())[rows]
    lines = [" ".join(["image", *classes])]
    for path, labels in zip(paths, targets):
        lines.append(" ".join([path.name, *label_cells(labels)]))
    (folder / "images").mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder / "images")
    (folder / "labels.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def surveyed(demo, tmp_path_factory):
    """Return a folder of 60 images with labels drawn by the probabilities of `two`; a tenth of them is NA."""
    paths = sorted((demo / "images").iterdir())[:60]
    rng = np.random.default_rng(0)
    mean = np.mean([inference.predict(spread_classifier(seed), paths, workers=0) for seed in (1, 2)], axis=0)
    targets = (rng.random(mean.shape) < metrics.calibrate(mean, 0.7, [-1, 0.5, 0])).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return write_labels(tmp_path_factory.mktemp("surveyed") / "data", demo, "abc", targets, slice(60))


def evaluated(*arguments):
    return inference.main(["--evaluate", *map(str, arguments), *CPU])


CALIBRATED = {"one": (1, []), "one mirrored": (1, ["--tta"]), "two": (2, []), "two mirrored": (2, ["--tta"])}


@pytest.mark.parametrize("case", CALIBRATED)
def test_calibrate_writes_one_model_that_is_better_calibrated_on_its_data(two, surveyed, tmp_path, capsys, case):
    count, tta = CALIBRATED[case]
    models = two[:count]
    out = tmp_path / "calibrated.pth"
    before = evaluated(surveyed, "--model", *models, *tta)
    report = inference.main(["--calibrate", str(surveyed), "--model", *models, "--out", str(out), *tta, *CPU])
    assert report["log_loss"] < before["log_loss"] - 0.01
    assert "written: " in capsys.readouterr().err

    classifier = inference.load_model(out, "cpu", "fp32")
    assert (len(classifier.members), classifier.mirrored) == (count, bool(tta))
    table = dataset.read_labels(surveyed)
    probabilities = inference.predict(classifier, table.paths, workers=0)
    soft = metrics.find_thresholds(table.targets, probabilities, "soft")
    np.testing.assert_allclose(classifier.thresholds, soft, atol=1e-6)
    expected = metrics.report(table.targets, probabilities, classifier.thresholds, table.classes)
    for again in (report, evaluated(surveyed, "--model", out)):
        for name in metrics.HEADLINES:
            assert again[name] == pytest.approx(expected[name], abs=1e-6), name

    # The networks stay as they were
    for member, path in zip(classifier.members, models):
        before = inference.load_model(path, "cpu").members[0].network.state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in member.network.state_dict().items())


def test_calibrate_is_the_fit_of_metrics(two, surveyed, tmp_path):
    table = dataset.read_labels(surveyed)
    probabilities = probabilities_of(two[0], table.paths)
    scale, offsets = metrics.fit_calibration(table.targets, probabilities)
    inference.main(["--calibrate", str(surveyed), "--model", two[0], "--out", str(tmp_path / "new.pth"), *CPU])
    (member,) = inference.load_model(tmp_path / "new.pth").members
    assert member.scale == pytest.approx(scale, abs=1e-4)
    np.testing.assert_allclose(member.offsets, offsets, atol=1e-4)
    again = probabilities_of(tmp_path / "new.pth", table.paths)
    np.testing.assert_allclose(again, metrics.calibrate(probabilities, scale, offsets), atol=1e-5)


def test_calibrating_an_ensemble_never_makes_its_log_loss_worse(demo, tmp_path):
    """Members are overconfident and their mean is right: calibrated members would make the mean too careful."""
    paths = sorted((demo / "images").iterdir())
    models = []
    each = []
    for seed in range(4):
        made = spread_classifier(seed)
        made.members[0].scale = 2.0
        models.append(str(tmp_path / f"{seed}.pth"))
        inference.save_model(made, models[-1])
        each.append(inference.predict(made, paths, workers=0))

    mean = np.mean(each, axis=0)
    targets = (np.random.default_rng(0).random(mean.shape) < mean).astype(np.float32)
    data = write_labels(tmp_path / "data", demo, "abc", targets)
    before = evaluated(data, "--model", *models)
    report = inference.main(["--calibrate", str(data), "--model", *models, "--out", str(tmp_path / "new.pth"), *CPU])
    assert report["log_loss"] <= before["log_loss"] + 1e-6


def test_calibrate_ignores_what_is_not_known(two, surveyed, demo, tmp_path):
    table = dataset.read_labels(surveyed)
    unknown = np.full((20, 3), np.nan)
    more = write_labels(tmp_path / "more", demo, "abc", np.concatenate([table.targets, unknown]))
    column = table.targets.copy()
    column[:, 1] = np.nan
    lacking = write_labels(tmp_path / "lacking", demo, "abc", column, slice(60))

    results = []
    for number, data in enumerate((surveyed, more, lacking)):
        out = tmp_path / f"new_{number}.pth"
        inference.main(["--calibrate", str(data), "--model", two[0], "--out", str(out), *CPU])
        classifier = inference.load_model(out)
        results.append([classifier.members[0].scale, *classifier.members[0].offsets, *classifier.thresholds])

    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    assert results[2][2] == pytest.approx(0, abs=1e-9)  # the offset of a class of which nothing is known
    assert results[2][5] == 0.5


def test_what_is_calibrated_twice_stays_calibrated(two, surveyed, tmp_path):
    table = dataset.read_labels(surveyed)
    losses = []
    model = two[0]
    for number in range(3):
        out = str(tmp_path / f"{number}.pth")
        losses.append(inference.main(["--calibrate", str(surveyed), "--model", model, "--out", out, *CPU])["log_loss"])
        model = out
    assert losses == sorted(losses, reverse=True)
    before = (tmp_path / "2.pth").read_bytes()
    inference.main(["--calibrate", str(surveyed), "--model", model, "--out", model, *CPU])  # into its own file
    assert (tmp_path / "2.pth").read_bytes() != before
    assert metrics.log_loss(table.targets, probabilities_of(model, table.paths)) <= losses[-1] + 1e-6


NO_CALIBRATION = [
    (["--calibrate", "DATA"], "--out"),
    (["--calibrate", "DATA", "--out", "OUT", "IMAGE"], "--calibrate is about its DATA"),
    (["--calibrate", "DATA", "--out", "OUT", "--image", "IMAGE"], "--calibrate is about its DATA"),
    (["--calibrate", "DATA", "--out", "OUT", "--save", "drawn"], "--calibrate is about its DATA"),
    (["--calibrate", "DATA", "--out", "OUT", "--format", "csv"], "--calibrate is about its DATA"),
    (["--calibrate", "DATA", "--out", "OUT", "--evaluate", "DATA"], "--evaluate and --calibrate"),
    (["--calibrate", "DATA", "--out", "OUT", "--threshold", "0.3"], "--threshold"),
    (["--calibrate", "/nowhere", "--out", "OUT"], "/nowhere is not a folder"),
    (["--calibrate", "DEMO", "--out", "OUT"], "the data has no labels for a, b, c"),
    (["--calibrate", "DATA", "--out", "FILE/model.pth"], "FILE"),
]


@pytest.mark.parametrize("arguments, message", NO_CALIBRATION,
                         ids=[" ".join(arguments[2:]) + arguments[1] for arguments, _ in NO_CALIBRATION])
def test_wrong_calibrations_are_errors_of_one_line(two, surveyed, demo, images, in_folder, capsys, arguments, message):
    (in_folder / "FILE").touch()
    words = {"DATA": surveyed, "OUT": "new.pth", "IMAGE": images[0], "DEMO": demo}
    arguments = [words.get(word, word) for word in arguments]
    code, _, errors = as_command(capsys, inference.main, "--model", two[0], *arguments, *CPU)
    last = errors.splitlines()[-1]
    assert (code, last.startswith("error: ")) == (1 if "FILE" in message else 2, True)
    assert message in last and "Traceback" not in errors
    assert not (in_folder / "new.pth").exists() and not (in_folder / "drawn").exists()


def test_the_report_of_a_labelled_folder_has_intervals(two, surveyed, capsys):
    text = run(capsys, "--evaluate", surveyed, "--model", two[0])
    assert text.count("[0.") >= 6
    report = inference.main(["--evaluate", str(surveyed), "--model", two[0], *CPU])
    assert report["intervals"]["f1_macro"][0] <= report["f1_macro"] <= report["intervals"]["f1_macro"][1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_no_output_replaces_a_file_with_answers(model, images, demo, tmp_path, capsys, encoding):
    out = tmp_path / "suspects.csv"
    out.write_text("sep=,\nID,label,given,probability,answer\nx.jpg,hole,1,0.08,0\n", encoding=encoding)
    before = out.read_bytes()
    for command in ([images[0], "--format", "csv"], ["--evaluate", demo], ["--calibrate", demo]):
        error = refused(capsys, inference.main, *command, "--model", model, "--out", out, warns=True)
        assert f"{out} holds answers" in error
    assert out.read_bytes() == before
