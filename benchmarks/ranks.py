"""Two ranks on processors over gloo: SmolLM2-135M cut to half, one process beside two ranks with DeepSpeed. What a rank
holds of records, moments and base; what a step communicates, from counters of collective payloads; the base mapped from
disk beside the base under ZeRO-3; and the host bytes of a trainable value beside the same projections trained by plain
DeepSpeed ZeRO-3 with its CPU Adam. Each rank has one core."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Row
from benchmarks.shapes import PUBLISHED_START, SMOLLM2_HALF
from pcscale.common.cache import cache_folder
from pcscale.common.files import write_text
from pcscale.common.units import format_bytes, format_seconds
from pcscale.jobs.demo import fetch_smollm2, python_topics

REPOSITORY = Path(__file__).parents[1]
SETTINGS = {
    **SMOLLM2_HALF,
    **PUBLISHED_START,
    "projection_rates": "uniform",
    "calibration_tokens": 4096,
    "sequence_length": 256,
    "eval_tokens": 8192,
    "max_steps": 4,
    "learning_rate": 3e-5,
    "aux_learning_rate": 3e-4,
    "warmup_steps": 2,
    "eval_steps": 4,
    "save_steps": 4,
    "keep_checkpoints": 1,
}
OFFLOADED = "deepspeed_configs/zero3_offload_cpu.json"
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, no DeepSpeed": (0, {"per_device_train_batch_size": 4}),
    "two ranks, zero1": (2, {"deepspeed": "deepspeed_configs/zero1.json"}),
    "two ranks, zero3_offload_cpu": (2, {"deepspeed": OFFLOADED}),
    "two ranks, zero3_offload_cpu, base_home zero": (2, {"deepspeed": OFFLOADED, "base_home": "zero"}),
}
"""Ranks (0: no launcher) and settings. All see four sequences a step."""
TOLERANCE_NATS = 1e-3


def run(scratch: Path) -> list[Row]:
    scratch = (scratch / "ranks").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    return [*_runs(scratch), *_held(scratch), *_communicated(scratch), *_plain(scratch)]


def _launched(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks of one core each; 0: without a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *launcher, "-m", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True)


def _child(ranks: int, scratch: Path, *arguments: str) -> Any:
    """What `benchmarks.ranks_child` writes on the first rank."""
    output = scratch / "child.json"
    _launched(ranks, ["benchmarks.ranks_child", str(output), *arguments])
    return json.loads(output.read_text())


def _runs(scratch: Path) -> list[Row]:
    """Whole runs: the same losses, and what each form takes."""
    write_text(scratch / "text.txt", python_topics())
    rows: list[Row] = []
    first: dict[str, Any] = {}
    for number, (label, (ranks, settings)) in enumerate(FORMS.items()):
        folder = scratch / f"run-{number}"
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        values = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder), **SETTINGS, **batch, **settings}
        yaml_path = scratch / f"run-{number}.yaml"
        write_text(yaml_path, yaml.safe_dump({**values, "data": {"train": [str(scratch / "text.txt")]}}))
        report = json.loads(_launched(ranks, ["pcscale", "compress", str(yaml_path), "--resume", "--json"]).stdout)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [step["loss"] for step in steps] + [report["evaluation"]["compressed"]["loss"]]
        first = first or {"losses": losses}
        apart = max(abs(one - other) for one, other in zip(losses, first["losses"], strict=True))
        seconds = sorted(step["seconds"] for step in steps)[len(steps) // 2]
        peaks = {name: report["phases"][name]["host_anonymous"]["measured_bytes"] for name in ("calibrate", "train")}
        rows += [
            (f"{label}: losses of the steps", ", ".join(f"{loss:.4f}" for loss in losses[:-1]), ""),
            (f"{label}: held-out loss of the merged model", f"{losses[-1]:.4f}", ""),
            (f"{label}: largest difference of a loss", f"{apart:.1e}", f"{TOLERANCE_NATS:g} at most"),
            (f"{label}: seconds of a step (median)", f"{seconds:.1f}", ""),
            (f"{label}: calibration", format_seconds(report["phases"]["calibrate"]["seconds"]), ""),
            (
                f"{label}: peak of a rank, calibration / training",
                " / ".join(map(format_bytes, peaks.values())),
                "",
            ),
        ]
    return rows


def _held(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for home in ("cpu", "zero"):
        one, two = (_child(ranks, scratch, "held", home) for ranks in (1, 2))
        rows += [
            (
                f"records, moments and base of a rank, base_home {home}: one rank / two ranks",
                f"{format_bytes(one)} / {format_bytes(two)}",
                f"{two / one:.3f} of it; 0.55 at most",
            )
        ]
    return rows


def _communicated(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for stage, found in _child(2, scratch, "communicated").items():
        share = found["bytes"] / found["least_bytes"]
        kinds = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in found["by_kind"].items())
        target = "1.1 at most" if stage == "0" else "stated"
        rows.append((f"bytes communicated a step over the least, stage {stage}", f"{share:.3f} ({kinds})", target))
    return rows


def _plain(scratch: Path) -> list[Row]:
    ours, plain = (_child(1, scratch, which) for which in ("ours", "plain"))
    share = ours["state_bytes"] / plain["state_bytes"]
    return [
        ("trainable values", f"{ours['values']:,}", f"{plain['values']:,} in the plain form"),
        ("host bytes a trainable value, records and moments: pcscale", f"{ours['state_bytes']:.2f}", ""),
        ("the same, plain ZeRO-3 with CPU Adam", f"{plain['state_bytes']:.2f}", f"{share:.2f} of it; 1/3 at most"),
        (
            "anonymous memory a value, all told: pcscale / plain",
            f"{ours['anonymous_bytes']:.1f} / {plain['anonymous_bytes']:.1f}",
            "plain: with gradients and communication buffers",
        ),
    ]
