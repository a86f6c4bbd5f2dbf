"""Tests of the lines that show how far long work is: when they appear, what they say, and that nothing is left."""

import io
import sys
import time

import pytest

import dataset
from dataset import Progress


class Terminal(io.StringIO):
    """A terminal that keeps what was written to it, and knows what its screen shows."""

    columns = 80

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
                assert column < self.columns, "the line is wider than the terminal"
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
    terminal.columns = columns
    with Progress("predicting", 2000) as progress:
        for done in (600, 600):
            clock.now += 2
            progress.advance(done)
        assert terminal.screen() == [line]
    assert terminal.screen() == [""]


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
