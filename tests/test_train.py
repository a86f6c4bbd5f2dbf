"""Loss, freezing, stopping, the loop and its files."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import dataset
import inference
import metrics
import train
from conftest import ROOT, SMALL
from dataset import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Loss


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_masked_loss_is_that_of_the_known_elements_one_by_one(data):
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    targets = data.draw(arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0, np.nan])))
    logits = data.draw(arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)))
    weight = data.draw(arrays(np.float32, shape[1], elements=st.floats(0.5, 20, width=32)))
    logits = torch.tensor(logits, requires_grad=True)
    total, known = train.masked_bce(logits, torch.tensor(targets), torch.tensor(weight))
    expected = 0.0
    for i, j in np.argwhere(~np.isnan(targets)):
        x, y = logits[i, j].item(), targets[i, j].item()
        log_p, log_q = -math.log1p(math.exp(-x)), -math.log1p(math.exp(x))
        expected -= weight[j] * y * log_p + (1 - y) * log_q
    assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert known.item() == (~np.isnan(targets)).sum()
    total.backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[torch.isnan(torch.tensor(targets))] == 0).all()


def test_pos_weight():
    nan = np.nan
    targets = np.array([[1, 1, 0, nan, 1], [0, 1, 0, nan, nan], [0, 0, 0, nan, nan], [0, nan, nan, nan, nan]])
    assert train.compute_pos_weight(targets, "none").tolist() == [1] * 5
    assert train.compute_pos_weight(targets, "linear", (0.1, 20)).tolist() == [3, 0.5, 20, 1, pytest.approx(0.1)]
    np.testing.assert_allclose(train.compute_pos_weight(targets, "sqrt", (1, 20)), [3**0.5, 1, 20, 1, 1], rtol=1e-6)
    assert train.compute_pos_weight(targets, "linear", (1, 2)).tolist() == [2, 1, 2, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Layers and stopping


def test_frozen_layers_stay_as_they_are_batchnorm_statistics_too():
    network = inference.build_model("resnet18", "linear", 2)
    train.freeze(network, train.select_parameters(network, "resnet18", "layer4,head"))
    train.train_mode(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    for name, tensor in network.state_dict().items():
        trained = name.startswith(("layer4", "fc"))
        assert torch.equal(tensor, before[name]) != trained, name


def test_a_frozen_backbone_is_computed_once_when_nothing_is_augmented(demo, tmp_path):
    options = ["--data", str(demo), "--out", str(tmp_path), "--train-layers", "head", *SMALL]
    run = train.prepare(train.parse_options([*options, "--augment", "flip"]))
    train.choose_layers(run)
    assert not run.features
    run = train.prepare(train.parse_options([*options, "--augment", "none", "--unfreeze", "layer4"]))
    train.choose_layers(run)
    assert run.model is run.classifier.network.fc and set(run.features) == {"train", "val"}
    with torch.inference_mode():
        torch.testing.assert_close(run.model(run.features["val"]), train.compute_split(run, "val"))
    run.epoch = 2
    train.choose_layers(run)
    assert run.model is run.classifier.network and not run.features
    assert run.classifier.network.layer4[0].conv1.weight.requires_grad


def test_a_wrong_layer_is_named_with_the_right_ones():
    network = inference.build_model("resnet18", "linear", 2)
    with pytest.raises(InputError, match=r"no layer layer5; it has all, head, conv1, .*layer4"):
        train.select_parameters(network, "resnet18", "layer5,head")


def test_early_stopping_counts_checks_without_improvement():
    stopping = train.EarlyStopping(higher_is_better=True, patience=2, min_delta=0.1)
    assert [stopping.improved(score, i) for i, score in enumerate((0.5, 0.55, 0.7, 0.6, 0.78), 1)] == [
        True, False, True, False, False,
    ]
    assert stopping.stop and stopping.best == 0.7 and stopping.best_epoch == 3
    stopping = train.EarlyStopping(higher_is_better=False, patience=1)
    assert stopping.improved(math.nan, 1) and stopping.improved(3.0, 2) and not stopping.improved(math.nan, 3)
    assert stopping.stop and not train.EarlyStopping(True, 0, waited=99).stop


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def run(*arguments):
    return train.main([*map(str, arguments), *SMALL])


def test_a_run_leaves_every_file_and_returns_its_report(trained):
    out, report = trained
    assert {path.name for path in out.iterdir()} == {
        "model.pth", "last.pth", "classes.json", "thresholds.json", "predictions.csv", "train_metadata.csv",
        "val_metadata.csv", "test_metadata.csv", "loss_curve.png", "history.csv", "metrics.json", "config.json",
        "pr_curves.png", "predictions.png",
    }
    written = json.loads((out / "metrics.json").read_text())
    assert written["split"] == "test" and written["images"] == report["images"] == 12
    assert {"loss", *metrics.HEADLINES} < written.keys() and written["f1_macro"] == report["f1_macro"]
    classes = json.loads((out / "classes.json").read_text())
    assert list(written["per_class"]) == classes["classes"] and set(classes["groups"]) == {"parts", "defects"}
    assert set(json.loads((out / "thresholds.json").read_text())) == set(classes["classes"])
    history = list(csv.DictReader((out / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["1", "2"] and float(history[0]["images_per_second"]) > 0
    predictions = list(csv.DictReader((out / "predictions.csv").open()))
    assert list(predictions[0]) == [
        "ID", "parts", "defects", "parts_confidence", "defects_confidence", "avg_part_confidence",
        "avg_defect_confidence", "overall_avg_confidence",
    ]
    assert len(predictions) == 12
    assert Image.open(out / "loss_curve.png").size == (900, 840)
    assert torch.load(out / "model.pth", weights_only=True)["classes"] == classes["classes"]


def test_metadata_files_are_label_files_of_disjoint_splits(trained, demo):
    out, _ = trained
    whole, seen = dataset.read_labels(demo), []
    for split in ("train", "val", "test"):
        table = dataset.read_labels(demo, labels=out / f"{split}_metadata.csv")
        rows = [whole.ids.index(name) for name in table.ids]
        np.testing.assert_array_equal(table.targets, whole.targets[rows])
        seen += rows
    assert sorted(seen) == list(range(80))


def test_reported_scores_are_those_of_the_saved_model(trained, demo):
    out, report = trained
    table = dataset.read_labels(demo, labels=out / "test_metadata.csv")
    again = inference.evaluate(inference.load_model(out / "model.pth", "cpu", "fp32"), table)
    assert again["per_class"] == report["per_class"] and again["f1_samples"] == report["f1_samples"]


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others(demo, trained, tmp_path):
    again = run("--data", demo, "--out", tmp_path / "a", "--epochs", 2)
    other = run("--data", demo, "--out", tmp_path / "b", "--epochs", 2, "--seed", 1)
    assert again == trained[1] and other["loss"] != again["loss"]


def test_no_test_split_reports_on_val(demo, tmp_path):
    report = run("--data", demo, "--out", tmp_path, "--epochs", 1, "--split", 0.8, 0.2, 0)
    assert report["split"] == "val" and report["images"] == 16


def test_freezing_unfreezing_and_rates(demo, tmp_path):
    run("--data", demo, "--out", tmp_path, "--epochs", 3, "--train-layers", "head", "--unfreeze", "layer4",
        "--unfreeze-epoch", 2, "--lr-backbone", 1e-4, "--schedule", "multistep", "--milestones", 2, "--val-every", 2,
        "--wd", 0, "--monitor", "loss", "--lr", 1e-3)
    history = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [float(row["lr"]) for row in history] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert [float(row["lr_backbone"]) for row in history] == pytest.approx([1e-4, 1e-4, 1e-5])
    assert [bool(row["val_loss"]) for row in history] == [False, True, True]


def test_weights_from_a_file_are_loaded_where_they_fit(trained, demo, tmp_path, capsys):
    out, _ = trained
    network = inference.build_model("resnet18", "linear", 3)
    taken, skipped, _ = inference.load_weights(network, out / "model.pth", "resnet18")
    saved = inference.read_checkpoint(out / "model.pth")["network"]
    assert len(taken) == 120 and set(skipped) == {"fc.weight", "fc.bias"}
    assert "another shape" in skipped["fc.bias"] and torch.equal(network.conv1.weight, saved["conv1.weight"])
    wrapped = {"state_dict": {"module.conv1.weight": saved["conv1.weight"], "other": torch.ones(1)}}
    torch.save(wrapped, tmp_path / "w.pth")
    taken, skipped, _ = inference.load_weights(network, tmp_path / "w.pth", "resnet18")
    assert taken == ["conv1.weight"] and skipped["other"] == "not in this network"
    torch.save({"x": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no tensor that fits resnet18"):
        inference.load_weights(network, tmp_path / "w.pth", "resnet18")


def test_imagenet_weights_that_cannot_be_had(demo, tmp_path, monkeypatch):
    import torchvision

    def no_network(*_, **__):
        raise OSError("<urlopen error Name or service not known>")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.__class__, "get_state_dict", no_network)
    with pytest.raises(InputError, match=r"resnet18 could not be downloaded .*--weights PATH .*--weights none"):
        train.main(["--data", str(demo), "--out", str(tmp_path), "-q"])


# ---------------------------------------------------------------------------------------------------------------------
# Presets

TABLE = """
inspection: backbone=resnet18 head=linear train_layers=all lr=0.001 wd=0 batch_size=16 epochs=10 patience=3
    monitor=loss pos_weight=sqrt pos_weight_clip=[1,20] augment=flip,rotation thresholds=pr_curve max_threshold=0.8
two-stage: backbone=resnet18 head=mlp dropout=[0.5,0.3] train_layers=head unfreeze=layer4 unfreeze_epoch=3 lr=0.002
    lr_backbone=0.0001 batch_size=16 epochs=50 patience=5 monitor=loss pos_weight=linear
    augment=crop,flip,jitter,perspective,erasing thresholds=0.5
assignment: backbone=resnet18 head=linear train_layers=all lr=0.001 wd=0 pos_weight=linear augment=none thresholds=0.5
    plot_title=Aimonk_multilabel_problem
resnet50: backbone=resnet50 head=mlp dropout=[0.65,0.4] train_layers=layer3,layer4,head lr=5e-05 lr_backbone=5e-05
    wd=0.01 epochs=40 patience=5 monitor=loss pos_weight=linear thresholds=0.5
    augment=resized_crop,flip,vflip,jitter,rotation,erasing
coco: head=bn train_layers=head unfreeze=all wd=0 schedule=multistep monitor=f1 pos_weight=linear augment=flip
    thresholds=global
"""


def test_presets_have_the_published_values_and_explicit_options_win():
    entries = TABLE.replace("\n    ", " ").strip().splitlines()
    assert {entry.split(":")[0] for entry in entries} == set(train.PRESETS) - {"default"}
    for entry in entries:
        preset, _, values = entry.partition(": ")
        options = train.parse_options(["--preset", preset])
        for pair in values.split():
            name, _, expected = pair.partition("=")
            actual = getattr(options, name)
            number = isinstance(actual, float)
            assert (actual == float(expected)) if number else str(actual).replace(" ", "") == expected, (preset, name)
    options = train.parse_options(["--preset", "two-stage", "--epochs", "7", "--demo", "--size", "64"])
    assert (options.epochs, options.size, options.weights, options.head) == (7, 64, "none", "mlp")


def test_inspection(tmp_path):
    dataset.write_demo(tmp_path / "data", count=60, style="lists")
    run("--preset", "inspection", "--data", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1,
        "--export-splits", tmp_path / "export")
    exported = [sorted((tmp_path / "export" / "images" / split).iterdir()) for split in ("train", "val", "test")]
    assert [len(files) for files in exported] == [42, 9, 9]
    test = dataset.read_labels(tmp_path / "data", labels=tmp_path / "out" / "test_metadata.csv")
    assert [path.stem for path in exported[2]] == sorted(test.ids)
    assert (tmp_path / "out" / "predictions.csv").read_text().startswith("ID,parts,defects,parts_confidence")


def test_coco(tmp_path):
    dataset.write_demo(tmp_path / "data", count=60, style="cls")
    arguments = ["--preset", "coco", "--data", tmp_path / "data", "--registry", tmp_path / "registry", "--epochs", 3]
    out = tmp_path / "out"
    report = run(*arguments, "--out", out, "--val-every", 2, "--train-metrics-every", 3, "--backbone", "mobilenet_v2")
    history = list(csv.DictReader((out / "history.csv").open()))
    assert [bool(row["val_map"]) for row in history] == [False, True, True]
    assert [bool(row["train_map"]) for row in history] == [False, False, True]
    content = inference.read_checkpoint(out / "model.pth")
    assert len(set(content["thresholds"])) == 1
    (predictions,) = out.glob("predictions_mobilenet_v2_f1-*_epoch-*_b-16_lr-0.001_t-*.json")
    assert f"f1-{report['f1_weighted']:.4f}_" in predictions.name and len(json.loads(predictions.read_text())) == 9
    (kept,) = (tmp_path / "registry").iterdir()
    assert kept.name.startswith("mobilenet_v2-bn-") and "mobilenet_v2" in metrics.main([str(kept)])
    for better, expected in ((0.0, report["f1_weighted"]), (2.0, 2.0)):
        scores = json.loads((kept / "metrics.json").read_text())
        (kept / "metrics.json").write_text(json.dumps(scores | {"f1_weighted": better}))
        run(*arguments, "--out", out, "--val-every", 2, "--train-metrics-every", 3, "--backbone", "mobilenet_v2")
        assert json.loads((kept / "metrics.json").read_text())["f1_weighted"] == expected


def test_tensorboard_is_optional(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        run("--data", demo, "--out", tmp_path, "--tensorboard")


@pytest.mark.parametrize("head", inference.HEADS)
def test_a_head_for_other_classes_takes_the_rows_of_the_names_both_know(head, tmp_path):
    old, new = ["a", "b", "c"], ["c", "d", "a", "e"]
    torch.manual_seed(0)
    source = inference.build_model("resnet18", head, 3)
    inference.save_model(inference.Classifier(source, "resnet18", head, inference.HEADS[head], old, {}, [0.5] * 3, 32),
                         tmp_path / "model.pth")
    network = inference.build_model("resnet18", head, 4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, skipped, common = inference.load_weights(network, tmp_path / "model.pth", "resnet18", new)
    assert set(skipped) == {f"head row of {name}" for name in "deb"} and common == ["c", "a"]
    names = {"linear": ["fc.weight", "fc.bias"], "mlp": ["fc.5.weight", "fc.5.bias"],
             "bn": ["fc.0.weight", "fc.1.weight", "fc.1.running_var"]}[head]
    for name in names:
        was, now = source.state_dict()[name], network.state_dict()[name]
        assert torch.equal(now[0], was[2]) and torch.equal(now[2], was[0]) and torch.equal(now[1], before[name][1])
    assert torch.equal(network.state_dict()["conv1.weight"], source.state_dict()["conv1.weight"])


@pytest.mark.parametrize("backbone", inference.BACKBONES)
def test_every_backbone_and_head_trains_saves_loads_and_predicts_the_same(backbone, demo, tmp_path):
    torch.manual_seed(0)
    start = inference.build_model(backbone, "linear", 6).state_dict()
    torch.save(start, tmp_path / "start.pth")
    images = sorted((demo / "images").iterdir())[:4]
    batch = torch.stack([dataset.ImageDataset(dataset.read_labels(demo), 32)[i][0] for i in range(4)])
    for head in inference.HEADS:
        network = inference.build_model(backbone, head, 6)
        taken, *_ = inference.load_weights(network, tmp_path / "start.pth", backbone)
        assert len(taken) >= len(start) - 2
        train.train_mode(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        inference.forward(network, dataset.normalize(batch), torch.float32).sum().backward()
        optimizer.step()
        made = inference.Classifier(network.eval(), backbone, head, inference.HEADS[head], list("abcdef"), {},
                                    [0.5] * 6, 32)
        inference.save_model(made, tmp_path / "model.pth")
        loaded = inference.load_model(tmp_path / "model.pth", "cpu", "fp32")
        again, before = inference.predict(loaded, images), inference.predict(made, images)
        np.testing.assert_allclose(again, before, rtol=0, atol=1e-6)


LAYERS = {"resnet50": "layer3,layer4,head", "densenet121": "features.denseblock4,head",
          "mobilenet_v2": "features.18,head", "efficientnet_b0": "features.8,head", "vgg16": "features.28,classifier"}


@pytest.mark.parametrize("backbone", LAYERS)
def test_layers_have_the_names_that_users_of_the_backbone_expect(backbone):
    with torch.device("meta"):
        network = inference.build_model(backbone, "mlp", 6)
    chosen = train.select_parameters(network, backbone, LAYERS[backbone])
    assert any(name.startswith(inference.BACKBONES[backbone]) for name in chosen)
    assert 4 <= len(chosen) < sum(1 for _ in network.parameters())
    assert len(train.select_parameters(network, backbone, "head")) == 6


def test_the_command_exits_with_2_and_one_line():
    result = subprocess.run([sys.executable, ROOT / "train.py", "--data", "/nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: /nowhere is not a folder: --data names the folder of labels and images\n"


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_options(["--help"])
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: 0)" in text
    assert "(default: 224)" in text and "(default: resnet18)" in text and "imbalance:" in text


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and drawn


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_updates_in_place_on_a_terminal_only(monkeypatch, capsys):
    options = train.parse_options(["--epochs", "2"])
    row = {"epoch": 1, "train_loss": 0.5, "seconds": 1.0, "images_per_second": 10.0}
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        progress = train.Progress(options, 3)
        for step in (1, 2, 3):
            progress(1, step, 3, torch.tensor(0.25), 5)
        progress.end_epoch(row, True)
    assert "\repoch" in terminal.text.replace("\033[K", "") and "batch 3/3  loss 0.2500" in terminal.text
    assert "images/s" in terminal.text and "left" in terminal.text and terminal.text.count("\n") == 1
    progress = train.Progress(options, 3)
    progress(1, 1, 3, torch.tensor(0.25), 5)
    progress.end_epoch(row, True)
    assert capsys.readouterr().out == "epoch 1/2  loss 0.5000  10 images/s  1.0 s  best\n"
