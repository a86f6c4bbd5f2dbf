"""What a GPU would be asked to do, on machines without one: each tensor is on the right device, and no step waits.

FakeTensorMode computes shapes, dtypes and devices but no values, so that tensors of "cuda" exist everywhere. It refuses
operations on tensors of two devices, and all that needs a value, such as item() and nonzero(): on a GPU, these wait.
"""

import os
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dataset
import inference
import train
from conftest import SMALL

aten = torch.ops.aten


class RefuseToWait(TorchDispatchMode):
    """Fail on copies between devices that wait for a GPU: all but those in the background, of pinned memory."""

    def __init__(self):
        super().__init__()
        self.pinned = []
        self.copies = 0

    def __torch_dispatch__(self, function, _, arguments=(), options=None):
        options = options or {}
        if function is aten._pin_memory.default:  # which FakeTensorMode lacks
            self.pinned.append(arguments[0])
            return arguments[0]

        result = function(*arguments, **options)
        tensors = [value for value in tree_leaves((arguments, options, result)) if isinstance(value, torch.Tensor)]
        on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
        if on_cpu and len(on_cpu) < len(tensors):  # a single number of the CPU is a parameter of the operation
            assert function is aten._to_copy.default and options.get("non_blocking"), function
            assert any(arguments[0] is tensor for tensor in self.pinned), "a copy from memory that is not pinned"
            self.copies += 1
        return result


@pytest.fixture
def on_gpu(monkeypatch):
    """Return a block in which tensors of "cuda" have no values, and nothing may wait for them."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(inference, "to_device", lambda network, _: network)  # they are built on "cuda"

    def backward(loss):
        try:
            real_backward(loss)
        except RuntimeError as error:  # torch made for CUDA starts no backward pass without a GPU
            if "hasPrimaryContext" not in str(error):
                raise
            assert loss.shape == () and loss.device.type == "cuda"
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None

    real_backward, weights = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield weights


@pytest.fixture
def make_run(few_images, monkeypatch):
    """Return a function that returns the arguments of train.build() for a GPU; what draws numbers is drawn before."""

    def make(*more):
        options = train.parse_options([*SMALL, "--data", str(few_images), "-b", "6", "--cache", "off", *more])
        options.device = "cuda"
        tables = train.read_data(options)
        drawn = train.draw_batches(types.SimpleNamespace(options=options, tables=tables, state=train.State()))
        noise = dataset.draw_noise(len(tables["train"]), 0, 1)
        monkeypatch.setattr(train, "draw_batches", lambda _: drawn[:1])
        monkeypatch.setattr(dataset, "draw_noise", lambda *_: noise)
        return options, tables

    return make


RECIPES = {
    "fp32": ["--augment", ",".join(dataset.OPERATIONS)],
    "bf16": ["--augment", "flip,vflip,jitter", "--mix", "mixup", "--loss", "asymmetric", "--head", "mlp"],
    "fp16": ["--augment", "rich", "--mix", "cutmix", "--train-layers", "layer4,head", "--wd", "0"],
}


@pytest.mark.parametrize("precision", RECIPES)
def test_a_step_on_a_gpu_has_all_tensors_there_and_waits_for_none(make_run, request, precision):
    options, tables = make_run("--precision", precision, "--sam", "0.1", "--epochs", "1", *RECIPES[precision])
    weights = request.getfixturevalue("on_gpu")
    with torch.device("cuda"):
        run = train.build(options, tables)
    weights += run.member.network.parameters()
    train.choose_layers(run)
    run.state.epoch = 1  # late enough for steps uphill
    train.train_mode(run.member.network)

    dtypes = []
    run.member.network.layer4.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    with RefuseToWait() as watch:
        for batch in train.load_batches(run):
            train.set_rates(run, 0.5)
            loss = train.train_step(run, batch.images, batch.targets, batch.share)
            assert not train.should_stop(run)
    assert loss.device.type == "cuda"
    assert watch.copies == 4  # images, noise, constants to normalize, labels
    assert {train.precision_name(dtype) for dtype in dtypes} == {precision}
    assert len(dtypes) == 2  # the second one uphill
    assert all(tensor.device.type == "cuda" for state in run.optimizer.state.values() for tensor in state.values())


def test_a_validation_on_a_gpu_waits_for_no_batch(make_run, request):
    options, tables = make_run("--precision", "bf16")  # for fp32, tensors would be copied that have no values
    request.getfixturevalue("on_gpu")
    with torch.device("cuda"):
        run = train.build(options, tables)
    run.classifier.mirrored = True
    seen = []
    compute_logits = inference.compute_logits.__wrapped__  # in inference mode, other functions are called
    with torch.no_grad(), RefuseToWait() as watch:
        logits = compute_logits(run.classifier, run.images["train"], run.classifier.precision, 4, 0, None, seen.append)
    assert logits.shape == (2, sum(seen), 2) and logits.device.type == "cuda"
    assert watch.copies == 2 * len(seen)


@pytest.mark.parametrize("wait", [
    lambda images: dataset.augment(images, ["jitter"], torch.rand(2, len(dataset.NOISE))),  # noise on the CPU
    lambda images: images + torch.ones(3, 1, 1),
    lambda images: images + torch.tensor([1.0], device=images.device),
    lambda images: images[torch.tensor([1, 0])],
    lambda images: images[images > 0],
    lambda images: images.sum().item(),
    lambda images: images.cpu(),
    lambda images: dataset.send(torch.ones(2), images.device) if images.isfinite().all() else None,
])
def test_what_is_on_the_wrong_device_or_waits_is_noticed(request, wait):
    request.getfixturevalue("on_gpu")
    images = torch.ones(2, 3, 8, 8, device="cuda")
    errors = (RuntimeError, AssertionError, DataDependentOutputException, DynamicOutputShapeException)
    with RefuseToWait(), pytest.raises(errors):
        wait(images)


def test_losses_and_weights_are_checked_with_one_reading(tmp_path):
    readings = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, _, arguments=(), options=None):
            readings.append(function is aten._local_scalar_dense.default)
            return function(*arguments, **options or {})

    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9)))
    run = types.SimpleNamespace(state=train.State(), out=tmp_path, member=types.SimpleNamespace(network=network))
    losses = [torch.tensor(0.5)] * 3
    with Count():
        train.gather_losses(run, losses)
    assert sum(readings) == 1
    assert (run.state.losses, losses) == ([0.5] * 3, [])
    with torch.no_grad():
        network[4].bias[1] = np.inf
    with pytest.raises(RuntimeError, match="weights are no longer finite"):
        train.gather_losses(run, losses)


def test_cudnn_measures_its_algorithms_while_training_only(few_images, tmp_path, monkeypatch):
    during = []
    end_epoch = train.end_epoch
    monkeypatch.setattr(train, "end_epoch", lambda run: during.append(torch.backends.cudnn.benchmark) or end_epoch(run))
    before = torch.backends.cudnn.benchmark
    train.main([*SMALL, "--data", str(few_images), "--out", str(tmp_path / "out"), "--epochs", "1"])
    assert during == [True]
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("processes, expected", [("1", 16), ("4", 5), ("32", 1)])
def test_the_processes_of_a_machine_share_its_processors(monkeypatch, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(20), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert inference.default_workers() == expected


def test_without_autocast_fp32_still_works(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("autocast"))  # as torch 2.4 on MPS
    assert inference.forward(torch.nn.Flatten(), torch.ones(2, 3, 4, 4), torch.float32).shape == (2, 48)


def test_mps_gets_what_its_sampling_gets_right(monkeypatch):
    class OnMPS(torch.Tensor):  # claims to be there
        device = torch.device("mps")

    for name in ("arange", "ones", "linspace"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *sizes, real=real, **_: real(*sizes))
    monkeypatch.setattr(dataset, "_geometry", lambda *_: torch.eye(3).repeat(2, 1, 1))
    sampled = []
    monkeypatch.setattr(torch.nn.functional, "grid_sample",
                        lambda images, grid, **options: sampled.append((images, options)) or images)

    images = torch.ones(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    dataset.augment(images.as_subclass(OnMPS), ["crop"], torch.ones(2, len(dataset.NOISE)))
    inference._upsample(torch.ones(1, 1, 2, 2).as_subclass(OnMPS), 8)
    assert sampled[0][0].is_contiguous()
    assert sampled[1][1]["mode"] == "bilinear"


class OfAGPU(torch.Tensor):
    """A number that claims to be on a GPU, from which reading it would have to wait."""

    device = torch.device("cuda")


class Event:
    """Stands for torch.cuda.Event; `done` says whether the GPU has come to it."""

    def __init__(self, done):
        self.query = lambda: done


@pytest.fixture
def run_of_two(monkeypatch):
    """Return a run of several processes, as should_stop() sees it on a GPU."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "start_reading", lambda number: (number.as_subclass(torch.Tensor), Event(True)))
    return types.SimpleNamespace(signal=0, asked=None, reading=None)


def test_on_a_gpu_all_processes_stop_one_step_after_one_was_asked_to(run_of_two):
    answers = []
    for asked in (0, 0, 1, 2):
        run_of_two.asked = torch.tensor(float(asked)).as_subclass(OfAGPU)
        answers.append(train.should_stop(run_of_two))
    assert answers == [False, False, False, True]


def test_a_process_whose_gpu_waits_for_one_that_is_gone_gives_up_after_a_signal(run_of_two, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(train.time, "sleep", lambda _: setattr(run_of_two, "signal", 15 * (next(clock) > 30)))
    with pytest.raises(torch.distributed.DistError):
        train.finish_reading(run_of_two, (torch.tensor(1), Event(False)))
    assert 50 < next(clock) < 70  # 20 seconds after the signal, however long it waited before
