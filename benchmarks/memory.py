"""A base of a real shape and random weights through the whole of `pcscale compress`, with all state at its smallest:
8-bit base, bfloat16 records and 8-bit moments in files. Two steps of 512 tokens; peaks of anonymous memory are of the
training phase, in a process of its own. The published form is 16 bytes a trainable value."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Row
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, make_base
from pcscale.common.cache import cache_folder
from pcscale.common.files import write_text
from pcscale.common.units import format_bytes, format_count, format_seconds
from pcscale.jobs.demo import fetch_smollm2, python_topics

SETTINGS = {
    "start": "selection",
    "importance": "magnitude",
    "sequence_length": 512,
    "eval_tokens": 512,
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "save_steps": 2,
    "keep_checkpoints": 1,
    "residency": "disk",
    "record_dtype": "bfloat16",
    "moments": "8bit",
    "base_precision": "int8",
}
PUBLISHED_BYTES = 16


def run_1b(scratch: Path) -> list[Row]:
    return _run(scratch / "memory-1b", LLAMA_1B, 1344, 5376, 8 * 2**30, 40 * 10**9)


def run_8b(scratch: Path) -> list[Row]:
    return _run(scratch / "memory-8b", LLAMA_8B, 1056, 3168, 14 * 2**30, 72 * 10**9)


def _run(
    folder: Path, config: dict[str, Any], hidden_size: int, intermediate_size: int, limit: int, needed: int
) -> list[Row]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        return [("not run: free disk", format_bytes(free), f"{format_bytes(needed)} needed")]
    try:
        prepare(folder, config, {**SETTINGS, "hidden_size": hidden_size, "intermediate_size": intermediate_size})
        started = time.perf_counter()
        report = compress(folder)
        seconds = time.perf_counter() - started
        return [*_rows(report, limit), ("whole run", format_seconds(seconds), "")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """A base with SmolLM2's tokenizer, the help topics that every Python carries as text, and run.yaml."""
    make_base(folder / "base", config)
    for file in fetch_smollm2(cache_folder()).glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    write_text(folder / "text.txt", python_topics())
    values = {"base": str(folder / "base"), "output": str(folder / "run"), **settings}
    write_text(folder / "run.yaml", yaml.safe_dump({**values, "data": {"train": [str(folder / "text.txt")]}}))


def compress(folder: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """`pcscale compress` in a process of its own; returns its report, with the rows of metrics.jsonl as `steps`."""
    command = [sys.executable, "-m", "pcscale", "compress", str(folder / "run.yaml"), *overrides, "--json"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {**report, "steps": [json.loads(line) for line in lines]}


def _rows(report: dict[str, Any], limit: int) -> list[Row]:
    plan, step_bytes = report["plan"], report["step_bytes"]["moved"]
    peak = report["phases"]["train"]["host_anonymous"]
    measured, predicted = peak["measured_bytes"], peak["predicted_bytes"]
    trainable = plan["trainable"]
    moved = step_bytes["measured_bytes"] / step_bytes["predicted_bytes"]
    rows: list[Row] = [
        (
            "parameters, base / compressed",
            " / ".join(format_count(plan[key]["parameters"]) for key in ("base", "compressed")),
            f"{plan['compressed']['keep_fraction']:.1%} kept",
        ),
        (
            "trainable values and their state",
            f"{format_count(trainable['parameters'])}, {format_bytes(trainable['bytes'])}",
            f"{format_bytes(PUBLISHED_BYTES * trainable['parameters'])} in the published form",
        ),
        ("peak anonymous memory of training", format_bytes(measured), f"{format_bytes(limit)} at most"),
        ("predicted peak", format_bytes(predicted), f"measured is {measured / predicted - 1:+.1%}; within 10 %"),
        ("bytes moved a step over the least", f"{moved:.3f}", "1.05 at most"),
        ("seconds of the steps", ", ".join(f"{step['seconds']:.0f}" for step in report["steps"]), ""),
        ("losses of the steps", ", ".join(f"{step['loss']:.3f}" for step in report["steps"]), ""),
    ]
    rows += [(f"predicted: {name}", format_bytes(part["bytes"]), part["home"]) for name, part in plan["memory"].items()]
    for phase, usage in report["phases"].items():
        memory = usage["host_anonymous"]
        rows.append(
            (
                f"phase {phase}",
                f"{format_seconds(usage['seconds'])}, {format_bytes(memory['measured_bytes'])}",
                f"{format_bytes(memory['predicted_bytes'])} predicted",
            )
        )
    return rows
