"""Messages and progress on standard error; standard output stays the result's."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import pytest
from rich.console import Console as RichConsole

from pcscale.common.console import PLAIN_INTERVAL_SECONDS, Console, ProgressTask, console, logger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`clock(seconds)` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def _console(quiet: bool) -> Console:
    made = Console()
    made.configure(quiet=quiet)
    return made


@contextmanager
def _progress(made: Console, label: str, total: float | None, unit: str) -> Iterator[ProgressTask]:
    """Progress that begins at the test's own clock."""
    with made.progress(label, total, unit) as task:
        task.started = task.last_line = time.monotonic()
        yield task


def test_progress_without_a_terminal_is_plain_lines_every_few_seconds(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with _progress(_console(quiet=False), "merge", total=2000, unit="MB") as task:
        for _ in range(10):
            clock(PLAIN_INTERVAL_SECONDS / 2)
            task.advance(100)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 5
    assert lines[0] == "merge: 200/2,000 MB · 40 MB/s · 0:45 left"
    assert lines[-1] == "merge: 1,000/2,000 MB · 40 MB/s · 0:25 left"


def test_a_note_stands_beside_the_progress_until_the_next_one(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with _progress(_console(quiet=False), "train", total=100, unit="steps") as task:
        for note in ("loss 3.2", "", "loss 3.1"):
            clock(PLAIN_INTERVAL_SECONDS)
            task.advance(1, note)
    assert [line.rpartition(" · ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "loss 3.2",
        "loss 3.2",
        "loss 3.1",
    ]


def test_a_job_that_has_not_begun_names_no_time_left(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with _progress(_console(quiet=False), "fetch", total=10, unit="files") as task:
        clock(PLAIN_INTERVAL_SECONDS)
        task.advance(0)
    assert capsys.readouterr().err == "fetch: 0/10 files · 0 files/s · - left\n"


def test_quiet_progress_says_nothing(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with _progress(_console(quiet=True), "merge", total=10, unit="MB") as task:
        clock(10 * PLAIN_INTERVAL_SECONDS)
        task.advance(5)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert task.done == 5


def test_progress_on_a_terminal_is_a_bar_with_rate_and_time_left(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    made = _console(quiet=False)
    assert made._handler is not None
    made._handler.rich = RichConsole(stderr=True, force_terminal=True, width=100, color_system=None)
    with _progress(made, "merge", total=10, unit="MB") as task:
        clock(2)
        task.advance(5, "shard [2]")
        assert task.bar is not None
        task.bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/10 MB · 2.5 MB/s · 0:02 left · shard [2]" in captured.err
    assert "━" in captured.err


def test_messages_appear_on_standard_error_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "model.layers[3] has [bold]brackets[/bold] and a long line: " + "word " * 60
    _console(quiet=False).info(text)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.rstrip("\n") == text


def test_quiet_leaves_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    made = _console(quiet=True)
    made.info("a message")
    made.warn("the [tie] is lost")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: the [tie] is lost\n"


def test_a_library_user_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Console().info("a message")
    assert capsys.readouterr().err == ""
    assert isinstance(console, Console)


def test_a_caller_of_the_library_silences_messages_as_those_of_any_logger(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    made = Console()
    made.warn("nearly full")
    logger.setLevel(logging.ERROR)
    made.warn("not heard")
    made.info("not heard either")
    assert capsys.readouterr().err == "nearly full\n"


def test_progress_is_seen_where_its_block_hides_standard_error(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    made = _console(quiet=False)
    with _progress(made, "evaluate", total=None, unit="answers") as task, redirect_stderr(StringIO()):
        print("of a library", file=sys.stderr)
        clock(PLAIN_INTERVAL_SECONDS)
        task.advance(40)
        made.warn("a prompt was cut")
    assert capsys.readouterr().err == "evaluate: 40 answers · 8 answers/s\nwarning: a prompt was cut\n"
