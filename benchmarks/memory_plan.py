"""Predicted beside measured: whole runs of `pcscale compress` on processors, over residency, precision, activation
checkpointing and ranks. SmolLM2-135M cut to half, two steps of two micro batches of 4 × 256 tokens; and a base of
Llama-3.2-1B's shape with random weights, two steps of 512 tokens. Each run is a process of its own (or two ranks); the
peak is the anonymous memory of the first rank over all phases. Working memory is what is not entered where it is born:
activations, logits, temporaries, and what the C library's allocator keeps. A finished run is kept in the scratch folder
and not run again; predictions are made anew. `PCSCALE_MINUTES` says after how many minutes no further run is begun.
What libraries take and what allocators keep (memory/stages.py) was fitted to the SmolLM2 runs; the 1B shape was
left out of that."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.memory import SETTINGS as SETTINGS_1B
from benchmarks.memory import prepare
from benchmarks.report import Row
from benchmarks.shapes import LLAMA_1B, PUBLISHED_START, SMOLLM2_HALF
from pcscale.common.cache import cache_folder
from pcscale.common.files import read_json, write_json, write_text
from pcscale.common.units import format_bytes
from pcscale.config.load import check_values
from pcscale.distributed.zero_form import ZeroForm
from pcscale.families.hf_config import read_config
from pcscale.families.registry import family_of
from pcscale.families.widths import make_plan
from pcscale.jobs.demo import fetch_smollm2, python_topics
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.reporting.summary import components
from pcscale.storage.hashing import fingerprint

REPOSITORY = Path(__file__).parents[1]
SMALL = {"record_dtype": "bfloat16", "moments": "8bit"}
INT8 = {"base_precision": "int8"}
CHECKPOINTED = {"gradient_checkpointing": True}
SHORT = {
    **SMOLLM2_HALF,
    **PUBLISHED_START,
    "calibration_tokens": 4096,
    "sequence_length": 256,
    "eval_tokens": 2048,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-5,
    "aux_learning_rate": 3e-4,
    "warmup_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "keep_checkpoints": 1,
}
OFFLOADED = "zero3_offload_cpu"
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "device, float32": (0, {}),
    "device, float32, checkpointed": (0, CHECKPOINTED),
    "device, 4-byte state, int8 base, held": (0, {**SMALL, **INT8, "base_home": "cpu"}),
    "cpu, float32": (0, {"residency": "cpu"}),
    "cpu, 4-byte state, int8 base, checkpointed": (0, {"residency": "cpu", **SMALL, **INT8, **CHECKPOINTED}),
    "disk, float32": (0, {"residency": "disk"}),
    "disk, 4-byte state, int8 base, checkpointed": (0, {"residency": "disk", **SMALL, **INT8, **CHECKPOINTED}),
    "disk, 4-byte state, bfloat16 model": (0, {"residency": "disk", **SMALL, "bf16": True}),
    "cpu, rank 64, gradients on the host, one micro batch": (
        0,
        {
            "residency": "cpu",
            "projection_rank": 64,
            "gradient_home": "cpu",
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
        },
    ),
    "hard pruning": (0, {"method": "hard_prune", "aux_learning_rate": None}),
    "two ranks, zero1, cpu, float32": (2, {"residency": "cpu", "deepspeed": "zero1"}),
    "two ranks, zero3 offloaded, disk, 4-byte state, checkpointed": (
        2,
        {"residency": "disk", **SMALL, **CHECKPOINTED, "deepspeed": OFFLOADED},
    ),
    "two ranks, zero3 offloaded, base under ZeRO": (
        2,
        {"residency": "cpu", **SMALL, "deepspeed": OFFLOADED, "base_home": "zero"},
    ),
}
BIG = {**SETTINGS_1B, "hidden_size": 1344, "intermediate_size": 5376}
BIG_SETTINGS: dict[str, dict[str, Any]] = {
    "1B: disk, 4-byte state, int8 base, checkpointed": {},
    "1B: disk, 4-byte state": {"base_precision": "stored", "gradient_checkpointing": False},
    "1B: cpu, 4-byte state, int8 base, checkpointed": {"residency": "cpu"},
}
PEAK_MISS, COMPONENT_MISS = 0.05, 0.10
SMALL_COMPONENT = 0.02
"""Of the peak: a component below it is not compared."""


def run(scratch: Path) -> list[Row]:
    scratch = (scratch / "memory-plan").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    write_text(scratch / "text.txt", python_topics())
    ends, missing = time.monotonic() + 60 * float(os.environ.get("PCSCALE_MINUTES", "inf")), []
    reports: dict[str, dict[str, Any]] = {}
    runs = {
        label: (ranks, {**_values(scratch, str(fetch_smollm2(cache_folder()))), **SHORT, **settings})
        for label, (ranks, settings) in SETTINGS.items()
    } | {
        label: (0, {**_values(scratch, str(scratch / "base")), **BIG, **changes})
        for label, changes in BIG_SETTINGS.items()
    }
    wanted = os.environ.get("PCSCALE_ONLY", "")
    for label, (ranks, values) in runs.items():
        if wanted not in label:
            continue
        kept = scratch / f"{fingerprint(json.dumps([ranks, values]).encode())}.json"
        if not kept.exists() and time.monotonic() > ends:
            missing.append(label)
            continue
        if not kept.exists():
            if label in BIG_SETTINGS and not (scratch / "base").exists():
                prepare(scratch, LLAMA_1B, BIG)
            write_json(kept, _report(scratch, ranks, values))
        reports[label] = _predicted_anew(read_json(kept), ranks, values)
    return [*_rows(reports), *((label, "not run", "") for label in missing)]


def _values(scratch: Path, base: str) -> dict[str, Any]:
    return {"base": base, "data": {"train": [str(scratch / "text.txt")]}}


def _predicted_anew(report: dict[str, Any], ranks: int, values: dict[str, Any]) -> dict[str, Any]:
    """The report with what is predicted now beside what was measured then."""
    config = check_values({**values, "output": "run"}, "memory-plan")
    base_config = read_config(Path(config.base))
    plan = make_plan(family_of(base_config, config.base), base_config, config)
    zero = ZeroForm.of_file(config.deepspeed) if config.deepspeed else None
    document = Prediction(plan, config, Deployment(False, ranks or 1, zero=zero)).document(config.base)
    measured = report["phases"]["train"]["components"]
    report["phases"]["train"]["components"] = components(
        document["phases"]["train"]["components"],
        {"host": {name: part["measured_bytes"] for name, part in measured.items() if part["measured_bytes"]}},
    )
    for phase, peak in document["peak"].items():
        report["phases"][phase]["host_anonymous"]["predicted_bytes"] = peak["host_bytes"]
    report["peak"]["host_anonymous"]["predicted_bytes"] = max(peak["host_bytes"] for peak in document["peak"].values())
    return report


def _report(scratch: Path, ranks: int, values: dict[str, Any]) -> dict[str, Any]:
    """One run's report.json; with several ranks a core each."""
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write_text(scratch / "run.yaml", yaml.safe_dump({**values, "output": str(folder)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if ranks:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "pcscale", "compress", str(scratch / "run.yaml"), "--json", "--quiet"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE)
    shutil.rmtree(folder, ignore_errors=True)
    return json.loads(result.stdout)


def _rows(reports: dict[str, dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    misses, component_misses, compared = [], [], 0
    for label, report in reports.items():
        peak = report["peak"]["host_anonymous"]
        miss = peak["measured_bytes"] / peak["predicted_bytes"] - 1
        misses.append((abs(miss), label))
        rows.append(
            (
                label,
                f"{format_bytes(peak['measured_bytes'])} measured, {format_bytes(peak['predicted_bytes'])} predicted",
                f"{miss:+.1%}",
            )
        )
        for name, part in report["phases"]["train"]["components"].items():
            predicted, measured = part["predicted_bytes"] or 0, part["measured_bytes"] or 0
            if max(predicted, measured) < SMALL_COMPONENT * peak["measured_bytes"]:
                continue
            compared += 1
            off = measured / predicted - 1 if predicted else float("inf")
            if abs(off) > COMPONENT_MISS:
                component_misses.append((label, name, predicted, measured, off))
        for name, phase in report["phases"].items():
            memory = phase["host_anonymous"]
            if memory["measured_bytes"] and memory["predicted_bytes"]:
                off = memory["measured_bytes"] / memory["predicted_bytes"] - 1
                sizes = f"{format_bytes(memory['measured_bytes'])} / {format_bytes(memory['predicted_bytes'])}"
                rows.append((f"{label}: {name}, measured / predicted", sizes, f"{off:+.1%}"))
    worst, label = max(misses)
    over = [label for miss, label in misses if miss > PEAK_MISS]
    head: list[Row] = [
        (f"worst miss of a peak over {len(reports)} settings", f"{worst:.1%} ({label})", f"{PEAK_MISS:.0%} at most"),
        ("settings beyond it", f"{len(over)}: {'; '.join(over) or 'none'}", "none"),
        (
            f"parts of training beyond {COMPONENT_MISS:.0%}, of {compared} above {SMALL_COMPONENT:.0%} of the peak",
            str(len(component_misses)),
            "none",
        ),
    ]
    for label, name, predicted, measured, off in component_misses:
        sizes = f"{format_bytes(measured)} measured, {format_bytes(predicted)} predicted"
        head.append((f"miss: {label}: {name}", sizes, f"{off:+.1%}"))
    return [*head, *rows]
