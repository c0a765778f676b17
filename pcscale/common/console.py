"""What a person sees while a command works: messages, tables and progress, all on standard error.

Standard output belongs to the result. On a terminal progress is a bar; elsewhere it is a plain line every few seconds.
A library user sees nothing: only the command line turns the console on.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from pcscale.common.units import format_seconds

PLAIN_INTERVAL_SECONDS = 5.0


@dataclass
class Task:
    """One running job: how much of it is done, and what to say beside the bar."""

    label: str | None
    total: float
    unit: str
    done: float = 0.0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    def describe(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        parts = [f"{self.done:,.0f}/{self.total:,.0f} {self.unit}", f"{rate:,.3g} {self.unit}/s"]
        parts += [f"{format_seconds(left)} left"] + ([self.note] if self.note else [])
        return " · ".join(parts)


def _standard_error() -> RichConsole:
    return RichConsole(file=sys.stderr, soft_wrap=True, markup=False, highlight=False)


class Console:
    """Messages and progress; `quiet` leaves only warnings and errors."""

    def __init__(self) -> None:
        self.quiet = True
        self.rich = _standard_error()

    def configure(self, quiet: bool) -> None:
        self.quiet = quiet
        self.rich = _standard_error()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.rich.print(text)

    def warn(self, text: str) -> None:
        self.rich.print(f"warning: {text}")

    @contextmanager
    def progress(self, label: str | None, total: float, unit: str) -> Iterator["Tracker"]:
        """Show progress while the block runs; call `advance` on what it yields. Without a label nothing is shown."""
        task = Task(label, total, unit)
        if label is None or self.quiet or not self.rich.is_terminal:
            tracker = Tracker(self, task, None)
            yield tracker
            return
        label_column = TextColumn("{task.description}", markup=False)
        columns = (label_column, BarColumn(), TextColumn("{task.fields[text]}", markup=False))
        with Progress(*columns, console=self.rich, transient=True) as bar:
            bar.add_task(label, total=total, text="")
            yield Tracker(self, task, bar)


@dataclass
class Tracker:
    """The handle that a running job reports through."""

    console: Console
    task: Task
    bar: Progress | None

    def advance(self, amount: float, note: str = "") -> None:
        self.task.done += amount
        self.task.note = note or self.task.note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.task.done, text=self.task.describe())
        elif self.task.label is not None and time.monotonic() - self.task.last_line >= PLAIN_INTERVAL_SECONDS:
            self.task.last_line = time.monotonic()
            self.console.say(f"{self.task.label}: {self.task.describe()}")


console = Console()
