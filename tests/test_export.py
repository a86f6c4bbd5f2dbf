"""Exported models: the same probabilities as predict(), without this code."""

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import inference
import metrics
from conftest import ROOT, as_command, files_of, refused
from dataset import InputError

CLASSES = ["a", "b", "c"]
FORMATS = ["pt2", "onnx"]


def make_member(seed, head="linear", size=32, dropout=None, backbone="resnet18"):
    """Return a member that nobody trained, calibrated so that its probabilities spread from 0 to 1.

    Without a backbone, it has a single convolution.
    """
    torch.manual_seed(seed)
    dropout = dropout or inference.HEADS[head]
    if backbone:
        network = inference.build_model(backbone, head, len(CLASSES), dropout)
    else:
        network = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                nn.Flatten(), inference._build_head(head, 8, len(CLASSES), dropout))
    network = inference.to_device(network.eval(), "cpu")
    member = inference.Member(network, backbone or "resnet18", head, dropout, size, [0.0] * len(CLASSES))

    logits = metrics.logit(inference.predict(make_classifier(member), make_images(size, 64), workers=0))
    member.scale = float(2 / logits.std(axis=0).mean())
    member.offsets = (0.3 * np.arange(len(CLASSES)) - member.scale * logits.mean(axis=0)).tolist()
    return member


def make_classifier(*members, **fields):
    """Return a Classifier of some members."""
    return inference.Classifier(list(members), CLASSES, {}, [0.25, 0.5, 0.75], **fields)


def make_images(size, count):
    """Return random images (H, W, 3) of different brightness and contrast."""
    rng = np.random.default_rng(3)
    noise = rng.random((count, size, size, 3)) * rng.random((count, 1, 1, 1)) + rng.random((count, 1, 1, 3))
    return list((127 * noise).astype(np.uint8))


def load(path):
    """Load an exported file, and return a function from images (H, W, 3) to probabilities, and the metadata."""
    if path.suffix == ".pt2":
        metadata = dict.fromkeys(["classes", "thresholds", "size"], "")
        program = torch.export.load(path, extra_files=metadata).module()
        run = lambda images: program(torch.from_numpy(images)).numpy()  # noqa: E731
    else:
        session = onnxruntime.InferenceSession(path)
        metadata = session.get_modelmeta().custom_metadata_map
        run = lambda images: session.run(["probabilities"], {"images": images})[0]  # noqa: E731
    metadata = {name: json.loads(metadata[name]) for name in ("classes", "thresholds", "size")}
    return lambda images: run(np.stack(images).transpose(0, 3, 1, 2).copy()), metadata


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the path of a model of 32 pixels."""
    path = tmp_path_factory.mktemp("saved") / "model.pth"
    classifier = make_classifier(make_member(0))
    classifier.classes = ["Lötstelle", "裂纹", 'a "quoted", name']
    inference.save_model(classifier, path)
    return path


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """Return the folder of what the command writes for this model with mirrored images and a threshold."""
    folder = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("new/MODEL.PT2", "model.onnx"):
            inference.main(["--export", str(folder / name), "--model", str(saved), "--tta", "--threshold", "0.3"])
    (folder / "new" / "MODEL.PT2").rename(folder / "model.pt2")
    return folder


# ----------------------------------------------------------------------------------------------------------
# Probabilities


def mean_probabilities(classifier, images):
    """Compute probabilities one by one, with torch's own layers only."""
    rows = []
    for image in images:
        views = []
        for member in classifier.members:
            pixels = torch.tensor(image.tolist()).permute(2, 0, 1)[None] / 255
            pixels -= torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            pixels /= torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            pixels = nn.functional.interpolate(pixels, 2 * [member.size], mode="bilinear", antialias=True)
            for view in [pixels, torch.flip(pixels, [-1])] if classifier.mirrored else [pixels]:
                with torch.no_grad():
                    logits = member.network(view)[0].tolist()
                views.append([1 / (1 + np.exp(-member.scale * logit - offset))
                              for logit, offset in zip(logits, member.offsets)])
        rows.append(np.mean(views, axis=0))
    return np.array(rows)


@pytest.mark.parametrize("heads, mirrored", [
    ([("linear", 32)], False),
    ([("bn", 32), ("linear", 23)], False),
    ([("linear", 24, [0.3]), ("mlp", 32)], True),
])
def test_an_exported_file_gives_the_probabilities_of_predict(heads, mirrored, tmp_path, capsys):
    members = [make_member(seed, *head, backbone=None) for seed, head in enumerate(heads)]
    classifier = make_classifier(*members, mirrored=mirrored)
    images = make_images(32, 33)
    predicted = inference.predict(classifier, images, workers=0)
    assert predicted.std(axis=0).min() > 0.05
    expected = mean_probabilities(classifier, images)

    for suffix in FORMATS:
        path = tmp_path / suffix / f"model.{suffix}"
        difference = inference.export_model(classifier, path)
        assert 0 <= difference < 1e-5
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: largest difference from predict() on 32 random images, with ")
        assert out.endswith(f": {difference:.2g}\n")
        assert list(files_of(path.parent)) == [path.name]

        run, metadata = load(path)
        assert metadata == {"classes": CLASSES, "thresholds": [0.25, 0.5, 0.75], "size": 32}
        for count in (1, 2, 33):
            probabilities = run(images[:count])
            assert (probabilities.shape, probabilities.dtype) == ((count, 3), np.float32)
            np.testing.assert_allclose(probabilities, predicted[:count], rtol=0, atol=1e-5)
            np.testing.assert_allclose(probabilities, expected[:count], rtol=0, atol=1e-5)

    # The classifier is what it was.
    assert np.array_equal(inference.predict(classifier, images, workers=0), predicted)
    assert [member.size for member in classifier.members] == [size for _, size, *_ in heads]
    assert all(parameter.requires_grad for member in members for parameter in member.network.parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 70), st.integers(1, 70))
def test_resizing_by_matrices_is_resizing(size, new_size):
    images = torch.from_numpy(np.random.default_rng(size).random((2, 3, size, size), np.float32))
    expected = inference._resize(images, new_size)
    resized = inference.MatrixResize(size, new_size)(images)
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_command_exports_mirrored_images_a_threshold_and_names_in_any_script(saved, exported, suffix):
    run, metadata = load(exported / f"model.{suffix}")
    classifier = inference.load_model(saved, "cpu", "fp32")
    assert metadata == {"classes": classifier.classes, "thresholds": [0.3] * 3, "size": 32}
    classifier.mirrored = True
    images = make_images(32, 3)
    np.testing.assert_allclose(run(images), inference.predict(classifier, images, workers=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone, suffix", [("convnext_tiny", "onnx"), ("efficientnet_b0", "pt2")])
def test_other_backbones_are_exported(backbone, suffix, tmp_path):
    torch.manual_seed(0)
    network = inference.build_model(backbone, "linear", len(CLASSES)).eval()
    member = inference.Member(network, backbone, "linear", [0.0], 32, [0.0] * len(CLASSES))
    path = tmp_path / f"model.{suffix}"
    inference.export_model(make_classifier(member), path)
    probabilities = load(path)[0](make_images(32, 3))
    expected = inference.predict(make_classifier(member, precision=torch.float32), make_images(32, 3))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-4)


def test_the_lines_of_the_readme_run_exported_files(tmp_path, monkeypatch, capsys):
    classifier = make_classifier(make_member(0, size=224))
    for suffix in FORMATS:
        inference.export_model(classifier, tmp_path / f"model.{suffix}")
    photo = make_images(224, 1)[0]
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=100)
    capsys.readouterr()

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("An exported file")[2]
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")][:5]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    printed = re.findall(r"0\.\d+", capsys.readouterr().out)
    expected = inference.predict(classifier, "photo.jpg")[0]
    np.testing.assert_allclose([float(one) for one in printed], [*expected, *expected], rtol=0, atol=1e-3)


def test_exported_files_name_no_folder_of_the_machine(exported):
    for content in files_of(exported).values():
        assert os.fsencode(ROOT) not in content
        assert b"site-packages" not in content


def test_an_exported_file_runs_without_this_code(saved, exported, tmp_path):
    images = make_images(32, 2)
    np.save(tmp_path / "images.npy", np.stack(images).transpose(0, 3, 1, 2))
    code = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
numpy.save("probabilities.npy", program(torch.from_numpy(numpy.load("images.npy"))).numpy())
assert not {"dataset", "inference", "torchvision", "onnx"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-I", "-c", code, exported / "model.pt2"], cwd=tmp_path, check=True)
    classifier = inference.load_model(saved, "cpu", "fp32")
    classifier.mirrored = True
    predicted = inference.predict(classifier, images, workers=0)
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), predicted, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("suffix, change", [("pt2", 2e-4), ("pt2", float("nan")), ("onnx", -2e-4)])
def test_a_file_with_other_probabilities_is_not_put_in_place(saved, suffix, change, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"of yesterday")
    predict = inference.predict
    monkeypatch.setattr(inference, "predict", lambda *args, **options: predict(*args, **options) + change)
    code, out, errors = as_command(capsys, inference.main, "--export", path, "--model", saved)
    assert (code, out) == (1, "")
    error = errors.splitlines()[-1]
    assert error.startswith(f"error: {path} was not written")
    assert f"by up to {abs(change):.2g}, more than 0.0001" in error
    assert files_of(tmp_path) == {path.name: b"of yesterday"}


@pytest.mark.parametrize("place", ["_to_pt2", "_load_pt2", "_largest_difference"])
def test_an_interrupted_export_leaves_nothing(saved, place, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, place, interrupted)
    assert as_command(capsys, inference.main, "--export", tmp_path / "model.pt2", "--model", saved)[:2] == (130, "")
    assert files_of(tmp_path) == {}


def test_a_network_that_cannot_be_converted_is_one_line(tmp_path, capsys):
    class Counting(nn.Linear):
        def forward(self, images):
            features = images.mean((2, 3))
            return super().forward(features[features.sum(dim=1) > float(features.mean())])

    member = inference.Member(Counting(3, 3), "resnet18", "linear", [0.0], 32, [0.0] * 3)
    code, out, errors = as_command(capsys, lambda _: inference.export_model(make_classifier(member),
                                                                            tmp_path / "model.pt2"))
    assert (code, out) == (1, "")
    note, error = errors.splitlines()
    assert note.endswith("model.pt2: converting")
    assert error.startswith(f"error: torch {torch.__version__} cannot convert this model: Could not guard")
    assert files_of(tmp_path) == {}


def test_a_converted_file_that_does_not_run_is_not_put_in_place(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "_to_onnx", lambda *_: b"no model")
    code, out, errors = as_command(capsys, inference.main, "--export", tmp_path / "model.onnx", "--model", saved)
    assert (code, out) == (1, "")
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'model.onnx'} was not written: the converted model")
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_before_a_model_is_loaded(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, inference.main, "--export", tmp_path / "model.onnx", "--model", tmp_path / "none.pth")
    assert "pip install onnx onnxscript" in error
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        inference.export_model(make_classifier(make_member(0)), tmp_path / "model.onnx")
    assert files_of(tmp_path) == {}


def test_torch_export_needs_no_other_package_and_allows_for_rounding(saved, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    predict = inference.predict
    monkeypatch.setattr(inference, "predict", lambda *args, **options: predict(*args, **options) + 8e-5)
    difference = inference.main(["--export", str(tmp_path / "model.pt2"), "--model", str(saved)])
    assert 7e-5 < difference < 9e-5
    assert (tmp_path / "model.pt2").exists()


def test_a_torch_without_the_onnx_exporter_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.4.0+cu121"))
    error = refused(capsys, inference.main, "--export", tmp_path / "model.onnx")
    assert "needs torch 2.9" in error
    assert "2.4.0" in error
    assert ".pt2" in error


def test_without_onnxruntime_the_file_is_checked_by_the_reference_evaluator(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, notes = as_command(capsys, inference.main, "--export", tmp_path / "model.onnx", "--model", saved)
    assert code == 0
    assert "with onnx's reference evaluator: " in out
    assert "onnxruntime is not installed" in notes


def test_onnx_files_of_more_than_2_gb_are_refused(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "MAX_ONNX_BYTES", 100_000)
    error = refused(capsys, inference.main, "--export", tmp_path / "model.onnx", "--model", saved, warns=True)
    assert "2 GB" in error
    assert ".pt2" in error
    assert files_of(tmp_path) == {}


def test_export_replaces_no_model_and_no_folder(saved, tmp_path, capsys):
    (tmp_path / "link.pt2").symlink_to(saved)
    before = saved.read_bytes()
    assert "would replace" in refused(capsys, inference.main, "--export", tmp_path / "link.pt2", "--model", saved)
    assert saved.read_bytes() == before
    (tmp_path / "folder.onnx").mkdir()
    assert "folder" in refused(capsys, inference.main, "--export", tmp_path / "folder.onnx", "--model", saved)


@pytest.mark.parametrize("arguments, named", [
    (["--export", "model.pth"], "model.pth"),
    (["--export", "model"], ".onnx"),
    (["--export", "m.onnx", "photo.jpg"], "images"),
    (["--export", "m.onnx", "--image", "photo.jpg"], "images"),
    (["--export", "m.pt2", "--out", "out.csv"], "--out"),
    (["--export", "m.pt2", "--save", "drawn"], "--save"),
    (["--export", "m.pt2", "--heatmap"], "--heatmap"),
    (["--export", "m.pt2", "--format", "json"], "--format"),
    (["--export", "m.pt2", "--device", "cuda"], "--device"),
    (["--export", "m.pt2", "--precision", "bf16"], "--precision"),
    (["--export", "m.pt2", "--count", "3"], "--count"),
    (["--export", "m.pt2", "--labels", "labels.csv"], "--labels"),
    (["--export", "m.pt2", "--evaluate", "data"], "--evaluate and --export"),
    (["--export", "m.pt2", "--calibrate", "data", "--out", "m.pth"], "--calibrate and --export"),
    (["--export", "m.pt2", "--ask", "data", "--out", "q.csv"], "--ask and --export"),
    (["--export", "m.pt2"], "outputs/model.pth"),
])
def test_options_that_do_not_go_with_export(arguments, named, in_folder, capsys):
    assert named in refused(capsys, inference.main, *arguments)
    assert files_of(in_folder) == {}
