"""Runs that are killed, interrupted, resumed or out of disk lose nothing; one folder holds one run."""

import contextlib
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dataset
import inference
import train
from conftest import (
    ROOT,
    SMALL,
    as_command,
    files_of,
    read_json,
    read_rows,
    refused,
    same_tensors,
    tensors,
)
from dataset import InputError

pytestmark = pytest.mark.usefixtures("blank_pictures")


class Killed(BaseException):
    """Stands for a process that is killed: nothing handles it."""


def saved_state(out):
    return inference.read_checkpoint(out / "last.pth")["state"]


def history(out):
    """Return the rows of history.csv, without what the clock says; none when it is not there."""
    if not (out / "history.csv").exists():
        return []
    timed = ("seconds", "images_per_second")
    return [{name: cell for name, cell in row.items() if name not in timed} for row in read_rows(out / "history.csv")]


@contextlib.contextmanager
def calls_at(actions):
    """Call actions[n]() before the n-th step of training in the block, and collect the steps: (finished epochs, rate
    of the head)."""
    train_step = train.train_step
    steps = []

    def watched(run, *batch):
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: steps.append((run.state.epoch, optimizer.param_groups[-1]["lr"])))
        try:
            actions.get(len(steps) + 1, lambda: None)()
            return train_step(run, *batch)
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        yield steps


def interrupt():
    signal.raise_signal(signal.SIGINT)


def kill():
    raise Killed


@contextlib.contextmanager
def time_limit(seconds):
    """Fail when the block takes longer."""

    def fail(*_):
        pytest.fail(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def options(few_images, tmp_path):
    """Return the arguments of a run on few_images into tmp_path/out."""
    return [*SMALL, "--data", str(few_images), "--out", str(tmp_path / "out")]


# ----------------------------------------------------------------------------------------------------------
# Killed

# Starts the runs as forks of one process that has imported everything. They draw no charts, and the disk is slow, so
# that many kills come while a file is written.
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import conftest, train
import torchvision.models
from PIL import Image
conftest.use_small_networks()
for module, name in conftest.CHARTS:
    setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))
fsync = os.fsync

def slow_fsync(file):
    time.sleep({delay})
    fsync(file)

os.fsync = slow_fsync

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

def resume_option():
    return ["--resume"] if os.path.exists("parts/{first}") else []

def saving():
    return any(name.endswith(".tmp") for _, _, names in os.walk("parts") for name in names)

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.time()
assert code(start("whole")) == 0
length = time.time() - began
rng = random.Random(0)
hits = 0
for kill in range({kills}):
    pid = start("parts", *resume_option())
    end = time.time() + rng.uniform(0, 0.5 * length)
    while time.time() < end and not (kill % 2 and saving()):  # every second one while a file is written
        time.sleep(0.001)
    if kill % 2 == 0:
        time.sleep(rng.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    assert code(pid) in (0, -signal.SIGKILL)
    hits += saving()
assert code(start("parts", *resume_option())) == 0
assert hits and not saving(), hits
print(f"{{length:.1f}} s without a stop; {{hits}} of {kills} kills left a file half-written")
"""


def kill_often(folder, arguments, kills, delay=0.01, first="last.pth"):
    """Run into folder/whole, and into folder/parts with many kills. `first`: the file that a run is resumed from."""
    script = KILLER.format(tests=str(ROOT / "tests"), arguments=arguments, kills=kills, delay=delay, first=first)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return folder / "whole", folder / "parts"


def test_a_run_killed_many_times_ends_as_one_that_never_was(demo, tmp_path):
    arguments = ["--data", str(demo), "--epochs", "4", "--head", "mlp", "--augment", "rich", "--sam", "0.1", *SMALL,
                 "--workers", "2"]
    whole, parts = kill_often(tmp_path, arguments, 12)
    for name in ("model.pth", "last.pth"):
        assert same_tensors(tensors(whole / name), tensors(parts / name))
    assert history(whole) == history(parts)
    assert read_json(whole / "metrics.json") == read_json(parts / "metrics.json")
    assert files_of(whole).keys() == files_of(parts).keys()


# ----------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [2, 4])  # within the first epoch, and in its last step, before the validation
def test_a_signal_saves_the_step_in_hand(demo, trained, tmp_path, capfd, number, code, at):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    before = signal.getsignal(number)

    def interrupt_repeatedly():  # as timeout and SLURM do
        signal.raise_signal(number)
        signal.raise_signal(number)

    with calls_at({at: interrupt_repeatedly}) as steps:
        status, _, errors = as_command(capfd, train.main, *options)

    assert len(steps) == at
    assert status == code
    assert signal.getsignal(number) is before
    count = saved_state(tmp_path)["images"]
    assert (0 < count < len(read_rows(tmp_path / "train_metadata.csv"))) == (at == 2)
    assert "finishing the current step, then saving and stopping" in errors
    assert f"stopped after {count} images of epoch 1: the same command with --resume continues from here" in errors
    assert train.main([*options, "--resume"]) == trained[1]
    assert same_tensors(tensors(tmp_path / "model.pth"), tensors(trained[0] / "model.pth"))
    assert history(tmp_path) == history(trained[0])


def interrupt_calls(monkeypatch, module, name, at, number=signal.SIGINT):
    """Raise a signal within the call number `at` of a function, counted from 1; return the list of its calls."""
    function, calls = getattr(module, name), []

    def watched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            signal.raise_signal(number)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.mark.parametrize("at, every", [(1, "0"), (9, "1")])  # a batch of val in epoch 1, and of train in epoch 2
def test_a_signal_abandons_a_validation_which_a_resumed_run_does_again(options, tmp_path, monkeypatch, at, every):
    arguments = [*options, "--epochs", "2", "-b", "2", "--split", "0.5", "0.3", "0.2", "--monitor", "loss",
                 "--train-metrics-every", every]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = train.main([*arguments, "--out", str(whole)])

    with monkeypatch.context() as patch:
        batches = interrupt_calls(patch, inference, "forward_views", at)
        with pytest.raises(KeyboardInterrupt):
            train.main([*arguments, "--out", str(parts)])
    assert len(batches) == at  # and none after it
    state, images = saved_state(parts), len(read_rows(whole / "train_metadata.csv"))
    assert (state["epoch"], state["images"], len(state["history"])) == (at // 9, images, at // 9)

    with calls_at({}) as steps:
        assert train.main([*arguments, "--out", str(parts), "--resume"]) == report
    assert len(steps) == images // 2 * (1 - at // 9)
    for name in ("model.pth", "last.pth"):
        assert same_tensors(tensors(whole / name), tensors(parts / name))
    assert history(whole) == history(parts)
    assert saved_state(whole)["losses"] == saved_state(parts)["losses"]


@pytest.mark.parametrize("name, at, finished", [("write_history", 2, 2), ("choose_layers", 2, 1)])
def test_a_signal_outside_of_steps_is_not_lost(demo, trained, tmp_path, monkeypatch, name, at, finished):
    arguments = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    with monkeypatch.context() as patch:
        interrupt_calls(patch, train, name, at, signal.SIGTERM)
        with calls_at({}) as steps, pytest.raises(SystemExit) as ended:
            train.main(arguments)
    assert ended.value.code == 143
    assert saved_state(tmp_path)["epoch"] == finished
    assert len(steps) == len(saved_state(tmp_path)["losses"])
    assert not (tmp_path / "metrics.json").exists()
    assert train.main([*arguments, "--resume"]) == trained[1]


def test_a_signal_that_comes_while_the_processes_agree_whether_to_stop_is_not_lost(monkeypatch):
    run = SimpleNamespace(signal=0, classifier=SimpleNamespace(device=torch.device("cpu")))
    stops = []
    monkeypatch.setattr(train.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "save_and_stop", lambda run: stops.append(run.signal))

    # The others have not been told yet, so this process must not stop without them.
    monkeypatch.setattr(train.distributed, "all_reduce", lambda *_: setattr(run, "signal", signal.SIGTERM))
    train.stop_if_asked(run)
    assert stops == []

    monkeypatch.setattr(train.distributed, "all_reduce", lambda *_: None)
    train.stop_if_asked(run)
    assert stops == [signal.SIGTERM]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, InputError("wrong"), SystemExit(143)])
def test_ctrl_c_while_a_command_exits_shows_no_traceback(capsys, error):
    def main():
        if error:
            raise error

    try:
        with contextlib.suppress(SystemExit):
            dataset.run_command(main)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the kernel ends the process
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_in_the_final_report_acts_at_once_and_a_resumed_run_reports(demo, trained, tmp_path, monkeypatch):
    arguments = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    with monkeypatch.context() as patch:
        calls = interrupt_calls(patch, inference, "forward_views", 3)  # two of them are in training
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    assert len(calls) == 3
    assert (saved_state(tmp_path)["epoch"], saved_state(tmp_path)["images"]) == (2, 0)
    assert train.main([*arguments, "--resume"]) == trained[1]


def test_the_second_signal_acts_at_once(demo, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "REPEATS", 0)
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    before = signal.getsignal(signal.SIGINT)

    def interrupt_twice():
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        raise KeyboardInterrupt

    with calls_at({6: interrupt_twice}) as steps, pytest.raises(KeyboardInterrupt):
        train.main(options)
    assert len(steps) == 5
    assert signal.getsignal(signal.SIGINT) is before
    state = saved_state(tmp_path)
    assert (state["epoch"], state["images"], len(state["losses"])) == (1, 0, 4)
    assert train.main([*options, "--resume"]) == trained[1]


def test_the_state_counts_images_and_a_step_is_one_call(options, tmp_path):
    options = [*options, "--epochs", "1", "-b", "4"]
    with calls_at({2: interrupt}), pytest.raises(KeyboardInterrupt):
        train.main(options)
    state = saved_state(tmp_path / "out")
    assert state["epoch"] == 0
    assert 7 <= state["images"] <= 8
    assert len(state["losses"]) == 2
    assert state["history"] == []
    with calls_at({}) as steps:
        train.main([*options, "--resume"])
    state = saved_state(tmp_path / "out")
    assert (state["epoch"], state["images"], len(state["history"])) == (1, 0, 1)
    assert len(state["losses"]) == 2 + len(steps)


# ----------------------------------------------------------------------------------------------------------
# Resumed with other options


def test_resume_says_what_changed_and_refuses_what_must_not(trained, demo, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    options = ["--data", str(demo), "--out", str(tmp_path / "run"), "--resume", *SMALL]
    train.main([*options, "--epochs", "3", "--lr", "1e-4", "-b", "8"])
    errors = capsys.readouterr().err
    for change in ("epochs 2 -> 3", "batch_size 16 -> 8", "lr 0.001 -> 0.0001"):
        assert change in errors
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["1", "2", "3"]

    before = files_of(tmp_path / "run")
    for more, message in ((["--seed", "1"], "is of other splits"),
                          (["--backbone", "resnet50"], "--backbone resnet18"),
                          (["--head", "bn"], "has --head linear")):

        with pytest.raises(InputError, match=message):
            train.main([*options, *more])
    with pytest.raises(InputError, match=r"last\.pth is not there: without --resume a run starts"):
        train.main([*options, "--out", str(tmp_path / "none")])
    assert before == files_of(tmp_path / "run")
    assert not (tmp_path / "none").exists()


def test_resuming_with_another_rate_and_weight_decay_uses_them(options, tmp_path):
    out = tmp_path / "out"
    options = [*options, "--schedule", "constant"]
    train.main([*options, "--epochs", "1", "--lr", "1e-3", "--wd", "0.01"])
    with calls_at({}) as steps:
        train.main([*options, "--epochs", "2", "--lr", "1e-5", "--wd", "0.5", "--resume"])
    assert [rate for _, rate in steps] == pytest.approx([1e-5] * len(steps))
    assert [float(row["lr"]) for row in history(out)] == pytest.approx([1e-3, 1e-5])
    assert float(history(out)[1]["lr_backbone"]) == pytest.approx(1e-5)
    for group in inference.read_checkpoint(out / "last.pth")["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(1e-5)
        assert group["weight_decay"] == pytest.approx(0.5)


def test_resuming_with_another_schedule_uses_it(options):
    options = [*options, "--lr", "1e-3"]
    train.main([*options, "--epochs", "1", "--schedule", "cosine"])
    with calls_at({}) as steps:
        train.main([*options, "--epochs", "3", "--schedule", "multistep", "--milestones", "2",
                    "--lr-decay", "0.5", "--resume"])
    assert dict(steps) == {1: pytest.approx(1e-3), 2: pytest.approx(5e-4)}


def test_the_rate_goes_on_with_the_images_when_the_batch_size_changes_within_an_epoch(demo, tmp_path):
    options = [*SMALL, "--data", str(demo), "--epochs", "2", "--schedule", "cosine", "--lr", "3e-4"]
    with calls_at({}) as expected:
        train.main([*options, "-b", "4", "--out", str(tmp_path / "whole")])

    half = len(expected) // 4  # half of the first of two epochs
    parts = ["--out", str(tmp_path / "parts")]
    with calls_at({half: interrupt}) as first, pytest.raises(KeyboardInterrupt):
        train.main([*options, "-b", "4", *parts])
    assert first == expected[:half]
    with calls_at({}) as second:
        train.main([*options, "-b", "8", *parts, "--resume"])

    assert second[0][1] == pytest.approx(expected[half][1], rel=0.1)
    begin_expected = next(rate for epoch, rate in expected if epoch == 1)
    begin = next(rate for epoch, rate in second if epoch == 1)
    assert begin == pytest.approx(begin_expected, rel=0.2)
    assert second[-1][1] == pytest.approx(expected[-1][1], abs=0.05 * 3e-4)
    in_epoch = [epoch for epoch, _ in second].count(0)
    assert in_epoch == pytest.approx(half / 2, abs=1)


def test_a_smaller_batch_size_on_resume_ends_also_when_few_labels_are_known(make_rows, tmp_path):
    data = make_rows(["1 0", *["NA NA"] * 4, "0 1", *["NA NA"] * 4] * 4)
    options = [*SMALL, "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "2",
               "--split", "0.5", "0.25", "0.25"]
    with calls_at({2: interrupt}), pytest.raises(KeyboardInterrupt):
        train.main([*options, "-b", "5"])
    assert history(tmp_path / "out") == []
    with time_limit(60):
        train.main([*options, "-b", "2", "--resume"])
    assert [row["epoch"] for row in history(tmp_path / "out")] == ["1", "2"]
    assert (tmp_path / "out" / "metrics.json").exists()


def test_another_monitor_on_resume_decides_what_is_best(make_rows, tmp_path):
    red = [int(40 * i % 255 > 127) for i in range(40)]  # as make_data() paints them
    data = make_rows(red, "image red")
    split = dataset.split(dataset.read_labels(data), method="random", seed=0)
    for row in [*split[1], *split[2]]:  # val says the opposite of train: its loss rises from epoch to epoch
        red[row] = 1 - red[row]
    make_rows(red, "image red")

    out = tmp_path / "out"
    options = [*SMALL, "--data", str(data), "--out", str(out), "--split-method", "random",
               "--schedule", "constant", "--lr", "1e-2", "-b", "4", "--pos-weight", "none",
               "--augment", "none"]
    assert train.main([*options, "--monitor", "map", "--epochs", "1"])["epoch"] == 1
    report = train.main([*options, "--monitor", "loss", "--epochs", "3", "--resume"])
    losses = [float(row["val_loss"]) for row in history(out)]
    assert len(losses) == 3
    assert min(losses) == losses[0]
    assert report["epoch"] == 1
    assert inference.load_model(out / "model.pth", "cpu", "fp32").epoch == 1


@pytest.mark.parametrize("before, after", [("bf16", "fp16"), ("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_is_resumed_in_another_precision(options, tmp_path, before, after):
    train.main([*options, "--epochs", "1", "--precision", before])
    train.main([*options, "--epochs", "2", "--precision", after, "--resume"])
    assert [row["epoch"] for row in history(tmp_path / "out")] == ["1", "2"]
    assert inference.read_checkpoint(tmp_path / "out" / "last.pth")["precision"] == after


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_auto_on_resume_takes_the_precision_of_the_run(options, tmp_path, precision):
    train.main([*options, "--epochs", "1", "--precision", precision])
    train.main([*options, "--epochs", "2", "--precision", "auto", "--resume"])
    assert inference.read_checkpoint(tmp_path / "out" / "last.pth")["precision"] == precision


def test_resuming_a_finished_run_with_other_thresholds_changes_all_that_depends_on_them(options, tmp_path):
    out = tmp_path / "out"
    train.main([*options, "--epochs", "1"])
    before = tensors(out / "model.pth")
    report = train.main([*options, "--epochs", "1", "--resume", "--thresholds", "0.9"])
    assert set(read_json(out / "thresholds.json").values()) == {0.9}
    assert set(inference.load_model(out / "model.pth").thresholds) == {0.9}
    assert {row["threshold"] for row in report["per_class"].values()} == {0.9}
    assert read_json(out / "metrics.json")["f1_macro"] == report["f1_macro"]
    assert read_json(out / "config.json")["thresholds"] == 0.9
    assert same_tensors(tensors(out / "model.pth"), before)


def test_labels_that_were_corrected_since_are_not_passed_over(options, few_images, tmp_path):
    train.main([*options, "--epochs", "1"])
    text = (few_images / "labels.txt").read_text()
    (few_images / "labels.txt").write_text(text.replace("00.png 0 0", "00.png 0 NA"))
    before = files_of(tmp_path / "out")
    with pytest.raises(InputError, match=r"labels differ from those that .*last\.pth was trained with: give the same"):
        train.main([*options, "--epochs", "2", "--resume"])
    assert before == files_of(tmp_path / "out")


def change_state(path, change):
    """Change the content of a last.pth."""
    content = inference.read_checkpoint(path)
    change(content)
    torch.save(content, path)


def test_resume_needs_no_weights_and_knows_which_layers_had_none(few_images, trained, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save({name: tensor for name, tensor in tensors(trained[0] / "model.pth").items()
                if not name.startswith(("layer2", "fc"))}, weights)
    arguments = [*SMALL, "--data", str(few_images), "--weights", str(weights), "--epochs", "4", "-b", "4"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    arguments += ["--out", str(tmp_path / "parts")]
    with calls_at({2: interrupt}), pytest.raises(KeyboardInterrupt):  # the head and layer2 are trained alone
        train.main(arguments)
    weights.unlink()
    train.main([*arguments, "--resume"])
    whole, parts = (tensors(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert same_tensors(whole, parts)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")

    monkeypatch.setattr(inference, "_download", lambda *_: pytest.fail("downloaded again"))
    train.main([*arguments, "--resume", "--weights", "imagenet"])


def test_weights_that_are_named_anew_on_resume_are_said_to_be_unused(options, trained, tmp_path, capsys):
    train.main([*options, "--epochs", "1"])
    capsys.readouterr()
    train.main([*options, "--epochs", "1", "--resume", "--weights", str(trained[0] / "model.pth")])
    errors = capsys.readouterr().err
    assert f"--weights {trained[0]}/model.pth is not loaded" in errors
    assert "weights none ->" not in errors


def test_a_state_that_does_not_say_what_was_new_is_an_error_of_one_line(options, tmp_path, capsys):
    train.main([*options, "--epochs", "1"])
    change_state(tmp_path / "out" / "last.pth", lambda content: content.pop("fresh"))
    error = refused(capsys, train.main, *options, "--resume")
    assert "last.pth was written by an older version" in error and "start again without --resume" in error


def with_lists(content):
    """Change a checkpoint to what older versions wrote: a list of numbers where there is a tensor now."""
    content["trained_on"] = inference.unpack_keys(content["trained_on"])


def test_files_of_versions_that_saved_lists_of_keys_are_read_like_new_ones(options, trained, tmp_path):
    out = tmp_path / "out"
    train.main([*options, "--epochs", "1"])
    old = {name: inference.read_checkpoint(out / name)["trained_on"] for name in ("model.pth", "last.pth")}
    keys = inference.load_model(out / "model.pth").trained_on
    assert len(keys) > 2 and all(0 <= key < 2**64 for key in keys) and max(keys) >= 2**63
    for name in old:
        change_state(out / name, with_lists)
        assert inference.read_weights(out / name, "resnet18").trained_on == keys
    assert inference.load_model(out / "model.pth").trained_on == keys

    train.main([*options, "--epochs", "2", "--resume"])
    for name, tensor in old.items():
        assert inference.read_checkpoint(out / name)["trained_on"].equal(tensor)


def test_images_are_known_by_all_64_bits_of_their_keys(monkeypatch):
    keys = [2**63 + 1, 2**62 + 1, 5, 2**64 - 1]
    monkeypatch.setattr(dataset, "image_keys", lambda table: np.array(keys, np.uint64))
    assert inference.was_trained_on([2**64 - 1, 2**62, 2**63 + 1], None).tolist() == [True, False, False, True]
    assert not inference.was_trained_on([], None).any()
    keys = keys[1:3]  # numbers below 2^63, beside one above
    assert inference.was_trained_on([2**62, 2**63 + 1, 5], None).tolist() == [False, True]


@pytest.mark.parametrize("monitor", ["last", "loss"])
@pytest.mark.parametrize("epochs", ["1", "2"])
def test_the_last_epoch_of_a_run_that_is_cut_short_is_validated(options, tmp_path, monitor, epochs):
    arguments = [*options, "--val-every", "5", "--monitor", monitor, "-b", "8"]
    with calls_at({7: kill}), pytest.raises(Killed):
        train.main([*arguments, "--epochs", "7"])
    assert (saved_state(tmp_path / "out")["epoch"], saved_state(tmp_path / "out")["images"]) == (2, 0)
    assert not (tmp_path / "out" / "model.pth").exists()
    state = tensors(tmp_path / "out" / "last.pth")
    report = train.main([*arguments, "--epochs", epochs, "--resume"])
    assert report["epoch"] == 2
    assert float(history(tmp_path / "out")[-1]["val_loss"]) == pytest.approx(report["val_loss"])
    assert same_tensors(tensors(tmp_path / "out" / "model.pth"), state)
    report = train.main([*arguments, "--epochs", "3", "--monitor", "last", "--resume"])
    assert report["epoch"] == 3


def test_a_run_that_was_stopped_after_its_last_validation_keeps_its_last_epoch(options, tmp_path):
    arguments = [*options, "--val-every", "2", "-b", "8"]
    with calls_at({10: kill}), pytest.raises(Killed):
        train.main([*arguments, "--epochs", "9"])
    assert (saved_state(tmp_path / "out")["epoch"], saved_state(tmp_path / "out")["images"]) == (3, 0)
    assert inference.load_model(tmp_path / "out" / "model.pth", "cpu").epoch == 2
    assert train.main([*arguments, "--epochs", "3", "--resume"])["epoch"] == 3
    assert same_tensors(*(tensors(tmp_path / "out" / name) for name in ("model.pth", "last.pth")))


def test_a_run_that_is_cut_short_before_any_validation_says_how_far_it_must_go(options, tmp_path, capsys):
    arguments = [*options, "--val-every", "5", "-b", "8"]
    with calls_at({7: interrupt}), pytest.raises(KeyboardInterrupt):  # within epoch 3
        train.main([*arguments, "--epochs", "7"])
    error = refused(capsys, train.main, *arguments, "--epochs", "2", "--resume", warns=True)
    assert error.startswith("error: --resume --epochs 2: no epoch was validated yet")
    assert error.endswith("give --epochs 3 or more")
    assert train.main([*arguments, "--epochs", "3", "--resume"])["epoch"] == 3


def test_fewer_epochs_than_are_trained_end_the_run_as_it_is(options, tmp_path, capsys):
    report = train.main([*options, "--epochs", "3"])
    capsys.readouterr()
    again = train.main([*options, "--epochs", "1", "--resume"])
    assert "--epochs 1: 3 epochs are trained already" in capsys.readouterr().err
    assert again == report


def saved_run(options, out, losses, monitor):
    """Train for three epochs with these losses on val; the monitor decides which epoch is kept."""

    def evaluate(run, split, **more):
        table, probabilities, report = evaluate_split(run, split, **more)
        return table, probabilities, report | {"loss": losses[run.state.epoch] if split == "val" else 1.0}

    evaluate_split = train.evaluate_split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_split", evaluate)
        losses = [*losses, losses[-1]]  # at the end, on val, after the last epoch
        train.main([*options, "--epochs", "3", "--monitor", monitor])


@pytest.mark.parametrize("before, losses, more, lost", [
    ("last", (1.0, 2.5, 4.6), ["--monitor", "loss"], 1),
    ("last", (1.0, 2.5, 4.6), ["--monitor", "loss", "--epochs", "5"], 1),
    ("loss", (3.0, 2.9, 2.8), ["--monitor", "loss", "--min-delta", "1"], 1),
    ("last", (3.0, 2.0, 4.6), ["--monitor", "loss", "--patience", "3"], 2),
])
def test_an_epoch_that_is_best_by_other_options_but_lost_is_an_error(options, tmp_path, capsys, before, losses, more,
                                                                    lost):
    saved_run(options, tmp_path / "out", losses, before)
    files = files_of(tmp_path / "out")
    error = refused(capsys, train.main, *options, "--epochs", "3", *more, "--resume", warns=True)
    assert f"epoch {lost} is the best, but its network is lost" in error
    assert f"model.pth holds epoch 3): resume with --monitor {before} --min-delta 0, or" in error
    assert files == files_of(tmp_path / "out")


@pytest.mark.parametrize("before, losses, after, kept", [
    ("last", (4.6, 2.5, 1.0), "loss", 3),  # the epoch that was kept
    ("loss", (1.0, 2.5, 4.6), "last", 3),  # the one of last.pth
    ("loss", (1.0, 0.5, 4.6), "loss", 2),
])
def test_an_epoch_that_is_best_by_other_options_and_at_hand_is_kept(options, tmp_path, before, losses, after, kept):
    saved_run(options, tmp_path / "out", losses, before)
    last = tensors(tmp_path / "out" / "last.pth")
    before = tensors(tmp_path / "out" / "model.pth")
    assert train.main([*options, "--epochs", "3", "--monitor", after, "--resume"])["epoch"] == kept
    assert same_tensors(tensors(tmp_path / "out" / "model.pth"), last if kept == 3 else before)


@pytest.mark.parametrize("monitor, more", [("loss", ["--loss", "asymmetric", "--pos-weight", "sqrt"]),
                                           ("loss", ["--pos-weight", "none"]), ("f1", ["--thresholds", "0.3"]),
                                           ("f1", ["--calibration", "none"])])
def test_epochs_that_are_measured_in_another_way_are_not_compared(options, tmp_path, capsys, monitor, more):
    arguments = [*options, "--monitor", monitor, "--resume"]
    train.main([*arguments[:-1], "--epochs", "1"])
    before = files_of(tmp_path / "out")
    error = refused(capsys, train.main, *arguments, "--epochs", "2", *more)
    assert f"error: --resume: with another {more[0]} the {monitor} of further epochs cannot be compared" in error
    assert before == files_of(tmp_path / "out")
    train.main([*arguments, "--epochs", "1", *more])  # no further epoch
    train.main([*options, "--resume", "--epochs", "2", "--monitor", "map", *more])


def test_a_run_killed_between_its_two_checkpoints_still_has_its_best_epoch(demo, trained, tmp_path, monkeypatch):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        save_model = inference.save_model
        patch.setattr(inference, "save_model", lambda classifier, path: (
            kill() if classifier.epoch == 2 else save_model(classifier, path)))
        train.main(options)
    assert saved_state(tmp_path)["epoch"] == 2
    assert inference.load_model(tmp_path / "model.pth", "cpu").epoch == 1
    assert train.main([*options, "--resume"]) == trained[1]
    assert same_tensors(tensors(tmp_path / "model.pth"), tensors(trained[0] / "model.pth"))


# ----------------------------------------------------------------------------------------------------------
# One folder, one run


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_killed_in_its_first_epoch_is_not_resumed_as_the_run_before_it(options, tmp_path, finished):
    out = tmp_path / "out"
    options = [*options, "-b", "4"]
    if finished:
        train.main([*options, "--epochs", "2"])
        assert (out / "metrics.json").exists()
    else:
        with calls_at({6: interrupt}), pytest.raises(KeyboardInterrupt):
            train.main([*options, "--epochs", "2"])
    assert (out / "last.pth").exists()

    with calls_at({2: kill}), pytest.raises(Killed):
        train.main([*options, "--epochs", "3"])
    left = {path.name for path in out.iterdir()}
    assert not left & {"metrics.json", "model.pth", "last.pth", "history.csv"}  # those of the run before

    with calls_at({}) as steps, pytest.raises(InputError, match=r"last\.pth is not there"):
        train.main([*options, "--epochs", "3", "--resume"])
    assert steps == []


def test_a_fresh_run_says_that_it_replaces_one_and_leaves_nothing_of_it(options, tmp_path, capsys):
    loud = [option for option in options if option != "-q"]
    out = tmp_path / "out"
    train.main([*loud, "--epochs", "2", "--thresholds", "global", "--plot-title", "First: a/b"])
    assert "replace" not in capsys.readouterr().out
    assert len(list(out.glob("predictions_*.json"))) == 1
    assert len(list(out.glob("First*.png"))) == 1
    (out / "notes.txt").write_text("mine")
    train.main([*loud, "--epochs", "1", "--lr", "0.01"])
    assert f"the run that was in {out} is replaced" in capsys.readouterr().out
    train.main([*options, "--epochs", "1", "--lr", "0.01", "--out", str(tmp_path / "new")])
    expected = {path.name for path in (tmp_path / "new").iterdir()}
    assert {path.name for path in out.iterdir()} == expected | {"notes.txt"}
    assert len(history(out)) == 1


def test_a_second_run_into_the_same_folder_is_an_error_and_does_no_harm(options, tmp_path, capsys):
    ended = []

    def start_another():
        names = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
        for more in ([], ["--resume"]):
            ended.append(refused(capsys, train.main, *options, *more, warns=True))
        assert names == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}

    with calls_at({3: start_another}):
        report = train.main([*options, "--epochs", "2"])
    assert len(ended) == 2
    assert ended[0].startswith(f"error: --out {tmp_path}/out: another run writes there")
    again = train.main([*options, "--epochs", "2"])  # the folder is free again
    assert again == report


# ----------------------------------------------------------------------------------------------------------
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
    before = tensors(path)
    size = path.stat().st_size
    torch.nn.init.normal_(classifier.network.conv1.weight)
    for stage in range(20):
        with file_size_limit(stage * size // 20), pytest.raises(OSError) as error:
            inference.save_model(classifier, path)
        assert str(error.value) == f"{path} cannot be written: File too large"
        assert same_tensors(tensors(path), before)
        assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    inference.save_model(classifier, path)
    assert not same_tensors(tensors(path), before)


def test_a_run_out_of_disk_ends_in_one_line_and_can_be_resumed(demo, trained, tmp_path, capsys):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "2", *SMALL]
    sizes = [(trained[0] / name).stat().st_size for name in ("model.pth", "last.pth")]
    assert sizes[0] < sizes[1]
    with contextlib.ExitStack() as limits:
        fill = lambda: limits.enter_context(file_size_limit(sum(sizes) // 2))  # noqa: E731
        with calls_at({5: fill}):  # the first step of epoch 2
            code, _, errors = as_command(capsys, train.main, *options)
    lines = errors.splitlines()
    assert (code, len(lines)) == (1, 1)
    assert "last.pth cannot be written: File too large" in lines[0]
    assert saved_state(tmp_path)["epoch"] == 1
    assert train.main([*options, "--resume"]) == trained[1]


def test_a_folder_that_cannot_be_written_is_an_error_at_once(options, tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/out"):
        with pytest.raises(InputError, match=rf"--out .*/{out}: .*cannot be written: "):
            train.main([*options, "--out", str(tmp_path / out)])


# ----------------------------------------------------------------------------------------------------------
# Untrusted checkpoints


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(trained, demo, tmp_path):
    proof = tmp_path / "proof"
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    image = str(next((demo / "images").iterdir()))
    calls = {
        "model.pth": lambda: inference.main([image, "--model", str(out / "model.pth"), "--device", "cpu"]),
        "last.pth": lambda: train.main(["--data", str(demo), "--out", str(out), "--resume", *SMALL]),
        "weights.pth": lambda: train.main([*SMALL, "--data", str(demo),
                                           "--weights", str(out / "weights.pth")]),
    }

    for name, call in calls.items():
        for zipped in (True, False):
            content = inference.read_checkpoint(trained[0] / "last.pth") | {"extra": Payload(proof)}
            torch.save(content, out / name, _use_new_zipfile_serialization=zipped)
            with pytest.raises(InputError, match=name) as error:
                call()
            assert not proof.exists()
            assert "\n" not in str(error.value)

    torch.load(out / "model.pth", weights_only=False)  # the payload itself works
    assert proof.is_dir()


def damaged(change):
    """Return a function that writes a changed model.pth of the trained run."""

    def write(trained, path):
        content = inference.read_checkpoint(trained[0] / "model.pth")
        change(content)
        torch.save(content, path)

    return write


MODELS = {
    "no file": (lambda trained, path: None, "model.pth does not exist: train a model first"),
    "a folder": (lambda trained, path: path.mkdir(),
                 "cannot be read as a PyTorch checkpoint: Is a directory"),
    "empty": (lambda trained, path: path.touch(), "cannot be read as a PyTorch checkpoint"),
    "text": (lambda trained, path: path.write_text("hello"), "model.pth"),
    "cut off": (lambda trained, path: path.write_bytes((trained[0] / "model.pth").read_bytes()[:99_999]),
                "model.pth"),
    "a state_dict": (lambda trained, path: torch.save({"conv1.weight": torch.ones(1)}, path),
                     "is not a model.pth of"),
    "a tensor": (lambda trained, path: torch.save(torch.ones(1), path), "is not a model.pth of train.py"),
    "last.pth": (lambda trained, path: shutil.copy(trained[0] / "last.pth", path),
                 "is not a model.pth of train.py"),
    "newer": (damaged(lambda content: content.update(format=99)), "has format 99, and this program reads 2"),
    "fewer classes": (damaged(lambda content: content["classes"].pop()),
                      "is damaged: its tensors are not those of a"),
    "no thresholds": (damaged(lambda content: content.update(thresholds=[])),
                      "is damaged: it has 0 thresholds"),
    "unknown network": (damaged(lambda content: content["members"][0].update(backbone="x")),
                        "model.pth has the backbone x, which this torchvision does not have"),
    "impossible size": (damaged(lambda content: content["members"][0].update(backbone="vit_b_32", size=33)),
                        "is damaged: its tensors are not"),
    "lost tensor": (damaged(lambda content: content["members"][0]["network"].pop("conv1.weight")),
                    "is damaged: its tensors"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_none(trained, demo, tmp_path, capsys, case):
    write, message = MODELS[case]
    path = tmp_path / "model.pth"
    write(trained, path)
    image = next((demo / "images").iterdir())
    assert message in refused(capsys, inference.main, image, "--model", path, "--device", "cpu")


LAST = {
    "empty": (lambda trained, path: path.write_bytes(b""), "cannot be read as a PyTorch checkpoint"),
    "model.pth": (lambda trained, path: shutil.copy(trained[0] / "model.pth", path),
                  "is not a last.pth of train.py"),
    "a tensor": (lambda trained, path: torch.save(torch.ones(1), path), "is not a last.pth of train.py"),
}


@pytest.mark.parametrize("case", LAST)
def test_states_that_are_none(trained, demo, tmp_path, capsys, case):
    write, message = LAST[case]
    shutil.copytree(trained[0], tmp_path / "run")
    write(trained, tmp_path / "run" / "last.pth")
    before = files_of(tmp_path / "run")
    assert message in refused(capsys, train.main, "--data", demo, "--out", tmp_path / "run", "--resume", *SMALL)
    assert before == files_of(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------
# Training that goes wrong


def test_a_loss_that_is_not_a_number_stops_the_run(demo, tmp_path, monkeypatch):
    options = ["--data", str(demo), "--out", str(tmp_path), "--epochs", "3", *SMALL]
    count = itertools.count(1)

    def broken(logits, targets, pos_weight):
        total, known = train.masked_bce(logits, targets, pos_weight)
        if next(count) == 7:  # after 4 iterations, val, and an iteration more
            total = total * math.nan
        return total, known

    with monkeypatch.context() as patch:
        patch.setitem(train.LOSSES, "bce", broken)
        message = r"the loss is nan at iteration 6, in epoch 2: .*lr.*holds epoch 1"
        with pytest.raises(RuntimeError, match=message):
            train.main(options)
    assert saved_state(tmp_path)["epoch"] == 1
    assert inference.load_model(tmp_path / "model.pth").epoch == 1
    assert train.main([*options, "--resume"])["epoch"] in (1, 2, 3)


@pytest.mark.parametrize("rate", ["1e30", "1e18"])
def test_weights_that_overflow_are_not_saved(demo, tmp_path, rate):
    with pytest.raises(RuntimeError, match="try a lower --lr, or --precision fp32"):
        train.main(["--data", str(demo), "--out", str(tmp_path), "--epochs", "3", "--lr", rate, *SMALL])
    for path in tmp_path.glob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in tensors(path).values())


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried ..."),
                                   MemoryError()])
def test_out_of_memory_gives_a_hint(options, capsys, error):
    def fail():
        raise error

    with calls_at({1: fail}):
        code, out, errors = as_command(capsys, train.main, *options)
    assert (code, out) == (1, "")
    assert errors == "error: out of memory: try a lower -b (--batch-size), --size or --cache\n"


ODD = {  # the labels of the images, more options, and what is wrong with them, if anything
    "no positive in val": ("10000000", [], None),
    "a class with no negative": ("1" * 9, [], None),
    "a class with no positive": ("0" * 9, [], None),
    "three images": ("101", ["--size", "64"], None),
    "three small images": ("101", [], "with -b 16 and 1 images to train on"),
    "a batch larger than the data": ("101010101", ["-b", "64"], None),
    "a last batch of one": ("1010101", ["-b", "2", "--head", "bn"], None),
    "batches of one": ("101010101", ["-b", "1", "--head", "bn"],
                       "BatchNorm needs two: raise -b, or add images"),
    "batches of one, small images": ("101010101", ["-b", "1"],
                                     "BatchNorm needs two: raise -b, or add images"),
    "only NA": ("?" * 9, [], "no label of the train split is known: there is nothing to learn from"),
    "one image": ("1", [], "1 images are too few for 3 splits"),
    "two images": ("10", [], "2 images are too few for 3 splits: add some, or change --split"),
    "two images, two splits": ("11", ["--split", "1", "1", "0", "--size", "64"], None),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_data_trains_or_says_why_not(make_rows, tmp_path, capsys, case):
    labels, more, message = ODD[case]
    data = make_rows(labels, "image odd")
    arguments = [*SMALL, "--data", data, "--out", tmp_path / "out", "--epochs", "1", *more]
    if message is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = train.main(list(map(str, arguments)))
        assert math.isfinite(report["loss"])
        assert (tmp_path / "out" / "metrics.json").exists()
        return

    assert message in refused(capsys, train.main, *arguments, warns=True)
    assert not (tmp_path / "out").exists()
