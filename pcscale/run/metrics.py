"""metrics.jsonl: a line for every optimizer step, read here by everybody who reads it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pcscale.common.errors import RequestError
from pcscale.common.files import write_text
from pcscale.run.documents import RESTORE, Count, Number, Seconds, checked


@dataclass(frozen=True)
class MetricsRow:
    """One optimizer step.

    Attributes:
        step: its number, from 1 on.
        tokens: tokens seen up to its end.
        loss: of its batch, before the update; None: the step was skipped. Units: nats a token.
        learning_rate: the rate that it used.
        grad_norm: before clipping; None: the step was skipped.
        seconds: its wall time.
        moved_bytes: base weights and records to and from where the sweep works, and what a teacher read.
        skipped: loss or gradients were not finite, so nothing was updated.
        eval_loss: on held-out text; None: not evaluated after this step, or not finite. Units: nats a token.
    """

    step: Count
    tokens: Count
    loss: Number | None
    learning_rate: Number
    grad_norm: Number | None
    seconds: Seconds
    moved_bytes: Count
    skipped: bool = False
    eval_loss: Number | None = None


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of metrics.jsonl; a last line that was cut short, as by a killed process, is left out.

    Raises:
        RequestError: any other line is no row.
    """
    return [row for row, _ in _rows(path)]


def cut_metrics(path: Path, last_step: int) -> None:
    """Cut metrics.jsonl back to a checkpoint, from which the steps after it are made again."""
    if path.exists():
        write_text(path, "".join(f"{line}\n" for row, line in _rows(path) if row.step <= last_step))


def _rows(path: Path) -> Iterator[tuple[MetricsRow, str]]:
    """Each row, with its line as it stands in the file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines):
                return
            raise RequestError(f"{where} is not JSON ({error}). {RESTORE}") from None
        yield checked(values, MetricsRow, where), line
