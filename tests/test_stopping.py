"""Runs that are killed, interrupted or out of disk lose nothing."""

import contextlib
import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import dataset
import inference
import train
from conftest import ROOT, SMALL
from dataset import InputError


def tensors(path):
    return inference.read_checkpoint(path)["network"]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(out):
    """The rows of history.csv, without what the clock says."""
    with open(out / "history.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in csv.DictReader(file)]


# Starts the runs as forks of one process that has imported everything: with 25 kills that saves two minutes.
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch, torchvision.models
import train
torch.set_num_threads(1)

def start(out, *more):
    pid = os.fork()
    if pid == 0:
        try:
            train.main([*{arguments!r}, "--out", out, *more])
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def saving():
    return os.path.exists("parts") and any(name.endswith(".tmp") for name in os.listdir("parts"))

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.time()
assert code(start("whole")) == 0
length, rng, hits = time.time() - began, random.Random({seed}), 0
for kill in range({kills}):
    pid = start("parts", *["--resume"] * os.path.exists("parts/last.pth"))
    end = time.time() + rng.uniform(0, 0.5 * length)
    while time.time() < end and not (kill % 2 and saving()):  # every second one while a file is written
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    assert code(pid) in (0, -signal.SIGKILL)
    hits += saving()
assert code(start("parts", *["--resume"] * os.path.exists("parts/last.pth"))) == 0
assert hits and not saving(), (hits, os.listdir("parts"))
print(f"{{length:.1f}} s without a stop; {{hits}} of {kills} kills left a file half-written")
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_25_times_ends_as_one_that_never_was(demo, tmp_path, workers):
    arguments = ["--data", str(demo), "--epochs", "6", "--head", "mlp", "--augment", "rich", *SMALL,
                 "--workers", str(workers)]
    script = KILLER.format(root=str(ROOT), arguments=arguments, seed=workers, kills=25)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    for name in ("model.pth", "last.pth"):
        assert same_tensors(tensors(tmp_path / "whole" / name), tensors(tmp_path / "parts" / name))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts")]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [2, 4])  # within the first epoch, and at its end
def test_a_signal_saves_the_step_in_hand(demo, trained, tmp_path, capsys, monkeypatch, number, code, at):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    shown = train.Progress.__call__

    def send(self, epoch, step, *rest):
        shown(self, epoch, step, *rest)
        if (epoch, step) == (1, at):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train.Progress, "__call__", send)
        dataset.run_command(lambda: train.main(options))
    assert ended.value.code == code and signal.getsignal(number) != send
    place = {2: "iteration 2 of epoch 1", 4: "epoch 1"}[at]
    assert f"stopped after {place}: the same command with --resume goes on from here" in capsys.readouterr().err
    assert train.main([*options, "--resume"]) == trained[1]
    assert same_tensors(tensors(tmp_path / "model.pth"), tensors(trained[0] / "model.pth"))
    assert history(tmp_path) == history(trained[0])


def test_the_second_signal_acts_at_once(trained, demo, tmp_path):
    run = train.prepare(train.parse_options(["--data", str(demo), "--out", str(tmp_path), *SMALL]))
    before = signal.getsignal(signal.SIGINT)
    with train.signals_noted(run):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_says_what_changed_and_refuses_what_must_not(trained, demo, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    options = ["--data", str(demo), "--out", str(tmp_path / "run"), "--resume", *SMALL]
    train.main([*options, "--epochs", "3", "--lr", "1e-4", "-b", "8"])
    assert "than before: epochs 2 -> 3, batch_size 16 -> 8, lr 0.0003 -> 0.0001, lr_b" in capsys.readouterr().err
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["1", "2", "3"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more, message in ((["--seed", "1"], "is of other splits"), (["--backbone", "vgg16"], "has --backbone resnet18"),
                          (["--head", "bn"], "has --head linear")):
        with pytest.raises(InputError, match=message):
            train.main([*options, *more])
    with pytest.raises(InputError, match=r"last\.pth is not there: without --resume a run starts"):
        train.main([*options, "--out", str(tmp_path / "none")])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_batch_size_that_changes_within_an_epoch_goes_on_at_the_same_image(demo, tmp_path):
    options = ["--data", str(demo), "--out", str(tmp_path), *SMALL]
    run = train.prepare(train.parse_options([*options, "-b", "8"]))
    run.step = 4
    train.save_state(run)
    run = train.prepare(train.parse_options([*options, "-b", "16"]))
    train.load_state(run)
    assert run.step == 2


# ---------------------------------------------------------------------------------------------------------------------
# Disks that are full, folders that cannot be written


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(trained, tmp_path):
    classifier = inference.load_model(trained[0] / "model.pth", "cpu", "fp32")
    path = tmp_path / "model.pth"
    inference.save_model(classifier, path)
    before, size = tensors(path), path.stat().st_size
    torch.nn.init.normal_(classifier.network.conv1.weight)
    for stage in range(20):
        with file_size_limit(stage * size // 20), pytest.raises(OSError, match="cannot be written") as error:
            inference.save_model(classifier, path)
        assert "\n" not in str(error.value)
        assert same_tensors(tensors(path), before) and [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    inference.save_model(classifier, path)
    assert not same_tensors(tensors(path), before)


def test_a_run_out_of_disk_ends_in_one_line_and_can_be_resumed(demo, trained, tmp_path, capsys, monkeypatch):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    saved = train.save_state

    def save(run):
        with file_size_limit(10_000_000 if run.epoch == 2 else resource.RLIM_INFINITY):
            saved(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, "save_state", save)
        dataset.run_command(lambda: train.main(options))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(lines) == 1 and "last.pth cannot be written" in lines[0]
    assert inference.read_checkpoint(tmp_path / "last.pth")["epoch"] == 1
    assert train.main([*options, "--resume"]) == trained[1]


def test_a_folder_that_cannot_be_written_is_an_error_at_once(demo, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file/out: .*cannot be written: Not a directory"):
        train.main(["--data", str(demo), "--out", str(tmp_path / "file" / "out"), *SMALL])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of strangers


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(trained, demo, tmp_path):
    proof, out = tmp_path / "proof", tmp_path / "run"
    shutil.copytree(trained[0], out)
    image = str(next((demo / "images").iterdir()))
    calls = {
        "model.pth": lambda: inference.main([image, "--model", str(out / "model.pth"), "--device", "cpu"]),
        "last.pth": lambda: train.main(["--data", str(demo), "--out", str(out), "--resume", *SMALL]),
        "weights.pth": lambda: train.main(["--data", str(demo), *SMALL, "--weights", str(out / "weights.pth")]),
    }
    for name, call in calls.items():
        for zipped in (True, False):
            content = inference.read_checkpoint(trained[0] / "last.pth") | {"extra": Payload(proof)}
            torch.save(content, out / name, _use_new_zipfile_serialization=zipped)
            with pytest.raises(InputError, match=name) as error:
                call()
            assert not proof.exists() and "\n" not in str(error.value)
    torch.load(out / "model.pth", weights_only=False)  # the payload works
    assert proof.is_dir()


def damaged(change):
    """A model.pth of the trained run, changed."""
    def write(trained, path):
        content = inference.read_checkpoint(trained[0] / "model.pth")
        change(content)
        torch.save(content, path)
    return write


MODELS = {
    "no file": (lambda trained, path: None, "model.pth is not there: train a model first"),
    "a folder": (lambda trained, path: path.mkdir(), "cannot be read as a PyTorch checkpoint: Is a directory"),
    "empty": (lambda trained, path: path.touch(), "cannot be read as a PyTorch checkpoint"),
    "text": (lambda trained, path: path.write_text("hello"), "model.pth"),
    "cut off": (lambda trained, path: path.write_bytes((trained[0] / "model.pth").read_bytes()[:99_999]), "model.pth"),
    "a state_dict": (lambda trained, path: torch.save({"conv1.weight": torch.ones(1)}, path), "is not a model.pth of"),
    "a tensor": (lambda trained, path: torch.save(torch.ones(1), path), "is not a model.pth of train.py"),
    "last.pth": (lambda trained, path: shutil.copy(trained[0] / "last.pth", path), "is not a model.pth of train.py"),
    "newer": (damaged(lambda content: content.update(format=99)), "has format 99, and this program reads 1"),
    "fewer classes": (damaged(lambda content: content["classes"].pop()), "is damaged: its tensors are not those of a"),
    "no thresholds": (damaged(lambda content: content.update(thresholds=[])), "is damaged: it has 0 thresholds"),
    "unknown network": (damaged(lambda content: content.update(backbone="x")), "is damaged: its tensors are not"),
    "lost tensor": (damaged(lambda content: content["network"].pop("conv1.weight")), "is damaged: its tensors"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_none(trained, demo, tmp_path, capsys, case):
    write, message = MODELS[case]
    path = tmp_path / "model.pth"
    write(trained, path)
    image = str(next((demo / "images").iterdir()))
    with pytest.raises(SystemExit) as ended:
        dataset.run_command(lambda: inference.main([image, "--model", str(path), "--device", "cpu"]))
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err


# ---------------------------------------------------------------------------------------------------------------------
# Training that goes wrong


def test_a_loss_that_is_not_a_number_stops_the_run(demo, tmp_path, monkeypatch):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "3", *SMALL]
    loss = train.masked_bce
    calls = []

    def broken(logits, targets, pos_weight):
        calls.append(None)
        total, known = loss(logits, targets, pos_weight)
        return (total * math.nan if len(calls) == 7 else total), known  # 4 iterations, val, then the second one

    monkeypatch.setattr(train, "masked_bce", broken)
    with pytest.raises(RuntimeError, match=r"the loss is nan at iteration 6, in epoch 2: .*lr.*is that after epoch 1"):
        train.main(options)
    assert inference.read_checkpoint(tmp_path / "last.pth")["epoch"] == 1
    assert inference.load_model(tmp_path / "model.pth").epoch == 1
    monkeypatch.setattr(train, "masked_bce", loss)
    assert train.main([*options, "--resume"])["epoch"] in (1, 2, 3)


@pytest.mark.parametrize("rate", ["1e30", "1e18"])
def test_weights_that_overflow_are_not_saved(demo, tmp_path, rate):
    with pytest.raises(RuntimeError, match="try a lower --lr, or --precision fp32"):
        train.main(["--data", str(demo), "--out", str(tmp_path), "--epochs", "3", "--lr", rate, *SMALL])
    for path in tmp_path.glob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in tensors(path).values())


def test_out_of_memory_gives_a_hint(demo, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    monkeypatch.setattr(inference, "forward", full)
    with pytest.raises(SystemExit) as ended:
        dataset.run_command(lambda: train.main(["--data", str(demo), "--out", str(tmp_path), *SMALL]))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: out of memory: try a lower -b (--batch-size), --size or --cache\n"


ODD = {  # labels of 1.jpg, 2.jpg, ... -> more options, and what is wrong with them, if anything
    "no positive in val": ("10000000", [], None),
    "a class with no negative": ("1" * 9, [], None),
    "a class with no positive": ("0" * 9, [], None),
    "three images": ("101", ["--size", "64"], None),
    "three small images": ("101", [], "with -b 16 and 1 images to train on"),
    "a batch larger than the data": ("101010101", ["-b", "64"], None),
    "a last batch of one": ("1010101", ["-b", "2", "--head", "bn"], None),
    "batches of one": ("101010101", ["-b", "1", "--head", "bn"], "BatchNorm needs two: raise -b, or add images"),
    "batches of one, small images": ("101010101", ["-b", "1"], "BatchNorm needs two: raise -b, or add images"),
    "only NA": ("?" * 9, [], "no label of the train split is known: there is nothing to learn from"),
    "one image": ("1", [], "1 images are too few for 3 splits"),
    "two images": ("10", [], "2 images are too few for 3 splits: add images, or change --split"),
    "two images, two splits": ("11", ["--split", "1", "1", "0", "--size", "64"], None),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_data_trains_or_says_why_not(make_data, tmp_path, capsys, case):
    labels, more, message = ODD[case]
    names = [f"{i}.jpg" for i in range(len(labels))]
    data = make_data("".join(f"{name} {label}\n" for name, label in zip(names, labels)), names)
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1", *SMALL, *more]
    if message is None:
        report = train.main(arguments)
        assert math.isfinite(report["loss"]) and (tmp_path / "out" / "metrics.json").exists()
        return
    with pytest.raises(SystemExit) as ended:
        dataset.run_command(lambda: train.main(arguments))
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()
