"""Messages and progress of a command, all on standard error.

Standard output belongs to the result. On a terminal progress is a bar; elsewhere it is a plain line every few seconds.
All of it goes through the logger `pcscale`: the command line gives it a handler, the caller of the library configures
it as any other (without a handler only warnings are seen), and progress bars belong to the command line alone.
"""

import logging
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
class ProgressTask:
    """A running job that reports how far it is, with a bar on a terminal."""

    label: str | None
    total: float | None  # None: nobody knows.
    unit: str
    console: "Console"
    bar: Progress | None = None
    done: float = 0.0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more of the total as done; a note stands beside it until the next one."""
        self.done += amount
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, text=self.describe())
        elif self.label is not None and time.monotonic() - self.last_line >= PLAIN_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            self.console.info(f"{self.label}: {self.describe()}")

    def describe(self) -> str:
        """The share that is done, its rate and the time left."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        of_total = "" if self.total is None else f"/{self.total:,.0f}"
        parts = [f"{self.done:,.0f}{of_total} {self.unit}", f"{rate:,.3g} {self.unit}/s"]
        if self.total is not None:
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            parts.append(f"{format_seconds(left)} left")
        return " · ".join([*parts, self.note] if self.note else parts)


class _StandardError(logging.Handler):
    """A handler that prints messages as plain lines, above the progress bar where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.rich = RichConsole(stderr=True, soft_wrap=True, markup=False, highlight=False)

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self.rich.print(prefix + record.getMessage())


logger = logging.getLogger("pcscale")


class Console:
    """Messages and progress."""

    def __init__(self) -> None:
        self._handler: _StandardError | None = None

    def configure(self, quiet: bool) -> None:
        """Print messages on standard error, as the command line does; `quiet` leaves only warnings."""
        self._handler = _StandardError()
        others = [handler for handler in logger.handlers if not isinstance(handler, _StandardError)]
        logger.handlers[:] = [*others, self._handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        logger.propagate = False

    def info(self, text: str) -> None:
        """Show a message."""
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        """Show a warning, even where the command is quiet."""
        logger.warning("%s", text)

    @contextmanager
    def progress(self, label: str | None, total: float | None, unit: str) -> Iterator[ProgressTask]:
        """Show progress while the block runs; call `advance` on what it yields. Without a label nothing is shown."""
        task = ProgressTask(label, total, unit, self)
        if label is None or self._handler is None:
            yield task
            return
        rich = self._handler.rich
        rich.file = sys.stderr  # The block may redirect standard error, to hide what a library prints there.
        try:
            if not logger.isEnabledFor(logging.INFO) or not rich.is_terminal:
                yield task
                return
            label_column = TextColumn("{task.description}", markup=False)
            columns = (label_column, BarColumn(), TextColumn("{task.fields[text]}", markup=False))
            with Progress(*columns, console=rich, transient=True) as task.bar:
                task.bar.add_task(label, total=total, text="")
                yield task
        finally:
            rich.file = None  # pyright: ignore[reportAttributeAccessIssue]  # Whatever standard error is then.


console = Console()
