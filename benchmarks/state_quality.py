"""What state at 4 bytes a value costs in held-out loss: SmolLM2-135M cut to half, 100 steps of 1,024 tokens, the same
tokens, order and seed. Float32 records and moments against bfloat16 records with 8-bit moments, and with the 8-bit base
as well. How far two runs part by rounding alone shows the arm whose batch comes in two micro batches: the same sums in
another order. `PCSCALE_CORPUS` names a folder with train*.txt and valid.txt; without it the text is the help topics
that every Python carries. A finished arm is kept in the scratch folder and not run again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from benchmarks.report import REPORTS, Row
from benchmarks.shapes import PUBLISHED_START, SMOLLM2_HALF
from pcscale.common.cache import cache_folder
from pcscale.common.files import write_text
from pcscale.jobs.demo import fetch_smollm2, python_topics

FULL = {"record_dtype": "float32", "moments": "32bit", "base_precision": "stored"}
SMALL = {"record_dtype": "bfloat16", "moments": "8bit"}
TWO_MICRO_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ARMS = {
    "float32 state (12 bytes)": FULL,
    "float32 state, batch in two micro batches": FULL | TWO_MICRO_BATCHES,
    "4-byte state": FULL | SMALL,
    "4-byte state, 8-bit base": FULL | SMALL | {"base_precision": "int8"},
}
SETTINGS = {
    **SMOLLM2_HALF,
    **PUBLISHED_START,
    "projection_rates": "uniform",
    "calibration_tokens": 8192,
    "sequence_length": 256,
    "eval_tokens": 16384,
    "max_steps": 100,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-5,
    "aux_learning_rate": 3e-4,
    "warmup_steps": 10,
    "eval_steps": 25,
    "save_steps": 100,
    "keep_checkpoints": 1,
    "seed": 0,
}
TOLERANCE_NATS = 0.01


def run(scratch: Path) -> list[Row]:
    curves = {
        label: _arm(scratch / "quality" / f"arm-{number}", arm) for number, (label, arm) in enumerate(ARMS.items())
    }
    first, *others = curves
    rows: list[Row] = []
    for label, steps in curves.items():
        held_out = {step["step"]: step["eval_loss"] for step in steps if "eval_loss" in step}
        text = ", ".join(f"{loss:.4f} at {number}" for number, loss in held_out.items())
        rows.append((f"{label}: held-out loss", text, ""))
    last = {label: steps[-1]["eval_loss"] for label, steps in curves.items()}
    for label in others:
        target = f"within {TOLERANCE_NATS}" if "4-byte" in label else ""
        rows.append(
            (f"{label} − {first}, after {len(curves[first])} steps", f"{last[label] - last[first]:+.4f}", target)
        )
    _plot(curves)
    rows.append(("curves", f"![held-out and training loss]({PLOT_NAME})", ""))
    return rows


PLOT_NAME = "state-quality.png"


def _arm(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of one arm, from an earlier run of the same settings where there is one."""
    corpus = os.environ.get("PCSCALE_CORPUS")
    folder.mkdir(parents=True, exist_ok=True)
    if corpus:
        data: dict[str, Any] = {"train": [f"{corpus}/train*.txt"], "validation": [f"{corpus}/valid.txt"]}
    else:
        write_text(folder / "text.txt", python_topics())
        data = {"train": [str(folder / "text.txt")]}
    values = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder / "run"), "data": data}
    write_text(folder / "run.yaml", yaml.safe_dump({**values, **SETTINGS, **settings}))
    command = [sys.executable, "-m", "pcscale", "compress", str(folder / "run.yaml"), "--resume", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def _plot(curves: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, steps) in enumerate(curves.items()):
        color = f"C{number}"
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=color, alpha=0.25, linewidth=1)
        held_out = [(s["step"], s["eval_loss"]) for s in steps if "eval_loss" in s]
        axes.plot(*zip(*held_out, strict=True), color=color, marker="o", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token); faint: training")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(REPORTS / PLOT_NAME, dpi=110)
