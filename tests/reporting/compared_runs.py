"""Finished runs of a few rows each, for comparisons that can be checked by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tests.reporting.run_folder import EVALUATION, USAGE, write_document, write_metrics

LENGTH = 8
TRAIN_NT = np.arange(70 * LENGTH, dtype=np.int32).reshape(70, LENGTH) % 97
VALIDATION_MT = np.arange(4 * LENGTH, dtype=np.int32).reshape(4, LENGTH) % 89
START_LOSS = 8.0
FIRST = [(100, 2.0, None), (200, 2.0, 6.0), (300, 4.0, None), (400, 4.0, 5.0)]
"""A step each: tokens up to its end, its seconds, held-out loss where evaluated. 12 seconds in all."""
SECOND = [(100, 1.0, 7.0), (200, 1.0, 6.5), (300, 1.0, 5.5), (400, 1.0, 4.75), (500, 5.0, 4.5)]
"""9 seconds in all."""

Rows = list[tuple[int, float, float | None]]


def write_compared(run: Path, rows: Rows = FIRST, **settings: Any) -> Path:
    """A finished run of the rows, over the tokens above."""
    run.mkdir(parents=True)
    values: dict[str, Any] = {
        "base": "acme/tiny-llm",
        "output": str(run),
        "data": {"train": ["train.txt"], "validation": ["valid.txt"]},
        "sequence_length": LENGTH,
        "max_steps": len(rows),
    }
    (run / "run.yaml").write_text(yaml.safe_dump(values | settings), encoding="utf-8")
    write_rows(run, rows)
    evaluation = EVALUATION | {"start": EVALUATION["start"] | {"loss": START_LOSS}}
    write_document(run, "evaluation.json", evaluation)
    write_document(run, "usage.json", USAGE)
    write_tokens(run)
    return run


def write_rows(run: Path, rows: Rows) -> None:
    steps = []
    for number, (tokens, seconds, eval_loss) in enumerate(rows, start=1):
        step = {"step": number, "tokens": tokens, "loss": 5.5, "learning_rate": 1e-3, "grad_norm": 0.7}
        steps.append(
            {**step, "moved_bytes": 0, "seconds": seconds, **({} if eval_loss is None else {"eval_loss": eval_loss})}
        )
    write_metrics(run, steps)


def write_tokens(
    run: Path,
    train: np.ndarray = TRAIN_NT,
    validation: np.ndarray = VALIDATION_MT,
    tokenizer: str | None = "f00d",
) -> None:
    """tokens.safetensors; `tokenizer` None: it does not tell whose ids they are."""
    metadata = {"key": run.name} | ({} if tokenizer is None else {"tokenizer": tokenizer})
    save_file({"train": train, "validation": validation}, run / "tokens.safetensors", metadata)


def change_document(run: Path, name: str, **changes: Any) -> None:
    path = run / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
