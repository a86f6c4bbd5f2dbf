"""Tests of the lines that show progress: when they appear, what they say, and that nothing is left of them."""

import io
import math
import re
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import inference
import train
from conftest import SMALL, as_command, refused
from dataset import Progress


class Terminal(io.StringIO):
    """A terminal that keeps what was written to it, and knows what its screen shows, if no line is too wide."""

    def isatty(self):
        return True

    def screen(self):
        """Return the lines on the screen, without the blanks at their ends."""
        lines, column = [""], 0
        for letter in self.getvalue():
            if letter == "\n":
                lines, column = [*lines, ""], 0
            elif letter == "\r":
                column = 0
            else:
                lines[-1] = lines[-1][:column].ljust(column) + letter + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Replace time.perf_counter() by a Clock."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def make_terminal(monkeypatch):
    """Make stdout and stderr one Terminal, on which progress is shown. Call it in the test: pytest sets both before."""

    def make(out=None):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", out or terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(Progress, "shown", True)
        monkeypatch.setenv("COLUMNS", "80")
        return terminal

    yield make
    assert Progress.line is None


def test_nothing_is_shown_for_two_seconds_and_then_five_lines_a_second(clock, make_terminal):
    terminal = make_terminal()
    with Progress("checking images", 2000) as progress:
        for _ in range(20):
            clock.now += 0.0999
            progress.advance(50)
        assert terminal.getvalue() == ""
        clock.now += 0.0021
        progress.advance(200)
        assert terminal.screen() == ["checking images  1,200/2,000  600/s  0:00:01 left"]

        for _ in range(100):
            clock.now += 0.01
            progress.advance(1)
        assert 4 <= terminal.getvalue().count("\r") - 1 <= 5
    assert terminal.screen() == [""]


def test_a_slow_rate_has_a_decimal_and_a_long_wait_has_hours(clock, make_terminal):
    terminal = make_terminal()
    with Progress("drawing", 10**4) as progress:
        clock.now += 4
        progress.advance(2)
        assert terminal.screen() == ["drawing  2/10,000  0.5/s  5:33:16 left"]


@pytest.mark.parametrize("columns, line", [
    (80, "predicting  1,200/2,000  300/s  0:00:02 left"),
    (44, "predicting  1,200/2,000  0:00:02 left"),
    (30, "predicting  0:00:02 left"),
    (15, "predicting"),
    (2, "p"),
])
def test_a_line_is_never_wider_than_the_terminal(clock, make_terminal, monkeypatch, columns, line):
    terminal = make_terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("predicting", 2000) as progress:
        for done in (600, 600):
            clock.now += 2
            progress.advance(done)
        assert terminal.screen() == [line]
    assert terminal.screen() == [""]
    assert max(map(len, terminal.getvalue().split("\r"))) < columns


def test_the_width_is_that_of_the_terminal_that_shows_the_line(monkeypatch):
    import pty
    import struct
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(theirs, "w") as stream, open(ours, "rb"):
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 37, 0, 0))
        assert dataset._count_columns(stream) == 37
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))  # as some programs leave it
        assert dataset._count_columns(stream) > 0


def test_text_that_is_printed_removes_the_line_and_the_next_update_brings_it_back(clock, make_terminal):
    terminal = make_terminal()
    with Progress("reading", 100) as progress:
        clock.now += 3
        progress.advance(30)
        dataset.print_text("warning: odd", file=sys.stderr)
        assert terminal.screen() == ["warning: odd", ""]
        clock.now += 3
        progress.advance(30)
        assert terminal.screen() == ["warning: odd", "reading  60/100  10/s  0:00:04 left"]
    dataset.print_text("done")
    assert terminal.screen() == ["warning: odd", "done", ""]


def test_work_within_work_shares_its_line(clock, make_terminal):
    terminal = make_terminal()
    with Progress("a long title of the whole", 10) as whole:
        clock.now += 3
        whole.advance(3)
        with Progress("a part", 10) as part:
            clock.now += 3
            part.advance(3)
            assert terminal.screen() == ["a part  3/10  1.0/s  0:00:07 left"]
        assert terminal.screen() == [""]
        whole.advance(3)
        assert terminal.screen() == ["a long title of the whole  6/10  1.0/s  0:00:04 left"]
    assert terminal.screen() == [""]


def test_the_line_is_removed_after_an_error(clock, make_terminal):
    terminal = make_terminal()
    with pytest.raises(ZeroDivisionError), Progress("dividing", 2) as progress:
        clock.now += 3
        progress.advance()
        progress.done / 0
    assert terminal.screen() == [""]


def test_more_than_the_total_and_nothing_at_all_are_no_errors(clock, make_terminal):
    terminal = make_terminal()
    with Progress("counting", 3) as progress:
        clock.now += 4
        progress.advance(0)
        assert terminal.screen() == ["counting  0/3  0.0/s  0:00:12 left"]
        clock.now += 4
        progress.advance(8)
        assert terminal.screen() == ["counting  8/3  1.0/s  0:00:00 left"]


def test_a_line_goes_to_stderr_while_stdout_is_a_file(clock, make_terminal):
    terminal = make_terminal(io.StringIO())
    with Progress("predicting", 3) as progress:
        clock.now += 3
        progress.advance()
        assert terminal.screen() == ["predicting  1/3  0.3/s  0:00:06 left"]
    assert sys.stdout.getvalue() == ""


def test_a_line_goes_to_stdout_in_a_notebook(clock, monkeypatch):
    class Notebook:
        @staticmethod
        def get_ipython():
            return "a shell"

    out, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(Progress, "shown", True)
    monkeypatch.setitem(sys.modules, "IPython", Notebook)
    with Progress("predicting", 3) as progress:
        clock.now += 3
        progress.advance()
    assert out.getvalue().startswith("\rpredicting  1/3")
    assert out.getvalue().endswith(" \r")
    assert errors.getvalue() == ""


@pytest.mark.parametrize("stream", ["file", "closed", None])
def test_nothing_is_shown_without_a_terminal(clock, monkeypatch, stream):
    file = io.StringIO() if stream else None
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(Progress, "shown", True)
    if stream == "closed":
        file.close()
    with Progress("predicting", 3) as progress:
        clock.now += 3
        progress.advance()
        assert Progress.line is None
    assert stream != "file" or file.getvalue() == ""


def test_a_million_calls_take_less_than_a_second(make_terminal):
    make_terminal()
    started = time.process_time()
    with Progress("counting", 10**6) as progress:
        for _ in range(10**6):
            progress.advance()
    assert time.process_time() - started < 1  # measured: 0.3, and half of that in an empty loop


# ----------------------------------------------------------------------------------------------------------
# The time left of a training


def test_a_step_with_sam_computes_the_layers_that_train_twice():
    network = inference.build_without_values("resnet18", 64)
    names = [name for name, _ in network.named_parameters()]
    for layers, first in (("all", 0), ("layer3,layer4,head", names.index("layer3.0.conv1.weight"))):
        options = train.parse_options(["--sam", "0.1", "--epochs", "2", "--train-layers", layers])
        train.set_epochs(options, 300)
        units = train.work_units(SimpleNamespace(options=options, member=SimpleNamespace(network=network), fresh=()))
        trained = 1 - first / len(names)
        assert units[layers, False] == pytest.approx(1 + 2 * trained)
        assert units[layers, True] == pytest.approx(1 + 5 * trained)


def simulate(options, folds, factor=1.0, resumed_at=(0, 0)):
    """Train without training; yield the estimated and the true time left, and the share that is done.

    Args: factor: by how much unfreezing slows down more than train.work_units() expects; resumed_at: the fold and
    epoch from which on a new process measures times.
    """
    options = train.parse_options(options)
    train.set_epochs(options, 300)
    rng = np.random.default_rng(0)
    member = SimpleNamespace(network=inference.build_without_values("resnet18", 64))
    units = train.work_units(SimpleNamespace(options=options, member=member, fresh=()))
    tables = {"train": range(600), "val": range(150), "test": [] if folds > 1 else range(150)}
    predicting = 0.008  # networks are a little faster there than in training
    late = train.layers_to_train(options, options.epochs) if options.unfreeze else None
    truth = {kind: 0.01 * value * (factor if kind[0] == late else 1) for kind, value in units.items()}
    speeds, moments, clock = {}, [], 0.0  # moments: (true time, estimate)

    for fold in range(1, folds + 1):
        run = SimpleNamespace(options=options, tables=tables, state=train.State(), speeds=speeds, fold=(fold, folds))
        for epoch in range(1, options.epochs + 1):
            kind = train.kind_of_step(options, epoch)
            while run.state.images < 600:
                seconds = 20 * truth[kind] * rng.lognormal(0, 0.1)
                run.state.images += 20
                run.state.seconds += seconds
                clock += seconds
                if (fold, epoch) > resumed_at:
                    moments.append((clock, train.estimate_left(run, units)))

            # What ProgressLine does after an epoch. Only the speed of training survives a resume.
            predicted = train.images_to_score(options, tables, epoch)
            clock += predicted * predicting
            if predicted and (fold, epoch) > resumed_at:
                speeds[train.PREDICT] = predicting
            speeds[kind] = run.state.seconds / 600
            run.state.epoch, run.state.images, run.state.seconds = epoch, 0, 0.0
        clock += (len(tables["val"]) + len(tables["test"])) * predicting

    for now, estimate in moments:
        yield estimate, clock - now, now / clock


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("options", [
    "--sam 0 --unfreeze layer4 --train-layers all",
    "--sam 0.1 --train-layers all --epochs 11",
    "--sam 0 --train-layers head --unfreeze late",
    "--sam 0.1 --train-layers head --unfreeze late",
    "--sam 0.1 --train-layers head --unfreeze all --unfreeze-epoch 9 --val-every 4 --train-metrics-every 5",
])
def test_the_time_left_is_right_from_a_tenth_of_the_run_on(options, folds):
    for factor in (1.0, 0.9):
        for estimate, left, done in simulate(f"--epochs 12 --size 64 {options}".split(), folds, factor):
            if 0.1 <= done < 0.97:
                assert 0.75 * left < estimate < 1.25 * left, (factor, done, estimate, left)


@pytest.mark.parametrize("folds, resumed_at", [(1, (1, 7)), (3, (2, 4))])
def test_the_time_left_is_right_after_a_resume(folds, resumed_at):
    words = ["--epochs", "12", "--size", "64", "--sam", "0.1", "--train-layers", "head", "--unfreeze", "late"]
    for estimate, left, done in simulate(words, folds, resumed_at=resumed_at):
        if done < 0.97:
            assert 0.75 * left < estimate < 1.25 * left, (done, estimate, left)


def test_an_epoch_that_is_faster_than_the_one_before_shortens_the_time_left():
    options = train.parse_options(["--epochs", "3", "--size", "64", "--sam", "0", "--weights", "none"])
    kind = train.kind_of_step(options, 1)
    units = {kind: 3.0, train.PREDICT: 1.0}
    run = SimpleNamespace(options=options, tables={"train": range(100), "val": [], "test": []}, speeds={kind: 3.0},
                          fold=(1, 1), state=train.State(epoch=1, images=10, seconds=10.0))
    # An image took 3 seconds before, and takes 1 second now.
    assert train.estimate_left(run, units) == pytest.approx(190 * 2)
    run.state.images, run.state.seconds = 50, 50.0
    assert train.estimate_left(run, units) == pytest.approx(150)


# ----------------------------------------------------------------------------------------------------------
# What commands show


@pytest.fixture
def hurried(monkeypatch):
    """Let every Progress show its line at once, and after every advance."""
    draw = Progress._draw

    def draw_again(progress, parts):
        draw(progress, parts)
        progress.due = -math.inf

    monkeypatch.setattr(Progress, "delay", 0)
    monkeypatch.setattr(Progress, "_draw", draw_again)


def test_a_training_with_folds_shows_each_stage_and_leaves_only_its_text(
        demo, tmp_path, make_terminal, hurried, blank_pictures, capsys, monkeypatch):
    words = ["--data", str(demo), "--epochs", "1", "--folds", "2", *(word for word in SMALL if word != "-q")]
    train.main([*words, "--out", str(tmp_path / "a")])
    plain = capsys.readouterr().out
    assert "\r" not in plain

    with monkeypatch.context():
        terminal = make_terminal()
        train.main([*words, "--out", str(tmp_path / "b")])
    lines = terminal.getvalue().split("\r")
    stages = ["fold 1/2  epoch 1/1  image ", "fold 1/2  epoch 1/1  predicting val  40/40", "fold 2/2  epoch 1/1  image",
              "fold 1/2  predicting val  40/40", "encoding images  ", "drawing heatmaps  "]
    for stage in stages:
        assert any(line.startswith(stage) for line in lines), stage
    assert any(" left in all" in line for line in lines if "epoch" in line)

    def words_of(text):  # without what differs between two runs
        return [re.sub(r"\d+ images/s .*", "", line).replace(str(tmp_path / "b"), str(tmp_path / "a"))
                for line in text]
    assert words_of(terminal.screen()[:-1]) == words_of(line.rstrip() for line in plain.splitlines())


def test_inference_shows_its_progress_and_keeps_stdout(trained, demo, make_terminal, hurried, capsys, tmp_path):
    words = [str(demo / "images"), "--model", str(trained[0] / "model.pth"), "-j", "0", "--device", "cpu"]
    inference.main(words)
    plain = capsys.readouterr().out

    file = io.StringIO()
    terminal = make_terminal(file)
    inference.main(words)
    inference.main([*words[1:], str(next((demo / "images").iterdir())), "--save", str(tmp_path / "drawn"), "--out",
                    str(tmp_path / "out.txt")])
    assert file.getvalue() == plain
    lines = terminal.getvalue().split("\r")
    assert any(line.startswith("predicting  80/80") for line in lines)
    assert any(line.startswith("drawing pictures  1/1") for line in lines)
    assert [line for line in terminal.screen() if "predicting" in line or "drawing" in line] == []


def test_predict_in_a_library_shows_nothing(trained, demo, make_terminal, hurried):
    classifier = inference.load_model(trained[0] / "model.pth", "cpu", "fp32")
    terminal = make_terminal()
    inference.predict(classifier, sorted((demo / "images").iterdir())[:40])
    assert terminal.getvalue() == ""


def test_check_and_evaluate_show_how_far_they_are(trained, demo, make_terminal, hurried):
    terminal = make_terminal()
    dataset.main([str(demo), "--check", "--sheet", str(trained[0].parent / "sheet.png")])
    inference.main(["--evaluate", str(demo), "--model", str(trained[0] / "model.pth"), "-j", "0", "--device", "cpu"])
    lines = terminal.getvalue().split("\r")
    for stage in ("opening images  80/80", "drawing the sheet  24/24", "decoding images  80/80", "predicting  80/80"):
        assert any(line.startswith(stage) for line in lines), stage
    assert not any("/80 " in line for line in terminal.screen())


def test_quiet_runs_and_other_ranks_show_nothing(few_images, tmp_path, make_terminal, hurried, monkeypatch):
    words = ["--data", str(few_images), "--epochs", "1", "--out", str(tmp_path / "out"), *SMALL]
    terminal = make_terminal()
    train.main(words)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(train, "is_leader", lambda: False)
    monkeypatch.setattr(train, "print_next_steps", lambda *_: None)
    monkeypatch.setattr(train, "read_data", lambda options: pytest.exit if Progress.shown else sys.exit("hidden"))
    with pytest.raises(SystemExit, match="hidden"):
        train.main([word for word in words if word != "-q"])


# ----------------------------------------------------------------------------------------------------------
# Ctrl-C in a long inference


@pytest.fixture
def signal_at(monkeypatch):
    """Raise a signal after a number of batches: signal_at(count, number)."""
    def install(count, number, name="forward_views", module=inference):
        calls, function = [], getattr(module, name)

        def watched(*arguments, **more):
            calls.append(1)
            if len(calls) == count:
                signal.raise_signal(number)
            return function(*arguments, **more)
        monkeypatch.setattr(module, name, watched)
    return install


@pytest.mark.parametrize("style", ["table", "csv", "json", "probabilities"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_predicted_so_far(trained, demo, tmp_path, capfd, signal_at, style, number, code):
    out = tmp_path / "out.txt"
    out.write_text("of an earlier run")
    words = [demo / "images", "--model", trained[0] / "model.pth", "-b", 10, "--device", "cpu", "--format", style]
    before = signal.getsignal(number)
    signal_at(3, number)
    status, printed, errors = as_command(capfd, inference.main, *words, "--out", out)
    assert (status, printed) == (code, "")
    assert errors.splitlines()[-1] == f"stopped after 30 of 80 images: {out}.partial"
    assert "stopping after the images in progress" in errors
    assert out.read_text() == "of an earlier run"
    assert signal.getsignal(number) is before

    # The same images alone give the same file.
    images = sorted((demo / "images").iterdir())[:30]
    inference.main([*map(str, images), *map(str, words[1:]), "--out", str(tmp_path / "thirty")])
    assert (tmp_path / "out.txt.partial").read_text() == (tmp_path / "thirty").read_text()


def test_a_signal_without_out_prints_what_was_predicted_so_far(trained, demo, capfd, signal_at):
    words = [demo / "images", "--model", trained[0] / "model.pth", "-b", 10, "--device", "cpu", "--format", "csv"]
    signal_at(1, signal.SIGINT)
    status, printed, errors = as_command(capfd, inference.main, *words, "--out", "/dev/stdout")
    assert (status, len(printed.splitlines())) == (130, 1 + 10)
    assert errors.splitlines()[-1] == "stopped after 10 of 80 images: /dev/stdout"


def test_the_second_ctrl_c_acts_at_once(trained, demo, tmp_path, capfd, monkeypatch):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(dataset, "REPEATS", 0)
    monkeypatch.setattr(inference, "forward_views", twice)
    words = [demo / "images", "--model", trained[0] / "model.pth", "--device", "cpu", "--out", tmp_path / "out.txt"]
    status, printed, _ = as_command(capfd, inference.main, *words)
    assert (status, printed) == (130, "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_pictures_are_drawn_keeps_them_and_the_predictions(trained, demo, tmp_path, capfd, signal_at):
    images = sorted((demo / "images").iterdir())[:5]
    words = [*images, "--model", trained[0] / "model.pth", "--device", "cpu", "--out", tmp_path / "out.txt",
             "--save", tmp_path / "drawn"]
    signal_at(2, signal.SIGTERM, "draw_sheet", dataset)
    status, printed, errors = as_command(capfd, inference.main, *words)
    assert (status, printed) == (143, "")
    assert errors.splitlines()[-1] == f"stopped after 5 of 5 images: {tmp_path / 'out.txt'}; 2 pictures are drawn"
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [f"{path.stem}.png" for path in images[:2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "out.txt"]


def test_an_interrupted_out_replaces_no_file_that_is_read(trained, demo, tmp_path, capsys):
    image = tmp_path / "photo.partial"
    image.write_bytes(next((demo / "images").iterdir()).read_bytes())
    words = [image, "--model", trained[0] / "model.pth", "--device", "cpu", "--out", tmp_path / "photo"]
    assert "photo.partial would replace a file that is read" in refused(capsys, inference.main, *words)


def test_bad_images_that_were_not_reached_are_not_named(trained, demo, tmp_path, capfd, signal_at):
    names = sorted((demo / "images").iterdir())[:40]
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, path in enumerate(names):
        (folder / path.name).write_bytes(b"no image" if place in (3, 12) else path.read_bytes())
    signal_at(1, signal.SIGINT)
    words = [folder, "--model", trained[0] / "model.pth", "-b", 10, "-j", 4, "--device", "cpu"]
    status, printed, errors = as_command(capfd, inference.main, *words)
    assert (status, len(printed.splitlines())) == (130, 9)
    assert [line for line in errors.splitlines() if line.startswith("skipped")] == [
        f"skipped: {folder / names[3].name}: not an image in a readable format such as JPEG or PNG"]


def test_bad_images_are_named_in_the_order_of_the_images(trained, demo, monkeypatch):
    def found_by_threads(classifier, images, *_, **more):
        images.errors.update(dict.fromkeys([7, 3, 5], "no image"))
        return torch.zeros(1, len(images), len(classifier.classes))

    monkeypatch.setattr(inference, "compute_logits", found_by_threads)
    classifier = inference.load_model(trained[0] / "model.pth", "cpu", "fp32")
    _, errors = inference.predict_all(classifier, sorted((demo / "images").iterdir())[:10])
    assert list(errors) == [3, 5, 7]


def test_predict_in_a_library_is_interrupted_as_usual(trained, demo, signal_at):
    classifier = inference.load_model(trained[0] / "model.pth", "cpu", "fp32")
    signal_at(1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        inference.predict(classifier, sorted((demo / "images").iterdir())[:40])
