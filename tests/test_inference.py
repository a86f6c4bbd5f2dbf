"""Models, predictions and their reports."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import inference
from dataset import ImageError, InputError


@pytest.fixture(scope="module")
def classifier(trained):
    return inference.load_model(trained[0] / "model.pth", "cpu", "fp32")


@pytest.fixture
def images(demo):
    return sorted((demo / "images").iterdir())[:5]


def test_predict_takes_paths_and_pil_images(classifier, images):
    probabilities = inference.predict(classifier, images)
    assert probabilities.shape == (5, 6) and probabilities.dtype == np.float32
    assert ((probabilities > 0) & (probabilities < 1)).all()
    np.testing.assert_allclose(inference.predict(classifier, images[0]), probabilities[:1], atol=1e-6)
    np.testing.assert_allclose(inference.predict(classifier, str(images[1])), probabilities[1:2], atol=1e-6)
    with Image.open(images[2]) as image:
        np.testing.assert_allclose(inference.predict(classifier, image), probabilities[2:3], atol=0.03)  # no draft
    assert inference.predict(classifier, []).shape == (0, 6)


def test_predictions_do_not_depend_on_the_batch_size(classifier, images):
    one = inference.predict(classifier, images, batch_size=1)
    np.testing.assert_allclose(inference.predict(classifier, images, batch_size=4), one, rtol=0, atol=1e-5)


def test_predict_names_a_bad_image_and_predict_all_goes_on(classifier, images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.jpg: not an image"):
        inference.predict(classifier, [images[0], tmp_path / "bad.jpg"])
    probabilities, errors = inference.predict_all(classifier, [images[0], tmp_path / "bad.jpg"])
    assert list(errors) == [1] and np.isnan(probabilities[1]).all() and not np.isnan(probabilities[0]).any()


HEADS = [("linear", None), ("linear", [0.2]), ("mlp", None), ("mlp", [0.6]), ("bn", None)]


@pytest.mark.parametrize("head, dropout", HEADS)
def test_heads_save_load_and_predict_the_same(head, dropout, tmp_path, images):
    torch.manual_seed(0)
    network = inference.build_model("resnet18", head, 3, dropout).eval()
    made = inference.Classifier(network, "resnet18", head, dropout or inference.HEADS[head], ["a", "b", "c"], {},
                                [0.5] * 3, 32)
    inference.save_model(made, tmp_path / "model.pth")
    loaded = inference.load_model(tmp_path / "model.pth", "cpu", "fp32")
    np.testing.assert_allclose(inference.predict(loaded, images), inference.predict(made, images), atol=1e-6)


def test_prediction_rows_with_groups_and_without():
    classes, groups = ["bolt", "nut", "rust"], {"components": ["bolt", "nut"], "defects": ["rust"]}
    probabilities = np.array([[0.6, 0.9, 0.8], [0.1, 0.2, 0.3]])
    rows = inference.prediction_rows(["x", "y"], probabilities, [0.5] * 3, classes, groups)
    assert rows[0] == ["ID", "components", "defects", "components_confidence", "defects_confidence",
                       "avg_component_confidence", "avg_defect_confidence", "overall_avg_confidence"]
    assert rows[1] == ["x", "nut;bolt", "rust", "0.9000;0.6000", "0.8000", "0.7500", "0.8000", "0.7667"]
    assert rows[2] == ["y", "", "", "", "", "", "", ""]
    rows = inference.prediction_rows(["x"], probabilities, [0.7] * 3, classes, {})
    assert rows[0] == ["ID", "labels", "labels_confidence", "avg_confidence"]
    assert rows[1:] == [["x", "nut;rust", "0.9000;0.8000", "0.8500"]]


def run(capsys, *arguments):
    inference.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out


def test_one_image_gives_the_table(trained, images, capsys):
    text = run(capsys, images[0], "--model", trained[0] / "model.pth", "--threshold", 0.0)
    lines = text.splitlines()
    assert lines[0] == str(images[0]) and lines[1].split() == ["attribute", "probability", "threshold", "status"]
    assert [line.split()[0] for line in lines[2:8]] == ["bolt", "bracket", "ring", "rust", "crack", "hole"]
    assert all(line.endswith("[PRESENT]") for line in lines[2:8]) and len({len(line) for line in lines[2:8]}) == 1
    assert lines[-1] == "present: bolt, bracket, ring, rust, crack, hole"
    text = run(capsys, "--image", images[0], "--model", trained[0] / "model.pth", "--threshold", 1.1)
    assert text.count("[absent]") == 6 and text.endswith("present: none\n")


def test_folders_csv_json_and_out(trained, demo, images, capsys, tmp_path):
    model = trained[0] / "model.pth"
    text = run(capsys, demo / "images", "--model", model)
    assert len(text.splitlines()) == 80
    rows = list(csv.DictReader(io.StringIO(run(capsys, *images, "--model", model, "--format", "csv"))))
    assert [row["ID"] for row in rows] == [path.stem for path in images] and "overall_avg_confidence" in rows[0]
    found = json.loads(run(capsys, *images, "--model", model, "--format", "json", "--threshold", 0))
    assert found == {path.stem: [0, 1, 2, 3, 4, 5] for path in images}
    assert run(capsys, *images, "--model", model, "--format", "json", "--out", tmp_path / "p.json") == ""
    assert list(json.loads((tmp_path / "p.json").read_text())) == list(found)


def test_evaluate_reports_on_a_labelled_folder(trained, demo, capsys):
    text = run(capsys, "--evaluate", demo, "--model", trained[0] / "model.pth")
    assert "81 rows, 80 images" in text and "f1_macro" in text and "bracket" in text and "[0." not in text
    text = run(capsys, "--evaluate", demo, "--model", trained[0] / "model.pth", "--bootstrap", 50)
    assert text.count("[0.") >= 6


def test_evaluate_needs_the_classes_of_the_model(trained, make_data):
    folder = make_data("a.jpg 1\nb.jpg 0\n")
    with pytest.raises(InputError, match="the data has no labels for bolt, "):
        inference.main(["--evaluate", str(folder), "--model", str(trained[0] / "model.pth")])


def test_wrong_images_are_clear_errors(trained, tmp_path):
    model = ["--model", str(trained[0] / "model.pth")]
    with pytest.raises(InputError, match=r"x\.jpg is not there"):
        inference.main([str(tmp_path / "x.jpg"), *model])
    with pytest.raises(InputError, match="holds no images"):
        inference.main([str(tmp_path), *model])
    with pytest.raises(InputError, match="no image is named"):
        inference.main(model)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), dataset.atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
