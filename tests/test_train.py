"""Loss, schedule, layers, thresholds, presets, options, and the files of a run."""

import contextlib
import copy
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dataset
import inference
import metrics
import train
from conftest import (
    BACKBONES,
    ROOT,
    SMALL,
    as_command,
    classifier_of,
    files_of,
    head_of,
    label_cells,
    read_json,
    read_rows,
    refused,
    tensors,
)
from dataset import InputError

pytestmark = pytest.mark.usefixtures("blank_pictures")

LOUD = [option for option in SMALL if option != "-q"]


def run(*arguments):
    """Train with small settings, and return the report."""
    return train.main([*SMALL, *map(str, arguments)])


def changed_layers(before, after):
    """Return the names of the layers (up to the first dot) in which two networks differ."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


@contextlib.contextmanager
def watched_rates():
    """Collect the rates (backbone, head) of every step of an optimiser within the block."""
    rates = []

    def before_step(optimizer, *_):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield rates
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------------------------
# Loss


LABELS = st.sampled_from([0.0, 1.0, np.nan])


def element_loss(name, x, y, weight):
    """Return the loss of one logit x with the known label y, by the formula."""
    p = 1 / (1 + math.exp(-x))
    if name == "bce":
        return -(weight * y * math.log(p) + (1 - y) * math.log1p(-p))
    shifted = max(p - 0.05, 0)
    return -(weight * y * math.log(p) + (1 - y) * shifted**4 * math.log1p(-shifted))


@pytest.mark.parametrize("name", train.LOSSES)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_masked_loss_is_that_of_the_known_elements_one_by_one(name, data):
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    targets = data.draw(arrays(np.float32, shape, elements=LABELS))
    logits = data.draw(arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)))
    weight = data.draw(arrays(np.float32, shape[1], elements=st.floats(0.5, 20, width=32)))
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    total, known = train.LOSSES[name](logits, torch.tensor(targets), torch.tensor(weight))
    expected = 0.0
    for i, j in np.argwhere(~np.isnan(targets)):
        expected += element_loss(name, logits[i, j].item(), targets[i, j], weight[j])
    assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert known.item() == (~np.isnan(targets)).sum()
    total.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[torch.isnan(torch.tensor(targets))] == 0).all()


class Outputs(torch.nn.Module):
    """A network whose logits are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits * 1.0


def step_run(network, pos_weight, loss="bce", sam=0.0, trained=0):
    """Return what train_step() needs of a run: 4 epochs, of which some are trained, and a learning rate of 1."""
    return SimpleNamespace(
        options=SimpleNamespace(loss=loss, sam=sam, epochs=4), state=SimpleNamespace(epoch=trained), model=network,
        signal=0, classifier=SimpleNamespace(precision=torch.float32), pos_weight=torch.tensor(pos_weight),
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0), scaler=torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("loss", train.LOSSES)
@pytest.mark.parametrize("mix", dataset.MIXES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_mixed_images_mix_their_losses_and_unknown_labels_give_no_gradient(mix, loss, data):
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    targets = data.draw(arrays(np.float32, shape, elements=LABELS))
    logits = data.draw(arrays(np.float32, shape, elements=st.floats(-4, 4, width=32)))
    images, share = dataset.mix(torch.zeros(len(targets), 3, 8, 8), mix, np.random.default_rng(shape[0]))

    network = Outputs(logits)
    run = step_run(network, [2.0] * shape[1], loss=loss)
    shown = train.train_step(run, images, torch.tensor(targets), share)
    gradient = network.logits.grad.numpy()
    before = np.roll(targets, 1, axis=0)
    assert np.isfinite(gradient).all()
    assert (gradient[np.isnan(targets) & np.isnan(before)] == 0).all()

    # The loss and its slope, element by element
    expected, slope = 0.0, np.zeros(shape)
    for labels, part in ((targets, share), (before, 1 - share)):
        for i, j in np.argwhere(~np.isnan(labels)):
            x, y = float(logits[i, j]), labels[i, j]
            expected += part * element_loss(loss, x, y, 2.0)
            rise = element_loss(loss, x + 1e-4, y, 2.0) - element_loss(loss, x - 1e-4, y, 2.0)
            slope[i, j] += part * rise / 2e-4

    known = max(1, (~np.isnan(targets)).sum())
    assert shown.item() == pytest.approx(expected / known, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(gradient, slope / known, rtol=1e-2, atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sam_takes_the_gradient_where_the_loss_rises_most_in_the_second_half(data):
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    targets = data.draw(arrays(np.float32, shape, elements=LABELS))
    logits = data.draw(arrays(np.float32, shape, elements=st.floats(-4, 4, width=32)))
    radius = data.draw(st.floats(0.01, 2))
    trained = data.draw(st.integers(1, 2))
    network = Outputs(logits)
    images = torch.zeros(shape[0], 3, 2, 2)
    run = step_run(network, [3.0] * shape[1], sam=radius, trained=trained)
    train.train_step(run, images, torch.tensor(targets), 1.0)
    known = ~np.isnan(targets)

    def gradient(x):
        p = 1 / (1 + np.exp(-x.astype(float)))
        return np.where(known, np.where(targets == 1, 3 * (p - 1), p), 0.0) / max(1, known.sum())

    slope = gradient(logits)
    there = logits + (trained == 2) * radius * slope / max(np.linalg.norm(slope), 1e-12)
    np.testing.assert_allclose(network.logits.detach().numpy(), logits - gradient(there), rtol=1e-4, atol=1e-5)


def test_sam_counts_a_batch_once_in_the_statistics():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), torch.nn.BatchNorm1d(3))
    alone = copy.deepcopy(network)
    images = torch.rand(8, 3, 2, 2)
    train.train_step(step_run(network, [3.0] * 3, sam=0.5, trained=2), images, torch.ones(8, 3), 1.0)
    alone(images)
    for name, value in alone[2].named_buffers():
        torch.testing.assert_close(network[2].get_buffer(name), value)
    assert not torch.equal(network[1].weight, alone[1].weight)


@pytest.mark.parametrize(("backbone", "layers", "once"), [
    ("resnet18", "layer3,layer4,head", ["conv1", "layer1", "layer2"]),
    ("resnet18", "layer1,head", ["conv1"]),  # what comes after layer1 changes with its weights
    ("resnet18", "layer2.0.downsample,layer3,head", ["conv1", "layer1", "layer2.0.conv2"]),  # the block adds in place
    ("efficientnet_b0", "features.1.0.block.0.1,features.8,head", ["features.0"]),  # its SiLU works in place
    ("vit_b_32", "encoder.layers.encoder_layer_0.mlp,head", ["conv_proj"]),  # calls its attention with keywords
])
def test_frozen_first_layers_compute_once_in_a_step_with_sam(monkeypatch, backbone, layers, once):
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([[1.0, 0.0], [0.0, torch.nan], [1.0, 1.0], [0.0, 0.0]])
    torch.manual_seed(0)
    network = inference.build_model(backbone, "linear", 2, size=32)
    for name, weight in network.named_parameters():
        weight.requires_grad_(name in train.select_parameters(network, layers))
    networks = network, copy.deepcopy(network)
    first = [next(layer for layer in network.get_submodule(name).modules() if isinstance(layer, torch.nn.Conv2d))
             for name in once]
    calls, convolve = Counter(), torch.nn.Conv2d._conv_forward
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward",
                        lambda layer, *rest: calls.update([layer]) or convolve(layer, *rest))

    for step in range(2):  # the second batch is not mistaken for the first
        for model in networks:
            with monkeypatch.context() as patch:
                if model is not network:
                    patch.setattr(train, "frozen_layers", lambda _: [])
                train.train_mode(model)
                torch.manual_seed(step)  # EfficientNet drops blocks at random
                train.train_step(step_run(model, [1.0, 1.0], sam=0.5, trained=2), images + step, targets, 1.0)
        assert [calls[layer] for layer in first] == [step + 1] * len(first)
    for weight, other in zip(*(model.state_dict().values() for model in networks)):
        assert torch.equal(weight, other)


@pytest.mark.parametrize(("given", "radius"), {
    "": 0.1, "--folds 3": 0.1, "--demo --weights some.pth": 0.1, "--demo": 0, "--weights none": 0, "--preset coco": 0,
    "--weights none --sam 0.2": 0.2, "--preset coco --sam 0.2": 0.2}.items())
def test_sam_is_for_pretrained_layers(given, radius):
    assert train.parse_options(given.split()).sam == radius


@pytest.mark.parametrize("overflows", [(0,), (1,), (0, 1)])
def test_a_step_with_sam_that_overflows_is_left_out(overflows):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), torch.nn.BatchNorm1d(3))
    passes = itertools.count()
    network[1].weight.register_hook(lambda slope: slope * math.inf if next(passes) in overflows else slope)
    before = network[1].weight.detach().clone()
    run = step_run(network, [3.0] * 3, sam=0.5, trained=2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train.train_step(run, torch.rand(8, 3, 2, 2), torch.ones(8, 3), 1.0)
    assert torch.equal(network[1].weight, before)
    assert network[2].running_mean.isfinite().all()
    assert run.scaler.get_scale() == 4.0


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=LABELS))
def test_sampling_weights_are_those_of_the_rarest_known_positive(targets):
    weights = train.sampling_weights(targets)
    for row, weight in zip(targets, weights):
        expected = 1.0
        for j, label in enumerate(row):
            if label == 1:
                column = targets[:, j]
                expected = max(expected, sum(column >= 0) / sum(column == 1))
        assert weight == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=LABELS))
def test_the_shift_of_sampling_is_that_of_the_odds_in_what_is_drawn(targets):
    weights = train.sampling_weights(targets)
    for j, shift in enumerate(train.sampling_shift(targets)):
        present, absent = targets[:, j] == 1, targets[:, j] == 0
        if present.any() and absent.any():
            drawn = weights[present].sum() / weights[absent].sum()
            assert shift == pytest.approx(math.log(drawn / (present.sum() / absent.sum())))
        else:
            assert shift == 0


def test_the_balanced_sampler_draws_rare_labels_as_often_and_unknown_ones_no_more():
    nan = np.nan
    targets = np.zeros((1000, 2), np.float32)
    targets[:20, 0] = 1
    targets[20:40, 0] = nan
    table = dataset.LabelTable([str(i) for i in range(1000)], [""] * 1000, targets, ["rare", "never"])
    options = train.parse_options(["--sampler", "balanced", "--seed", "3"])
    run = SimpleNamespace(options=options, tables={"train": table}, state=train.State())

    def rows(epoch, images=0):
        run.state = train.State(epoch=epoch, images=images)
        return np.concatenate([own for own, *_ in train.draw_batches(run)])

    drawn = np.concatenate([rows(epoch) for epoch in range(20)])
    assert len(drawn) == 20_000
    share = np.bincount(drawn, minlength=1000) / len(drawn)
    assert share[:20].sum() == pytest.approx(980 / (980 + 980), abs=0.02)  # a positive weighs 980 / 20
    assert share[20:40].mean() == pytest.approx(share[40:].mean(), rel=0.3)
    assert np.array_equal(rows(5), rows(5)) and not np.array_equal(rows(5), rows(6))
    assert np.array_equal(rows(5, images=320), rows(5)[320:])


@pytest.mark.parametrize("options", [["--mix", "mixup"], ["--mix", "cutmix", "--loss", "asymmetric"],
                                     ["--sampler", "balanced", "--mix", "cutmix"]])
def test_the_options_of_the_recipe_train_on_unknown_labels(demo, tmp_path, options):
    report = run("--data", demo, "--out", tmp_path, "--epochs", "2", *options)
    assert math.isfinite(report["loss"])
    for row in read_rows(tmp_path / "history.csv"):
        assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["val_loss"]))


def test_pos_weight():
    nan = np.nan
    targets = np.array([[1, 1, 0, nan, 1], [0, 1, 0, nan, nan], [0, 0, 0, nan, nan],
                        [0, nan, nan, nan, nan]])
    assert train.compute_pos_weight(targets, "none").tolist() == [1] * 5
    assert train.compute_pos_weight(targets, "linear", (0.1, 20)).tolist() == [3, 0.5, 1, 1, 1]
    np.testing.assert_allclose(train.compute_pos_weight(targets, "sqrt", (1, 20)), [3**0.5, 1, 1, 1, 1],
                               rtol=1e-6)
    assert train.compute_pos_weight(targets, "linear", (1, 2)).tolist() == [2, 1, 1, 1, 1]
    rare = np.zeros((1000, 1))
    rare[0] = 1
    assert train.compute_pos_weight(rare, "linear", None).tolist() == [999]
    assert train.compute_pos_weight(1 - rare, "linear", None).tolist() == [pytest.approx(1 / 999)]


# ----------------------------------------------------------------------------------------------------------
# Schedule and stopping


def test_the_rate_is_a_function_of_options_and_progress():
    options = ["--schedule", "cosine", "--epochs", "10"]
    progress = [0.5, 1.0, 2.0, 5.0, 7.5, 9.0, 10.0]
    small = [train.rate_factor(train.parse_options([*options, "-b", "2"]), value) for value in progress]
    large = [train.rate_factor(train.parse_options([*options, "-b", "64"]), value) for value in progress]
    assert small == large
    assert small[1:] == sorted(small[1:], reverse=True)
    assert small[0] < small[1] <= 1.0
    assert small[3] == pytest.approx(0.5, abs=0.06)
    assert small[-1] == pytest.approx(0.0, abs=1e-6)
    multistep = train.parse_options(["--schedule", "multistep", "--epochs", "8", "--lr-decay", "0.1"])
    train.set_epochs(multistep, 100)
    factors = [train.rate_factor(multistep, value) for value in (0.5, 3.5, 4.5, 5.5, 6.5, 7.5)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    constant = train.parse_options(["--schedule", "constant", "--epochs", "8"])
    assert {train.rate_factor(constant, value) for value in (0.1, 1.0, 8.0)} == {1.0}


def test_one_step_in_all_trains_something(few_images, tmp_path):
    start = inference.build_model("resnet18", "linear", 2)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    with watched_rates() as rates:
        run("--data", few_images, "--out", tmp_path / "out", "--weights", tmp_path / "start.pth", "--epochs", 1,
            "-b", 64, "--lr", 1e-3, "--train-layers", "all", "--wd", 0)
    assert rates == [pytest.approx((5e-4, 5e-4))]
    changed = changed_layers(start.state_dict(), tensors(tmp_path / "out" / "last.pth"))
    assert {"conv1", "layer4", "fc"} <= changed


@pytest.mark.parametrize("epochs, size", [(1, 8), (3, 64), (3, 4)])
def test_no_step_of_the_cosine_has_rate_0_and_their_mean_is_that_of_the_curve(few_images, tmp_path, epochs, size):
    with watched_rates() as rates:
        run("--data", few_images, "--out", tmp_path / "out", "--epochs", epochs, "-b", size, "--lr", 1e-3)
    head = [pair[1] / 1e-3 for pair in rates]
    assert min(head) > 0 and max(head) <= 1
    options = train.parse_options(["--epochs", str(epochs)])
    edges = np.linspace(0, epochs, len(head) + 1)
    fine = [np.mean([train.rate_factor(options, value) for value in np.linspace(*edge, 1001)])
            for edge in itertools.pairwise(edges)]
    assert np.mean(head) == pytest.approx(np.mean(fine), abs=0.08)


@pytest.mark.parametrize("epochs", ["1", "2", "3"])
def test_the_first_steps_of_multistep_have_the_whole_rate(epochs):
    options = train.parse_options(["--schedule", "multistep", "--epochs", epochs])
    train.set_epochs(options, 100)
    assert train.rate_factor(options, 0.01) == 1.0
    assert train.rate_factor(options, 0.4) == 1.0


@pytest.mark.parametrize("preset", [[], ["--preset", "coco"]])
def test_multistep_of_one_epoch_begins_at_the_rate_asked_for(few_images, tmp_path, preset):
    with watched_rates() as rates:
        run("--data", few_images, "--out", tmp_path / "out", *preset, "--schedule", "multistep",
            "--epochs", 1, "--lr", 1e-3, "-b", 4)
    head = [pair[1] for pair in rates]
    assert head[0] == pytest.approx(1e-3)
    assert head == sorted(head, reverse=True)


def test_batches_without_a_known_label_do_not_shift_the_schedule(make_rows, tmp_path):
    data = make_rows(["1 0", *["NA NA"] * 4, "0 1", *["NA NA"] * 4] * 4)
    with watched_rates() as rates:
        run("--data", data, "--out", tmp_path / "out", "-b", 2, "--epochs", 3, "--split", 0.5, 0.25, 0.25,
            "--schedule", "multistep", "--milestones", 1, "--lr-decay", 0.1, "--lr", 1e-3)
    steps = [int(row["steps"]) for row in read_rows(tmp_path / "out" / "history.csv")]
    assert all(0 < count < 10 for count in steps)  # of ten batches those with a known label
    head = [pair[1] for pair in rates]
    assert head == pytest.approx([1e-3] * steps[0] + [1e-4] * (steps[1] + steps[2]))


def test_the_best_epoch_follows_from_the_history_and_the_monitor():
    history = [
        {"epoch": 1, "train_loss": 0.9, "val_loss": 0.50, "val_map": 0.2, "val_f1_weighted": 0.3},
        {"epoch": 2, "train_loss": 0.8, "val_loss": 0.70, "val_map": 0.6, "val_f1_weighted": 0.3},
        {"epoch": 3, "train_loss": 0.7},
        {"epoch": 4, "train_loss": 0.6, "val_loss": 0.45, "val_map": 0.4, "val_f1_weighted": 0.31},
    ]

    assert train.best_epoch([], "loss") == (0, 0)
    assert train.best_epoch(history[:3], "loss") == (1, 1)
    assert train.best_epoch(history, "loss") == (4, 0)
    assert train.best_epoch(history, "loss", 0.1) == (1, 2)
    assert train.best_epoch(history, "map") == (2, 1)
    assert train.best_epoch(history, "f1") == (4, 0)
    assert train.best_epoch(history, "f1", 0.1) == (1, 2)

    losses = [{"epoch": i, "val_loss": loss} for i, loss in enumerate((math.nan, 3.0, math.nan), 1)]
    assert [train.best_epoch(losses[:i], "loss") for i in (1, 2, 3)] == [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("patience, epochs", [(2, 3), (0, 5)])
def test_a_run_stops_when_patience_is_at_its_end(few_images, tmp_path, patience, epochs):
    report = run("--data", few_images, "--out", tmp_path / "out", "--train-layers", "head", "--lr", 0,
                 "--wd", 0, "--patience", patience, "--monitor", "map", "--epochs", 5)
    assert len(read_rows(tmp_path / "out" / "history.csv")) == epochs
    assert report["epoch"] == 1


# ----------------------------------------------------------------------------------------------------------
# Layers


def test_frozen_layers_stay_as_they_are_batchnorm_statistics_too(demo, trained, tmp_path):
    source = trained[0] / "model.pth"
    run("--data", demo, "--out", tmp_path, "--weights", source, "--train-layers", "layer4,head",
        "--epochs", 1)
    assert changed_layers(tensors(source), tensors(tmp_path / "last.pth")) == {"layer4", "fc"}


def test_a_layer_with_as_many_tensors_as_the_head_is_trained_alone(demo, trained, tmp_path):
    source = trained[0] / "model.pth"
    run("--data", demo, "--out", tmp_path, "--weights", source, "--epochs", 1, "--train-layers", "bn1",
        "--augment", "none")
    after = tensors(tmp_path / "last.pth")
    assert changed_layers(tensors(source), after) == {"bn1"}
    assert not torch.equal(after["bn1.weight"], tensors(source)["bn1.weight"])


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "efficientnet_b0"])
def test_the_dropout_of_a_frozen_backbone_is_off_and_that_of_the_head_is_on(few_images, tmp_path, backbone):
    active = set()

    def before_forward(module, _):
        if module.training and isinstance(getattr(module, "p", None), float):
            active.add((type(module).__name__, module.p))

    hook = register_module_forward_pre_hook(before_forward)
    try:
        run("--data", few_images, "--out", tmp_path / "out", "--backbone", backbone, "--head", "mlp",
            "--dropout", 0.37, 0.41, "--train-layers", "head", "--augment", "flip", "--epochs", 1)
    finally:
        hook.remove()
    assert active == {("Dropout", 0.37), ("Dropout", 0.41)}


LAYERS = {"resnet18": ["conv1", "layer3", "layer4"], "resnet50": ["layer3", "layer4"],
          "densenet121": ["features.denseblock4"], "mobilenet_v2": ["features.18"],
          "efficientnet_b0": ["features.8"], "vgg16": ["features.28"]}


@pytest.mark.parametrize("backbone", LAYERS)
@pytest.mark.parametrize("option", ["--train-layers", "--unfreeze"])
def test_a_wrong_layer_is_named_with_those_that_there_are(few_images, tmp_path, backbone, option):
    options = ["--data", str(few_images), "--out", str(tmp_path / "out"), "--backbone", backbone, *SMALL]
    message = "has no layer layer9; it has all, head, "
    with torch.device("meta"), pytest.raises(InputError, match=message) as error:
        train.main([*options, option, "head,layer9"])
    names = str(error.value).split(", ")
    assert set(LAYERS[backbone]) <= set(names)
    assert not (tmp_path / "out").exists()


def test_late_layers_are_those_after_the_first_percents_of_the_weights(real_networks):
    for backbone in BACKBONES:
        frozen = set()
        for head, classes in (("linear", 3), ("linear", 1000), ("mlp", 80)):
            with inference.WithoutValues():
                network = inference.build_model(backbone, head, classes)

            name = inference.head_name(network)
            late = train.select_parameters(network, "late")
            sizes = {key: weight.numel() for key, weight in network.named_parameters()}
            assert {key for key in sizes if key.startswith(f"{name}.")} <= late
            early = [key for key in sizes if key not in late]
            assert early == list(sizes)[:len(early)]  # they come first
            assert 0.01 < sum(sizes[key] for key in early) / sum(sizes.values()) < 0.07
            frozen.add(tuple(early))

        assert len(frozen) == 1  # whatever the head
        if backbone.startswith("resnet"):
            assert {key.split(".")[0] for key in late} == {"layer3", "layer4", "fc"}


def test_the_recipe_trains_what_is_new_and_then_the_late_layers(trained, demo, tmp_path):
    source = {name: tensor for name, tensor in tensors(trained[0] / "model.pth").items() if "layer4" not in name}
    torch.save(source, tmp_path / "weights.pth")
    options = ["--data", demo, "--out", tmp_path / "out", "--weights", tmp_path / "weights.pth", "--unfreeze-epoch", 2]
    run(*options, "--epochs", 1)
    first = tensors(tmp_path / "out" / "last.pth")
    before = {name: source.get(name, torch.zeros(())) for name in first}
    assert changed_layers(before, first) == {"layer4", "fc"}
    run(*options, "--epochs", 2, "--resume")
    late = train.select_parameters(inference.build_model("resnet18", "linear", 6), "late")
    after = tensors(tmp_path / "out" / "last.pth")
    assert changed_layers(first, after) == {name.split(".")[0] for name in late}
    assert torch.equal(after["conv1.weight"], source["conv1.weight"])


def test_layers_that_are_given_are_all_that_is_trained():
    def layers(*argv):
        options = train.parse_options(argv)
        train.set_epochs(options, 300)
        return options.train_layers, options.unfreeze, options.unfreeze_epoch

    assert layers() == ("new", "late", 6)
    assert layers("--epochs", "3") == ("new", "late", 1)
    assert layers("--weights", "none") == layers("--train-layers", "all") == ("all", None, 6)
    assert layers("--train-layers", "layer4,head") == ("layer4,head", None, 6)
    assert layers("--train-layers", "new", "--unfreeze", "layer4") == ("new", "layer4", 6)


@pytest.mark.parametrize(("given", "count", "epochs"), [
    ("", 1, 20), ("", 300, 20), ("", 400, 15), ("", 780, 8), ("", 1200, 5), ("", 10**6, 5), ("--epochs 7", 780, 7),
    ("--weights none", 780, 20), ("--patience 10", 780, 20), ("--preset coco", 780, 20),
    ("--preset resnet50", 780, 40), ("--demo", 700, 16)])
def test_more_images_take_fewer_epochs_unless_an_option_says_how_many(given, count, epochs):
    options = train.parse_options(given.split())
    train.set_epochs(options, count)
    assert (options.epochs, options.milestones) == (epochs, [epochs // 2, epochs * 3 // 4])


@pytest.mark.parametrize(("more", "images"), [([], 18), (["--folds", "3"], 16)])
def test_the_images_that_a_network_trains_on_decide_the_epochs(few_images, monkeypatch, more, images):
    monkeypatch.setattr(train, "IMAGES_TO_SEE", 150)
    options = train.parse_options(["--data", str(few_images), "--split", "3", "1", "0", *more])
    train.read_data(options)
    assert options.epochs == round(150 / images)


def test_patience_needs_a_score_that_waits():
    def stopping(*argv):
        options = train.parse_options(argv)
        return options.monitor, options.patience

    assert stopping() == stopping("--folds", "3") == stopping("--demo") == ("last", 0)
    assert stopping("--patience", "3") == ("map", 3)
    assert stopping("--monitor", "f1") == ("f1", 0)
    assert stopping("--preset", "coco") == ("f1", 10)
    assert stopping("--preset", "coco", "--folds", "3") == ("last", 0)
    for argv in (["--monitor", "last", "--patience", "3"], ["--folds", "3", "--patience", "3"]):
        with pytest.raises(InputError, match="--patience waits for a better epoch"):
            train.parse_options(argv)


def test_positives_are_lifted_once():
    weights = {argv: train.parse_options(argv.split()).pos_weight for argv in (
        "", "--sampler balanced", "--loss asymmetric", "--sampler balanced --pos-weight sqrt", "--preset coco")}
    assert list(weights.values()) == ["sqrt", "none", "none", "sqrt", "linear"]


def test_what_the_asymmetric_loss_learns_is_nearly_taken_back():
    frequency = torch.tensor([0.03, 0.1, 0.3, 0.5])
    logits = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    odds = frequency / (1 - frequency)  # as weights of the positives, they stand for this many of them per negative
    for _ in range(300):
        loss = sum(train.masked_asymmetric(logits, torch.full((1, 4), label), odds)[0] for label in (1.0, 0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    learned = torch.sigmoid(logits)
    back = torch.sigmoid(train.ASYMMETRIC_SCALE * logits + train.ASYMMETRIC_OFFSET)
    assert (learned > frequency + 0.1).all()
    assert back.tolist()[0] == pytest.approx(frequency.tolist(), abs=0.04)


# ----------------------------------------------------------------------------------------------------------
# A run, and its files


FILES = {"model.pth", "last.pth", "classes.json", "label_groups.json", "thresholds.json", "predictions.csv",
         "train_metadata.csv", "val_metadata.csv", "test_metadata.csv", "loss_curve.png", "history.csv",
         "metrics.json", "config.json", "images.npz", "pr_curves.png", "predictions.png", "probabilities.csv",
         "reliability.png"}


def test_a_run_leaves_every_file_and_returns_its_report(trained):
    out, report = trained
    assert {path.name for path in out.iterdir()} == FILES
    written = read_json(out / "metrics.json")
    assert written["split"] == "test"
    assert written["images"] == report["images"] == len(read_rows(out / "test_metadata.csv"))
    assert {"loss", *metrics.HEADLINES} < written.keys()
    assert written["f1_macro"] == report["f1_macro"]
    history = read_rows(out / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[0]["images_per_second"]) > 0
    assert Image.open(out / "loss_curve.png").size == (900, 840)
    for name in ("pr_curves.png", "predictions.png", "reliability.png"):
        assert min(Image.open(out / name).size) > 100
    assert read_json(out / "config.json")["epochs"] == 2


def test_predictions_are_labels_and_pairs_of_label_and_confidence(trained):
    out, _ = trained
    rows = read_rows(out / "predictions.csv")
    assert list(rows[0]) == [
        "ID", "parts", "defects", "parts_confidence", "defects_confidence", "avg_part_confidence",
        "avg_defect_confidence", "overall_avg_confidence",
    ]

    thresholds = read_json(out / "thresholds.json")
    assert [row["ID"] for row in rows] == [row["ID"] for row in read_rows(out / "test_metadata.csv")]

    for row in rows:
        everything = []
        for group, mean in (("parts", "avg_part_confidence"), ("defects", "avg_defect_confidence")):
            pairs = [pair.rpartition(":") for pair in row[f"{group}_confidence"].split(";") if pair]
            confidences = [float(confidence) for _, _, confidence in pairs]
            assert ";".join(label for label, _, _ in pairs) == row[group]
            assert confidences == sorted(confidences, reverse=True)
            assert all(float(confidence) >= thresholds[label] - 1e-4 for label, _, confidence in pairs)
            if pairs:
                assert float(row[mean]) == pytest.approx(np.mean(confidences), abs=1e-4)
            else:
                assert row[mean] == ""
            everything += confidences
        if everything:
            assert float(row["overall_avg_confidence"]) == pytest.approx(np.mean(everything), abs=1e-4)


def test_classes_are_a_list_and_groups_what_label_groups_reads(trained, demo, tmp_path):
    out, report = trained
    classes = read_json(out / "classes.json")
    assert classes == dataset.read_labels(demo).classes
    assert list(report["per_class"]) == list(read_json(out / "thresholds.json")) == classes
    assert inference.read_checkpoint(out / "model.pth")["classes"] == classes
    groups = read_json(out / "label_groups.json")
    assert list(groups) == ["parts", "defects"]
    (tmp_path / "images").symlink_to(demo / "images")
    shutil.copy(demo / "labels.txt", tmp_path)
    again = dataset.read_labels(tmp_path, label_groups=out / "label_groups.json")
    assert (again.classes, again.groups) == (classes, groups)


def test_without_groups_there_is_no_file_of_groups(few_images, tmp_path):
    run("--data", few_images, "--out", tmp_path / "out", "--epochs", 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"label_groups.json"}
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    assert list(rows[0]) == ["ID", "labels", "labels_confidence", "avg_confidence"]


def test_the_report_has_the_scores_of_the_best_epoch_on_val(trained):
    out, report = trained
    best = read_rows(out / "history.csv")[report["epoch"] - 1]
    written = read_json(out / "metrics.json")
    for name in ("loss", *metrics.HEADLINES):
        assert written[f"val_{name}"] == pytest.approx(float(best[f"val_{name}"]), nan_ok=True), name
    text = metrics.main([str(out), "--sort", "val_loss", "--ascending"])
    assert "val_loss" in text and f"{written['val_loss']:.3f}" in text


def test_metadata_files_are_label_files_of_disjoint_splits(trained, demo):
    out, _ = trained
    whole = dataset.read_labels(demo)
    seen = []
    for split in ("train", "val", "test"):
        table = dataset.read_labels(demo, labels=out / f"{split}_metadata.csv")
        rows = [whole.ids.index(name) for name in table.ids]
        np.testing.assert_array_equal(table.targets, whole.targets[rows])
        seen += rows
    assert sorted(seen) == list(range(80))


def test_the_folder_of_a_run_is_data_that_is_already_divided(trained, demo, tmp_path):
    out, report = trained
    again = run("--data", out, "--images", demo / "images", "--out", tmp_path, "--epochs", 2)
    assert (again["split"], again["images"]) == (report["split"], report["images"])
    for split in ("train", "val", "test"):
        assert read_rows(tmp_path / f"{split}_metadata.csv") == read_rows(out / f"{split}_metadata.csv")


def test_reported_scores_are_those_of_the_saved_model(trained, demo):
    out, report = trained
    table = dataset.read_labels(demo, labels=out / "test_metadata.csv")
    again = inference.evaluate(inference.load_model(out / "model.pth", "cpu", "fp32"), table)
    assert again["per_class"] == report["per_class"]
    assert again["f1_samples"] == report["f1_samples"]


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others(demo, trained, tmp_path):
    again = run("--data", demo, "--out", tmp_path / "a", "--epochs", 2)
    other = run("--data", demo, "--out", tmp_path / "b", "--epochs", 2, "--seed", 1)
    assert again == trained[1]
    assert other["loss"] != again["loss"]


def test_no_test_split_reports_on_val(demo, tmp_path):
    report = run("--data", demo, "--out", tmp_path, "--epochs", 1, "--split", 0.8, 0.2, 0)
    assert report["split"] == "val"
    assert report["images"] == len(read_rows(tmp_path / "val_metadata.csv")) > 10
    assert not (tmp_path / "test_metadata.csv").exists()


def test_freezing_unfreezing_and_rates(demo, tmp_path):
    run("--data", demo, "--out", tmp_path, "--epochs", 3, "--train-layers", "head", "--unfreeze", "layer4",
        "--unfreeze-epoch", 2, "--lr-backbone", 1e-4, "--schedule", "multistep", "--milestones", 2,
        "--val-every", 2, "--wd", 0, "--monitor", "loss", "--lr", 1e-3)
    history = read_rows(tmp_path / "history.csv")
    assert [float(row["lr"]) for row in history] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert [float(row["lr_backbone"]) for row in history] == pytest.approx([1e-4, 1e-4, 1e-5])
    assert [bool(row["val_loss"]) for row in history] == [False, True, True]


def test_metrics_on_train_come_in_the_epochs_asked_for(demo, tmp_path):
    run("--data", demo, "--out", tmp_path, "--epochs", 4, "--val-every", 3, "--train-metrics-every", 2)
    history = read_rows(tmp_path / "history.csv")
    assert [bool(row["val_map"]) for row in history] == [False, False, True, True]
    for name in ("train_f1_macro", "train_f1_weighted", "train_map"):
        assert [bool(row[name]) for row in history] == [False, True, False, True]


def test_json_predictions_of_images_of_one_name_in_two_folders_are_kept_apart(make_data, tmp_path):
    names = [f"{folder}/{i:02}.png" for folder in ("x", "y") for i in range(12)]
    rows = [f"{name} {i % 2} {i // 2 % 2}\n" for i, name in enumerate(names)]
    data = make_data("".join(["image red tall\n", *rows]), names)
    run("--data", data, "--out", tmp_path / "out", "--thresholds", "global", "--split", 0.4, 0.2, 0.4,
        "--epochs", 1)
    ids = [row["ID"] for row in read_rows(tmp_path / "out" / "predictions.csv")]
    stems = [Path(name).stem for name in ids]
    assert len(set(stems)) < len(ids)
    (written,) = (tmp_path / "out").glob("predictions*.json")
    assert list(read_json(written)) == [stem if stems.count(stem) == 1 else name.removesuffix(".png")
                                        for name, stem in zip(ids, stems)]


def test_exported_splits_are_those_of_the_run_and_never_mixed_with_others(few_images, tmp_path):
    folder = tmp_path / "export"
    options = ["--data", few_images, "--export-splits", folder, "--epochs", 1]
    run(*options, "--out", tmp_path / "first")
    with pytest.raises(InputError, match="export"):
        run(*options, "--out", tmp_path / "second", "--seed", 1)
    for split in ("train", "val", "test"):
        exported = sorted(path.name for path in (folder / "images" / split).iterdir())
        rows = read_rows(tmp_path / "first" / f"{split}_metadata.csv")
        assert exported == sorted(row["ID"] for row in rows)
    assert not (tmp_path / "second" / "model.pth").exists()


def test_tensorboard_is_optional(few_images, tmp_path, monkeypatch):
    options = ["--data", few_images, "--out", tmp_path / "out", "--tensorboard", "--epochs", 2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        run(*options)
    scalars = []

    class Writer:
        def __init__(self, folder):
            assert Path(folder) == tmp_path / "out" / "tensorboard"

        def add_scalar(self, name, value, step):
            scalars.append((name, step, float(value)))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(*options)
    losses = inference.read_checkpoint(tmp_path / "out" / "last.pth")["state"]["losses"]
    assert [row[1:] for row in scalars if "iteration" in row[0]] == list(enumerate(losses, 1))
    assert {row[1] for row in scalars if row[0] == "epoch/val_map"} == {1, 2}


# ----------------------------------------------------------------------------------------------------------
# Thresholds


def predict_val(data, out):
    """Return targets, probabilities and thresholds of a run's val split, computed anew from its files."""
    classifier = inference.load_model(out / "model.pth", "cpu", "fp32")
    table = dataset.read_labels(data, labels=out / "val_metadata.csv", images=data / "images")
    probabilities, errors = inference.predict_all(classifier, table.paths, workers=0)
    assert errors == {}
    return table.targets, probabilities, np.array(classifier.thresholds, float)


@pytest.mark.parametrize("chosen", [[], ["--max-threshold", "1"], ["--thresholds", "grid"]])
def test_no_threshold_lies_on_a_score_and_the_decisions_are_the_best(demo, tmp_path, chosen):
    run("--data", demo, "--out", tmp_path, "--epochs", 2, "--lr", 1e-3, *chosen)
    targets, probabilities, thresholds = predict_val(demo, tmp_path)
    assert np.abs(probabilities - thresholds).min() > 1e-6
    options = train.parse_options(chosen)
    best = metrics.find_thresholds(targets, probabilities, options.thresholds, options.max_threshold)
    np.testing.assert_array_equal(probabilities >= thresholds, probabilities >= best)
    assert list(read_json(tmp_path / "thresholds.json").values()) == pytest.approx(thresholds.tolist())


def test_a_number_is_the_threshold_of_all_classes(demo, tmp_path):
    report = run("--data", demo, "--out", tmp_path, "--epochs", 1, "--thresholds", 0.9)
    assert set(read_json(tmp_path / "thresholds.json").values()) == {0.9}
    assert {row["threshold"] for row in report["per_class"].values()} == {0.9}


# ----------------------------------------------------------------------------------------------------------
# Weights


def test_weights_from_a_file_are_loaded_where_they_fit(trained, tmp_path):
    out, _ = trained
    network = inference.build_model("resnet18", "linear", 3)
    taken, skipped, _ = inference.load_weights(network, out / "model.pth", "resnet18")
    saved = tensors(out / "model.pth")
    assert set(taken) == saved.keys() - {"fc.weight", "fc.bias"}
    assert set(skipped) == {"fc.weight", "fc.bias"}
    assert "another shape" in skipped["fc.bias"]
    assert torch.equal(network.conv1.weight, saved["conv1.weight"])

    wrapped = {"state_dict": {"module.conv1.weight": saved["conv1.weight"], "other": torch.ones(1)}}
    torch.save(wrapped, tmp_path / "w.pth")
    taken, skipped, _ = inference.load_weights(network, tmp_path / "w.pth", "resnet18")
    assert taken == ["conv1.weight"]
    assert skipped["other"] == "not in this network"

    torch.save({"x": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no tensor that fits resnet18"):
        inference.load_weights(network, tmp_path / "w.pth", "resnet18")


def behind(prefix, state):
    """Return a state_dict with a prefix before all names."""
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPERS = {
    "module.": lambda state: behind("module.", state),
    "_orig_mod.module.": lambda state: behind("_orig_mod.module.", state),
    "lightning": lambda state: {"epoch": 3, "state_dict": behind("model.net.", state) | {"loss.weight": torch.ones(3)}},
    "other head": lambda state: behind("backbone.", {name: state[name] for name in state if "fc" not in name})
                                | {"classifier.weight": torch.ones(2, 3)},
    "twice": lambda state: {"model": {"state_dict": behind("_orig_mod.", state)}},
    "other key": lambda state: {"model_state_dict": state, "optimizer": {"state": {}}},
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_what_wrappers_put_before_all_names_is_left_out(case, tmp_path):
    state = inference.build_model("resnet18", "linear", 3).state_dict()
    torch.save(WRAPPERS[case](state), tmp_path / "w.pth")
    network = inference.build_model("resnet18", "linear", 3)
    inference.load_weights(network, tmp_path / "w.pth", "resnet18")
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc") or case != "other head":
            assert torch.equal(tensor, state[name]), name


def test_a_file_of_two_networks_is_an_error_that_names_both(tmp_path):
    state = inference.build_model("resnet18", "linear", 3).state_dict()
    torch.save(behind("model.", state) | behind("ema.", state), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w.pth holds several networks, model and ema"):
        inference.load_weights(inference.build_model("resnet18", "linear", 3), tmp_path / "w.pth", "resnet18")


@pytest.mark.parametrize("saved, wanted", [("resnet50", "resnet18"), ("resnet18", "resnet50"),
                                           ("mobilenet_v2", "resnet18"), ("resnet50", "densenet121")])
def test_weights_of_another_backbone_are_refused_and_named(saved, wanted, tmp_path, real_networks):
    torch.save(inference.build_model(saved, "linear", 3).state_dict(), tmp_path / "w.pth")
    network = inference.build_model(wanted, "linear", 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    message = rf"w.pth has .* {wanted}: it looks like {saved}: give --backbone {saved}"
    with pytest.raises(InputError, match=message) as error:
        inference.load_weights(network, tmp_path / "w.pth", wanted)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("part", ["conv1 layer1 layer2", "grey conv1", "fc"])
def test_weights_of_a_part_of_the_backbone_are_taken(part, tmp_path, real_networks):
    state = inference.build_model("resnet18", "linear", 3).state_dict()
    kept = {name: tensor for name, tensor in state.items() if name.startswith(tuple(part.split()))}
    if part == "grey conv1":
        kept = state | {"conv1.weight": state["conv1.weight"][:, :1]}
    torch.save(kept, tmp_path / "w.pth")
    network = inference.build_model("resnet18", "linear", 3)
    taken, _, _ = inference.load_weights(network, tmp_path / "w.pth", "resnet18")
    assert set(taken) == kept.keys() - ({"conv1.weight"} if part == "grey conv1" else set())


def test_weights_of_a_larger_network_are_refused_by_its_name_and_unknown_ones_taken_if_half_fits(real_networks):
    from torchvision import models

    # Nearly all tensors of vgg16_bn have other names, but the first linear layers are most of its weights.
    cases = [("resnet34", "resnet18", "(5.|60)%"), ("vgg16_bn", "vgg16", "11%"), ("resnet152", "resnet101", "(6|7).%")]
    for saved, wanted, share in cases:
        with torch.device("meta"):
            state = models.get_model(saved, weights=None).state_dict()
            network = inference.build_model(wanted, "linear", 3)
        weights = inference.Weights("w.pth", state, [], [])
        message = f"w.pth has weights of which {share} fit {wanted}: it looks like {saved}"
        with pytest.raises(InputError, match=message):
            inference.load_weights(network, weights, wanted)

        renamed = {f"{name}0" if name.startswith(("layer4.1", "layer4.2")) else name: tensor
                   for name, tensor in state.items()}
        if saved == "resnet152":
            weights = inference.Weights("w.pth", renamed, [], [])
            taken, skipped, _ = inference.load_weights(network, weights, wanted)
            assert {"layer1.0.conv1.weight", "layer3.22.conv1.weight"} < set(taken)
            assert skipped["layer3.35.conv1.weight"] == skipped["layer4.2.conv1.weight0"] == "not in this network"


def test_weights_of_which_less_than_half_fit_are_refused(tmp_path):
    state = inference.build_model("resnet18", "linear", 3).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    torch.save(state | {"decoder.weight": torch.zeros(count + 1000)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w.pth has weights of which (49|50)% fit resnet18: is it"):
        inference.load_weights(inference.build_model("resnet18", "linear", 3), tmp_path / "w.pth", "resnet18")


def test_imagenet_weights_that_cannot_be_had(demo, tmp_path, monkeypatch):
    import torchvision

    def no_network(*_, **__):
        raise OSError("<urlopen error Name or service not known>")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", no_network)
    message = "resnet18 could not be downloaded .*--weights PATH .*--weights none"
    with pytest.raises(InputError, match=message):
        train.main(["--data", str(demo), "--out", str(tmp_path / "out"), "-q"])
    assert not (tmp_path / "out").exists()


def test_imagenet_weights_are_the_default(demo, tmp_path, imagenet_weights, capsys):
    options = [option for option in LOUD if option not in ("--weights", "none")]
    train.main(["--data", str(demo), "--out", str(tmp_path / "out"), "--epochs", "1",
                "--train-layers", "head", *options])
    after = tensors(tmp_path / "out" / "last.pth")
    for name, tensor in imagenet_weights.items():
        if not name.startswith("fc."):
            assert torch.equal(after[name], tensor), name
    out = capsys.readouterr().out
    assert "taken from imagenet" in out
    assert "not taken, another shape than (6,): fc" in out


@pytest.mark.parametrize("head", inference.HEADS)
def test_a_head_for_other_classes_takes_the_rows_of_the_names_both_know(head, tmp_path):
    old = ["a", "b", "c"]
    new = ["c", "a", "d", "e"]  # were c and a only exchanged, rows and places could be too
    torch.manual_seed(0)
    source = inference.build_model("resnet18", head, 3)
    dropout = inference.HEADS[head]
    classifier = classifier_of(source, "resnet18", head, dropout, old, {}, [0.5] * 3, 32)
    inference.save_model(classifier, tmp_path / "model.pth")

    network = inference.build_model("resnet18", head, 4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, skipped, common = inference.load_weights(network, tmp_path / "model.pth", "resnet18", new)
    assert set(skipped) == {f"head row of {name}" for name in "deb"}
    assert common == ["c", "a"]

    names = {"linear": ["fc.weight", "fc.bias"], "mlp": ["fc.5.weight", "fc.5.bias"],
             "bn": ["fc.0.weight", "fc.1.weight", "fc.1.running_var"]}[head]
    for name in names:
        was = source.state_dict()[name]
        now = network.state_dict()[name]
        assert torch.equal(now[0], was[2])
        assert torch.equal(now[1], was[0])
        assert torch.equal(now[2:], before[name][2:])
    assert torch.equal(network.state_dict()["conv1.weight"], source.state_dict()["conv1.weight"])


@pytest.mark.parametrize("saved, wanted, dropout", [
    ("linear", "bn", 0.0), ("bn", "linear", 0.0), ("mlp", "linear", 0.0), ("linear", "bn", 0.2)])
def test_no_rows_are_said_to_be_taken_by_name_when_the_heads_differ(demo, tmp_path, capsys, saved, wanted, dropout):
    classes = dataset.read_labels(demo).classes[::-1]
    network = inference.build_model("resnet18", saved, len(classes), [dropout])
    classifier = classifier_of(network, "resnet18", saved, [dropout], classes, {}, [0.5] * len(classes), 32)
    inference.save_model(classifier, tmp_path / "model.pth")

    torch.manual_seed(0)
    alone = inference.build_model("resnet18", wanted, len(classes), [dropout])
    fresh = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    taken, skipped, common = inference.load_weights(alone, tmp_path / "model.pth", "resnet18", classes[::-1])
    assert common == [] and not any("head row" in name for name in skipped)
    for name, tensor in alone.state_dict().items():
        if name in inference._class_tensors(alone):
            assert torch.equal(tensor, fresh[name]) and name not in taken, name

    loud = [option for option in LOUD if option not in ("--weights", "none")]
    train.main(["--data", str(demo), "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "model.pth"), *loud,
                "--head", wanted, "--dropout", str(dropout), "--epochs", "1"])
    assert "taken by class name" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["model.pth", "last.pth"])
def test_a_head_of_as_many_other_classes_is_not_taken_by_place(trained, kind):
    network = inference.build_model("resnet18", "linear", 6)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    others = [f"other_{number}" for number in range(6)]
    taken, _, common = inference.load_weights(network, trained[0] / kind, "resnet18", others)
    assert (common, {"fc.weight", "fc.bias"} & set(taken)) == ([], set())
    assert torch.equal(network.fc.weight, before["fc.weight"])


# ----------------------------------------------------------------------------------------------------------
# Precision


HALF = [("resnet18", head) for head in inference.HEADS] + [
    (backbone, "linear") for backbone in ("densenet121", "mobilenet_v2", "efficientnet_b0")]


@pytest.mark.parametrize("backbone, head", HALF)
def test_the_head_computes_in_fp32_behind_a_backbone_in_bf16(backbone, head):
    torch.manual_seed(0)
    network = inference.build_model(backbone, head, 5)
    with torch.no_grad():
        inference.forward(network.train(), torch.randn(4, 3, 64, 64), torch.float32)  # BatchNorm's statistics

    layer = head_of(network.eval())
    features = []
    layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach().clone()))

    images = torch.randn(2, 3, 64, 64)
    for network_used in (network, inference.share_tensors(network)):
        with torch.no_grad():
            logits = inference.forward(network_used, images, torch.bfloat16)
            assert features[-1].dtype == torch.bfloat16
            assert logits.dtype == torch.float32
            assert torch.equal(logits, layer(features[-1].float()))
        assert not torch.equal(logits, logits.bfloat16().float())

    rough = logits
    with torch.no_grad():
        exact = inference.forward(network, images, torch.float32)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


def test_the_gradients_of_the_head_are_those_of_fp32():
    torch.manual_seed(0)
    network = inference.build_model("resnet18", "linear", 5)
    features = []
    network.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach().float()))
    inference.forward(network.eval(), torch.randn(3, 3, 64, 64), torch.bfloat16).square().sum().backward()
    weight = network.fc.weight.detach().clone().requires_grad_()
    nn_logits = torch.nn.functional.linear(features[0], weight, network.fc.bias.detach())
    nn_logits.square().sum().backward()
    torch.testing.assert_close(network.fc.weight.grad, weight.grad)
    assert network.conv1.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------
# Val splits that say nothing


def divided(make_rows, val, test="10"):
    """Write data of two classes with a split of its own: 12 images to train on, and on val and test the given labels,
    two for each image."""
    rows = [f"train {i % 2} {i // 2 % 2}" for i in range(12)]
    for part, labels in (("val", val), ("test", test)):
        rows += [f"{part} {a} {b}".replace("?", "NA") for a, b in zip(labels[::2], labels[1::2])]
    return make_rows(rows, "image split red tall")


@pytest.mark.parametrize("monitor, val, needs", [
    ("loss", "????", "a known label"), ("map", "????", "a class with"), ("f1", "????", "a known positive label"),
    ("map", "0000", "a class with known positives and known negatives"), ("f1", "0?00", "a known positive label"),
    ("map", "1?1?", "a class with known positives and known negatives"), ("map", "1010", "a class with"),
])
def test_a_val_split_that_cannot_choose_an_epoch_is_an_error(make_rows, tmp_path, capsys, monitor, val, needs):
    arguments = ["--data", divided(make_rows, val), "--out", tmp_path / "out", *SMALL, "--monitor", monitor]
    for more in ([], ["--patience", 3]):
        error = refused(capsys, train.main, *arguments, *more, warns=True)
        assert error.startswith(f"error: --monitor {monitor} needs {needs}")
        assert "on val, and there is none" in error and "--monitor last" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("monitor, val", [("loss", "0000"), ("loss", "1???"), ("f1", "1?1?"), ("map", "1001"),
                                          ("last", "0000"), ("last", "1?1?")])
def test_a_val_split_that_can_choose_an_epoch_does(make_rows, tmp_path, capsys, monitor, val):
    report = run("--data", divided(make_rows, val), "--out", tmp_path / "out", "--monitor", monitor, "--epochs", 1)
    assert math.isfinite(report["val_loss"])
    assert "no label is known" not in capsys.readouterr().err


@pytest.mark.parametrize("thresholds", ["soft", "pr_curve", "grid", "global"])
def test_the_last_epoch_without_known_labels_on_val_is_calibrated_by_nothing(make_rows, tmp_path, capsys, thresholds):
    data = divided(make_rows, "????")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run("--data", data, "--out", tmp_path / "out", "--epochs", 1, "--thresholds", thresholds)
    assert "warning: val split: no label is known: the last epoch is kept" in capsys.readouterr().err
    classifier = inference.load_model(tmp_path / "out" / "model.pth", "cpu", "fp32")
    assert classifier.thresholds == [0.5, 0.5]
    assert classifier.members[0].scale == 1
    assert classifier.members[0].offsets == pytest.approx([0, 0], abs=1e-6)  # both classes have pos_weight 1
    assert math.isfinite(report["loss"])


def test_a_test_split_without_known_labels_is_warned_about(make_rows, tmp_path, capsys):
    run("--data", divided(make_rows, "1001", "????"), "--out", tmp_path / "out", "--epochs", 1)
    assert "warning: test split: no label is known: nothing is reported" in capsys.readouterr().err


def test_val_labels_that_are_all_of_unreadable_images_cannot_choose_an_epoch(make_rows, tmp_path, capsys):
    data = divided(make_rows, "??1???")
    (data / "images" / "13.png").write_bytes(b"no image")
    arguments = ["--data", data, "--out", tmp_path / "out", *SMALL, "--monitor", "loss", "--epochs", 1]
    error = refused(capsys, train.main, *arguments, warns=True)
    assert error.startswith("error: --monitor loss needs a known label on val")


@pytest.mark.parametrize("monitor, test, warned", [("map", 0, True), ("last", 0, False), ("map", 1, False)])
def test_a_best_epoch_that_is_chosen_by_what_is_reported_is_warned_about(few_images, tmp_path, capsys, monitor, test,
                                                                          warned):
    run("--data", few_images, "--out", tmp_path / "out", "--split", 2, 1, test, "--monitor", monitor, "--epochs", 1)
    assert ("chooses the epoch on the images that are reported" in capsys.readouterr().err) == warned


# ----------------------------------------------------------------------------------------------------------
# Files that are not the run's own


REPLACED = [("train_metadata.csv", []), ("predictions.csv", []), ("classes.json", []), ("config.json", []),
            ("loss_curve.png", []), ("My title.png", ["--plot-title", "My title"]),
            ("fold_2/thresholds.json", ["--folds", 3])]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name, more", REPLACED, ids=[name for name, _ in REPLACED])
def test_a_file_that_no_run_wrote_is_not_replaced(few_images, tmp_path, capsys, name, more, resumed):
    for out in (few_images, tmp_path / "mine"):  # the data folder, and another one
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        before = files_of(out)
        error = refused(capsys, train.main, "--data", few_images, "--labels", few_images / "labels.txt", "--out", out,
                        *SMALL, *more, *["--resume"][:resumed])
        assert str(path) in error and "name another --out" in error
        assert files_of(out) == before
        shutil.rmtree(path.parent) if path.parent != out else path.unlink()


@pytest.mark.parametrize("option", ["--labels", "--weights", "--label-groups", "--data", "--images", "link"])
def test_a_file_that_the_run_reads_is_not_replaced(demo, trained, tmp_path, capsys, option):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    names = {"--labels": "train_metadata.csv", "--weights": "model.pth", "--label-groups": "label_groups.json",
             "--data": "test_metadata.csv", "--images": "predictions.png", "link": "last.pth"}
    path = out / names[option]

    if option == "--images":
        first = read_rows(out / "train_metadata.csv")[0]["ID"]
        (tmp_path / "labels.csv").write_text(f"image,a\npredictions.png,1\n{first},0\nloss_curve.png,0\n")
        shutil.copy(demo / "images" / first, out)
        given = ["--data", tmp_path, "--labels", tmp_path / "labels.csv", "--images", out]
    elif option == "--data":
        (out / "label_groups.json").unlink()
        given = ["--data", out, "--images", demo / "images"]
    elif option == "link":
        (tmp_path / "weights.pth").symlink_to(path)
        given = ["--weights", tmp_path / "weights.pth"]
    else:
        given = [option, path]

    before = files_of(out)
    error = refused(capsys, train.main, "--data", demo, "--out", out, *SMALL, "--size", "64", *given, warns=True)
    named = {"link": tmp_path / "weights.pth", "--images": out / "loss_curve.png"}.get(option, path)
    assert str(named) in error and "lies in --out, and would be replaced" in error
    assert files_of(out) == before


def test_a_run_into_the_folder_of_its_data_is_replaced_by_the_next_one(few_images, tmp_path, capsys):
    images = files_of(few_images)
    for rate in (1e-3, 1e-2):
        run("--data", few_images, "--out", few_images, "--epochs", 1, "--lr", rate)
        assert read_json(few_images / "config.json")["lr"] == rate
    run("--data", few_images, "--out", few_images, "--epochs", 2, "--lr", 1e-2, "--resume")
    assert {name: content for name, content in files_of(few_images).items() if name in images} == images


def test_files_like_those_of_a_run_stay_where_no_run_was(few_images, tmp_path):
    out = tmp_path / "out"
    (out / "fold_1").mkdir(parents=True)
    mine = [out / "predictions_mine_t-1.json", out / "fold_1" / "metrics.json", out / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    run("--data", few_images, "--out", out, "--epochs", 1)
    run("--data", few_images, "--out", tmp_path / "other", "--epochs", 1)
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("title", [["a"], {"a": 1}, 3, "a\0b", "x" * 300, ".."])
def test_an_old_run_whose_title_is_odd_is_replaced(few_images, tmp_path, title):
    run("--data", few_images, "--out", tmp_path / "out", "--epochs", 1)
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"plot_title": title}))
    run("--data", few_images, "--out", tmp_path / "out", "--epochs", 2)
    assert len(read_rows(tmp_path / "out" / "history.csv")) == 2


def test_a_folder_of_splits_that_is_not_empty_leaves_the_run_before_alone(few_images, tmp_path, capsys):
    run("--data", few_images, "--out", tmp_path / "out", "--epochs", 1)
    before = files_of(tmp_path / "out")
    error = refused(capsys, train.main, "--data", few_images, "--out", tmp_path / "out", *SMALL, "--export-splits",
                    few_images)
    assert f"--export-splits {few_images}: {few_images}/images is not empty" in error
    assert files_of(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------------
# Presets


def test_explicit_options_win_over_those_of_a_preset_and_of_the_demo():
    options = train.parse_options(["--preset", "two-stage", "--epochs", "7", "--demo", "--size", "64"])
    assert (options.epochs, options.size, options.weights, options.head) == (7, 64, "none", "mlp")


@pytest.fixture(scope="module")
def reference_data(demo, tmp_path_factory):
    """Return {name: folder} of the demo data in the forms that the presets were made for."""
    table = dataset.read_labels(demo)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("inspection", "txt", "coco")}
    components, defects = table.groups.values()
    for name in ("inspection", "txt"):
        (folders[name] / "images").symlink_to(demo / "images")

    lists = ["ID,components,defects"]
    lines = []

    (folders["coco"] / "labels" / "train").mkdir(parents=True)
    (folders["coco"] / "images").mkdir()
    (folders["coco"] / "images" / "train-resized").symlink_to(demo / "images")

    for name, row in zip(table.ids, table.targets.tolist()):
        stem = Path(name).stem
        there = [label for label, value in zip(table.classes, row) if value == 1]
        parts = ";".join(label for label in there if label in components)
        faults = ";".join(label for label in there if label in defects)
        lists.append(f"{stem},{parts or 'component'},{faults or 'defect'}")
        lines.append(" ".join([name, *label_cells(row)]))
        indices = [str(c) for c, value in enumerate(row) if value == 1]
        (folders["coco"] / "labels" / "train" / f"{stem}.cls").write_text("\n".join(indices))

    (folders["inspection"] / "image_data.csv").write_text("\n".join(lists))
    (folders["txt"] / "labels.txt").write_text("\n".join(lines))
    return folders


def test_inspection(reference_data, tmp_path):
    out = tmp_path / "out"
    report = run("--preset", "inspection", "--data", reference_data["inspection"], "--out", out,
                 "--epochs", 1, "--export-splits", tmp_path / "export")
    assert sorted(report["per_class"]) == ["bolt", "bracket", "crack", "hole", "ring", "rust"]
    assert list(read_rows(out / "predictions.csv")[0]) == [
        "ID", "components", "defects", "components_confidence", "defects_confidence",
        "avg_component_confidence", "avg_defect_confidence", "overall_avg_confidence",
    ]
    assert list(read_json(out / "label_groups.json")) == ["components", "defects"]
    assert all(threshold <= 0.8 for threshold in read_json(out / "thresholds.json").values())
    for split in ("train", "val", "test"):
        exported = sorted(path.stem for path in (tmp_path / "export" / "images" / split).iterdir())
        assert exported == sorted(row["ID"] for row in read_rows(out / f"{split}_metadata.csv"))


def test_two_stage_trains_the_head_and_from_epoch_3_layer4_too(reference_data, trained, tmp_path, capsys):
    source = trained[0] / "model.pth"
    options = ["--preset", "two-stage", "--data", reference_data["txt"], "--out", tmp_path,
               "--weights", source]
    run(*options, "--epochs", 2)
    assert "layer4 is never trained: --unfreeze-epoch 3 is beyond --epochs 2" in capsys.readouterr().err

    before = {name: tensor for name, tensor in tensors(source).items() if not name.startswith("fc.")}
    after = tensors(tmp_path / "last.pth")
    assert changed_layers(before, {name: after[name] for name in before}) == set()
    assert inference.load_model(tmp_path / "model.pth").members[0].dropout == [0.5, 0.3]

    run(*options, "--epochs", 3, "--resume")
    assert changed_layers(after, tensors(tmp_path / "last.pth")) == {"layer4", "fc"}
    history = read_rows(tmp_path / "history.csv")
    assert [float(row["lr"]) for row in history] == pytest.approx([2e-3, 2e-3, 1e-4])
    assert float(history[2]["lr_backbone"]) == pytest.approx(1e-4)
    assert set(read_json(tmp_path / "thresholds.json").values()) == {0.5}


def test_assignment_has_the_loss_of_every_iteration_under_its_title(reference_data, tmp_path, monkeypatch):
    titles = []

    def draw(losses, history, marks=(), title=""):
        titles.append((len(losses), title))
        return Image.new("RGB", (3, 3))

    monkeypatch.setattr(train, "loss_curves", draw)
    report = run("--preset", "assignment", "--data", reference_data["txt"], "--out", tmp_path, "--epochs", 1)
    assert list(report["per_class"]) == [f"Attr{i}" for i in range(1, 7)]
    steps = int(read_rows(tmp_path / "history.csv")[0]["steps"])
    assert titles == [(steps, "Aimonk_multilabel_problem")]
    titled = tmp_path / "Aimonk_multilabel_problem.png"
    assert titled.read_bytes() == (tmp_path / "loss_curve.png").read_bytes()


def test_resnet50_trains_two_layers_and_the_head(reference_data, tmp_path):
    torch.manual_seed(7)
    start = inference.build_model("resnet50", "linear", 3).state_dict()
    torch.save(start, tmp_path / "start.pth")
    report = run("--preset", "resnet50", "--data", reference_data["txt"], "--out", tmp_path / "out",
                 "--epochs", 1, "--weights", tmp_path / "start.pth")
    assert math.isfinite(report["loss"])
    after = tensors(tmp_path / "out" / "last.pth")
    before = {name: tensor for name, tensor in start.items() if not name.startswith("fc.")}
    assert changed_layers(before, {name: after[name] for name in before}) == {"layer3", "layer4"}
    assert inference.load_model(tmp_path / "out" / "model.pth").members[0].dropout == [0.65, 0.4]


def test_coco(reference_data, tmp_path):
    registry = tmp_path / "registry"
    out = tmp_path / "out"
    arguments = ["--preset", "coco", "--data", reference_data["coco"], "--registry", registry, "--epochs", 2,
                 "--out", out, "--val-every", 2]
    report = run(*arguments)
    assert len(report["per_class"]) == 80
    assert [bool(row["val_map"]) for row in read_rows(out / "history.csv")] == [False, True]

    thresholds = set(inference.read_checkpoint(out / "model.pth")["thresholds"])
    assert len(thresholds) == 1
    (predictions,) = out.glob("predictions_*.json")
    score = report["val_f1_weighted"]
    assert predictions.name == (f"predictions_resnet18_f1-{score:.4f}_epoch-{report['epoch']}_b-16_lr-0.001"
                                f"_t-{thresholds.pop():.4f}.json")
    assert len(read_json(predictions)) == report["images"]

    # The registry keeps the run with the better F1 on val, whatever that on test is
    (kept,) = registry.iterdir()
    assert "resnet18" in metrics.main([str(kept)])
    scores = read_json(kept / "metrics.json")
    for better in (0.0, 2.0):
        scores |= {"f1_weighted": 2 - better, "val_f1_weighted": better}
        (kept / "metrics.json").write_text(json.dumps(scores))
        run(*arguments)
        now = max(better, report["val_f1_weighted"])
        assert read_json(kept / "metrics.json")["val_f1_weighted"] == now


# ----------------------------------------------------------------------------------------------------------
# Registry


@pytest.fixture(scope="module")
def registered(demo, tmp_path_factory):
    """Return a registry that holds one run."""
    out = tmp_path_factory.mktemp("run")
    registry = tmp_path_factory.mktemp("registry")
    run("--data", demo, "--out", out, "--epochs", 1, "--registry", registry)
    return registry


def test_a_configuration_has_readable_tokens_and_a_folder_of_its_own(demo, registered, tmp_path):
    registry = tmp_path / "registry"
    shutil.copytree(registered, registry)
    (first,) = registry.iterdir()
    assert first.name.startswith("resnet18-linear_b-16_lr-0.001_")
    assert {path.name for path in first.iterdir()} == {"model.pth", "config.json", "metrics.json"}

    options = ["--data", demo, "--registry", registry, "--epochs", 1]
    run(*options, "--out", tmp_path / "another", "--seed", 3, "-j", 1)
    assert list(registry.iterdir()) == [first]
    run(*options, "--out", tmp_path / "another", "--lr", 0.01, "-b", 8, "--train-layers", "layer4,head")
    run(*options, "--out", tmp_path / "another", "--augment", "none")

    names = sorted(path.name for path in registry.iterdir())
    assert len(names) == 3
    (tokens,) = [name for name in names if "lr-0.01" in name]
    assert tokens.startswith("resnet18-linear_b-8_lr-0.01_")
    assert "layer4" in tokens


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b'{"val_f1_weighted": "x"}', b"\xff"])
def test_damaged_metrics_in_a_registry_do_not_lose_a_run(demo, registered, tmp_path, capsys, content):
    registry = tmp_path / "registry"
    shutil.copytree(registered, registry)
    (damaged,) = registry.rglob("metrics.json")
    damaged.write_bytes(content)
    report = run("--data", demo, "--out", tmp_path / "out", "--epochs", 1, "--registry", registry)
    assert report["epoch"] == read_json(tmp_path / "out" / "metrics.json")["epoch"] == 1
    assert list(registry.rglob("metrics.json")) == [damaged]
    assert read_json(damaged)["epoch"] == 1
    assert "metrics.json" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Demo data


@pytest.mark.parametrize("name", ["labels.csv", "image_data.csv", "mine.txt", "photo.jpg"])
def test_train_demo_leaves_the_users_own_folder_alone(tmp_path, monkeypatch, name):
    def draw(*_):
        raise AssertionError("drawn into the user's folder")

    monkeypatch.setattr(dataset, "draw_demo_image", draw)
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_text("mine")
    with pytest.raises(InputError, match="data"):
        run("--demo", "--data", data, "--out", tmp_path / "out", "--epochs", 1)
    assert [path.name for path in data.rglob("*")] == [name]
    assert (data / name).read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_train_demo_takes_the_demo_folder_that_is_there(demo, tmp_path):
    before = (demo / "labels.txt").read_bytes()
    run("--demo", "--data", demo, "--out", tmp_path, "--epochs", 1)
    assert (demo / "labels.txt").read_bytes() == before
    assert len(read_rows(tmp_path / "train_metadata.csv")) > 50


# ----------------------------------------------------------------------------------------------------------
# Options and messages

OPTIONS = [
    (["--lr", "-1"], "--lr: -1: it must be a number from 0 up"),
    (["--lr", "nan"], "--lr: nan: it must be a number from 0 up"),
    (["--wd", "inf"], "--wd: inf: it must be a number"),
    (["--dropout", "1.5"], "--dropout: 1.5: it must be a number from 0 up, below 1"),
    (["--seed", "-1"], "--seed: -1: it must be a number from 0 up"),
    (["--epochs", "0"], "--epochs: 0: it must be a number from 1 up"),
    (["--epochs", "x"], "--epochs: invalid int value: 'x'"),
    (["-b", "0"], "--batch-size: 0: it must be a number from 1 up"),
    (["-j", "-1"], "--workers: -1: it must be a number from 0 up"),
    (["--pos-weight-clip", "5", "2"], "--pos-weight-clip takes the lower bound first"),
    (["--milestones", "0"], "--milestones: 0: it must be a number from 1 up"),
    (["--split", "1", "0", "0"], "--split takes three ratios"),
    (["--split", "nan", "1", "1"], "--split takes three ratios"),
    (["--group", "pipe"], "--group pipe: "),
    (["--weights", "/nowhere.pth"], "/nowhere.pth does not exist"),
    (["--data", "/nowhere"], "/nowhere is not a folder"),
    (["--labels", "other.csv"], "other.csv"),
    (["--thresholds", "best"], "best: use soft"),
    (["--thresholds", "-1"], "-1: use soft"),
    (["--thresholds", "nan"], "nan: use soft"),
    (["--thresholds", "1.5"], "1.5: use soft"),
    (["--max-threshold", "nan"], "--max-threshold: nan: it must be a number from 0 up"),
    (["--augment", "spin"], "--augment spin: 'spin' is not one of"),
    (["--cache", "lots"], "lots: use auto"),
    (["--cache", "-1"], "-1: use auto"),
    (["--device", "abacus"], "--device abacus"),
    (["--backbone", "vgg99"], "--backbone vgg99: torchvision has no such classification network (did you mean vgg19"),
    (["--train-layers", "layer9"], "the network has no layer layer9"),
    (["--dropout", "0.1", "0.2", "0.3"], "--dropout"),
    (["--size", "1"], "--size: 1: it must be a number from 32 up"),
    (["--plot-title", "x" * 300], "also names a file, and it is longer than 200 bytes"),
    (["--plot-title", "\u00e9" * 101], "also names a file, and it is longer than 200 bytes"),
    (["--plot-title", "a\0b"], "it has control characters"),
    (["--plot-title", "a\nb"], "it has control characters"),
    (["--plot-title", "\udcff"], "it has control characters"),
    (["--plot-title", "  "], "it is blank"),
    (["--plot-title", "predictions"], "a run writes another file of that name"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate (see --help)"),
]


@pytest.mark.parametrize("arguments, message", OPTIONS,
                         ids=[repr(" ".join(arguments))[1:30] for arguments, _ in OPTIONS])
def test_options(demo, tmp_path, capsys, arguments, message):
    assert message in refused(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *SMALL, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("title", ["a/b", "..", "/", "x" * 200, "\u640d\u5931\u3000\u66f2\u7dda", "", "loss_curve"])
def test_titles_that_can_name_a_file_do(few_images, tmp_path, title):
    run("--data", few_images, "--out", tmp_path / "out", "--plot-title", title, "--epochs", 1)
    name = f"{title.replace('/', '_')}.png" if title else "loss_curve.png"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out" / "loss_curve.png").read_bytes()


@pytest.mark.parametrize("backbone, head, size", [("densenet121", "linear", 40), ("resnet18", "linear", 32),
                                                  ("resnet18", "mlp", 224)])
def test_single_images_that_batchnorm_cannot_train_on_are_an_error(few_images, tmp_path, capsys, real_networks,
                                                                   backbone, head, size):
    error = refused(capsys, train.main, "--data", few_images, "--out", tmp_path / "out", *SMALL, "-b", 1,
                    "--backbone", backbone, "--head", head, "--size", size)
    assert "BatchNorm needs two: raise -b" in error
    assert (f"raise --size {size}" in error) == (head == "linear")


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "vgg16"])
def test_single_images_are_trained_on_exactly_where_the_network_can(backbone, real_networks):
    values = []  # of each channel at each BatchNorm
    with torch.device("meta"):
        network = inference.build_model(backbone, "linear", 2).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0].shape[2:].numel()))

    for size in (32, 33, 64):
        values.clear()
        network(torch.zeros(1, 3, size, size, device="meta"))
        options = train.parse_options(["--backbone", backbone, "--size", str(size)])
        assert train.trains_on_one_image(options) == (min(values, default=2) > 1)


def test_layers_that_are_never_unfrozen_are_warned_about(few_images, tmp_path, capsys):
    options = ["--data", few_images, "--out", tmp_path / "out", "--epochs", 1, "--train-layers", "head"]
    run(*options, "--unfreeze", "layer4", "--unfreeze-epoch", 2)
    assert "warning: layer4 is never trained" in capsys.readouterr().err
    run(*options, "--unfreeze", "layer4", "--unfreeze-epoch", 1)
    assert capsys.readouterr().err == ""


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_options(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py ")
    assert "(default: None)" not in text
    for default in ("0", "resnet18", "0.7 0.15 0.15"):
        assert f"(default: {default})" in " ".join(text.split())
    assert "imbalance:" in text


# ----------------------------------------------------------------------------------------------------------
# Bad images


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_each_bad_image_once(odd_folder, tmp_path, capsys, monkeypatch, workers):
    folder, bad = odd_folder
    batches = dataset.batches

    def vanish(*arguments, **settings):
        (folder / "images" / "vanished.jpg").unlink(missing_ok=True)
        return batches(*arguments, **settings)

    monkeypatch.setattr(dataset, "batches", vanish)
    out = tmp_path / "out"
    code, _, errors = as_command(capsys, train.main, "--data", folder, "--out", out, "--epochs", 2, *SMALL,
                                 "--workers", workers)
    assert code == 0
    assert (out / "metrics.json").exists()
    for name in [*bad, "vanished.jpg"]:
        assert errors.count(f"{name}: ") == 1
        assert f"warning: skipped {folder}/images/{name}" in errors
    assert errors.count("warning: skipped") == len(bad) + 1


@pytest.mark.parametrize("first, last", [(0, 16), (4, 20)])
def test_more_than_half_bad_stops_the_run(make_rows, tmp_path, capsys, first, last):
    data = make_rows([i % 2 for i in range(20)], "image red")
    for i in range(first, last):
        (data / "images" / f"{i:02}.png").write_bytes(b"no image")
    error = refused(capsys, train.main, "--data", data, "--out", tmp_path / "out", "--epochs", 1, *SMALL, warns=True)
    assert "of the train split cannot be read, as" in error
    assert "--check lists them all" in error


# ----------------------------------------------------------------------------------------------------------
# What is printed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_configuration_is_printed_before_training(demo, tmp_path, capsys):
    train.main(["--data", str(demo), "--out", str(tmp_path), "--epochs", "1", "-b", "20", "--lr", "0.0007",
                "--train-layers", "layer4,head", *LOUD])
    before, _, after = capsys.readouterr().out.partition("epoch 1/1")
    count = len(read_rows(tmp_path / "train_metadata.csv"))
    for text in ("80 images", f"{count} train", "resnet18", "linear head", "32 px", "layer4,head",
                 "1 epochs", "batch 20", "lr 0.0007", "cosine", "augment flip,crop,rotation", "pos_weight sqrt",
                 "last epoch", "soft", "batch_size=20", "device: cpu", "precision: fp32", "weights: none"):
        assert text in before, text
    assert "epochs=" not in before and "seed=" not in before and "monitor=" not in before
    assert "f1_macro" in after
    assert f"inference.py {demo}/images/" in after
    assert f"--model {tmp_path}/model.pth" in after


def test_progress_updates_in_place_on_a_terminal(few_images, tmp_path, monkeypatch):
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        train.main(["--data", str(few_images), "--out", str(tmp_path / "out"), "--epochs", "2", "-b", "4",
                    *LOUD])
    _, _, text = terminal.getvalue().partition("\r")
    lines = text.split("\r")
    count = len(read_rows(tmp_path / "out" / "train_metadata.csv"))
    assert f"image {count}/{count}  loss " in text
    assert "images/s" in lines[0] and "left" in lines[0]
    assert len([line for line in lines if line.startswith("epoch 1/2  loss ") and "val loss" in line]) == 1
    for line, following in itertools.pairwise(lines):
        assert "\n" in line or len(following.partition("\n")[0]) >= len(line)  # it covers the one before


def test_elsewhere_progress_is_a_line_per_epoch(few_images, tmp_path, capsys):
    train.main(["--data", str(few_images), "--out", str(tmp_path / "out"), "--epochs", "2", "--monitor", "map", *LOUD])
    text = capsys.readouterr().out
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert "val loss" in lines[0] and "images/s" in lines[0]
    assert any(line.endswith("best") for line in lines)


def test_quiet_prints_nothing(few_images, tmp_path, capsys):
    run("--data", few_images, "--out", tmp_path / "out", "--epochs", 1)
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_silences_the_run_and_does_not_end_it(few_images, tmp_path):
    python = [sys.executable, ROOT / "train.py", "--data", few_images, "--out", tmp_path / "out",
              "--epochs", 1, *LOUD]
    command = f"set -o pipefail; {' '.join(map(str, python))} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert read_json(tmp_path / "out" / "metrics.json")["epoch"] == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_class_names_that_the_terminal_lacks_are_escaped(make_rows, tmp_path, monkeypatch, encoding):
    data = make_rows([f"{i % 2} {i // 2 % 2}" for i in range(12)], "image Größe 裂纹")
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        report = train.main(["--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1", *LOUD])
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert r"\u88c2\u7eb9" in text
    assert "f1_macro" in text
    assert list(report["per_class"]) == read_json(tmp_path / "out" / "classes.json") == ["Größe", "裂纹"]


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_run_needs_no_output(few_images, tmp_path, monkeypatch, stream):
    if stream:
        stream = io.StringIO()
        stream.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        report = train.main(["--data", str(few_images), "--out", str(tmp_path / "out"), "--epochs", "1",
                             *LOUD])
    assert report["epoch"] == 1


def test_a_report_of_500_classes_is_short(make_rows, tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [" ".join(map(str, rng.integers(0, 2, 500))) for _ in range(40)]
    data = make_rows(rows, " ".join(["image", *(f"class_{c}" for c in range(500))]))
    report = train.main(["--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1", *LOUD])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 120
    assert "metrics.json has all" in text
    assert len(report["per_class"]) == len(read_json(tmp_path / "out" / "metrics.json")["per_class"]) == 500
