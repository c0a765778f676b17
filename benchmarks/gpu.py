"""On a GPU: peak device memory and step time of SmolLM2-135M, the 1B shape and the 8B shape, records in host memory,
bfloat16, three steps and a merge each. Whether the sweep's copies are hidden: the same sweep with everything on the
device, where that fits, beside it."""

import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.memory import compress, prepare
from benchmarks.report import Row
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, SMOLLM2_HALF
from pcscale.common.cache import cache_folder
from pcscale.common.files import write_text
from pcscale.common.units import format_bytes, format_seconds
from pcscale.jobs.demo import fetch_smollm2, python_topics

SETTINGS = {
    "start": "selection",
    "importance": "magnitude",
    "sequence_length": 1024,
    "eval_tokens": 4096,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "bf16": True,
    "save_steps": 3,
    "keep_checkpoints": 1,
    "residency": "cpu",
    "record_dtype": "bfloat16",
    "moments": "8bit",
}
SHAPES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], bool]] = {
    "SmolLM2-135M": (None, SMOLLM2_HALF, True),
    "1B shape, 1344/5376": (LLAMA_1B, {"hidden_size": 1344, "intermediate_size": 5376}, True),
    "8B shape, 1056/3168": (LLAMA_8B, {"hidden_size": 1056, "intermediate_size": 3168}, True),
    "8B shape, 3072/9216": (
        LLAMA_8B,
        {"hidden_size": 3072, "intermediate_size": 9216, "gradient_home": "cpu"},
        False,
    ),
}
"""A base, the size it is cut to, and whether its records fit the device as well."""


def run(scratch: Path) -> list[Row]:
    if not torch.cuda.is_available():
        return [(label, "not run: no GPU", "") for label in SHAPES]
    rows: list[Row] = []
    for label, (config, size, fits) in SHAPES.items():
        folder = scratch / "gpu"
        for residency in ("cpu", "device") if fits else ("cpu",):
            shutil.rmtree(folder, ignore_errors=True)
            _prepare(folder, config, {**SETTINGS, **size})
            report = compress(folder, [f"residency={residency}"])
            device = report["phases"]["train"]["device"]
            seconds = [step["seconds"] for step in report["steps"][1:]]
            rows += [
                (
                    f"{label}, residency {residency}: peak device memory",
                    format_bytes(device["measured_bytes"]),
                    f"{format_bytes(device['predicted_bytes'])} predicted",
                ),
                (f"{label}, residency {residency}: a step", f"{statistics.median(seconds):.2f} s", ""),
                (f"{label}, residency {residency}: merge", format_seconds(report["phases"]["merge"]["seconds"]), ""),
            ]
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def _prepare(folder: Path, config: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    if config is not None:
        prepare(folder, config, settings)
        return
    folder.mkdir(parents=True)
    write_text(folder / "text.txt", python_topics())
    values = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder / "run"), **settings}
    write_text(folder / "run.yaml", yaml.safe_dump({**values, "data": {"train": [str(folder / "text.txt")]}}))
