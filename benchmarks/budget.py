"""Plans for a budget, and whether they keep it. SmolLM2-135M cut to half on the host alone: `pcscale plan` names the
least host memory that any settings need; with 15 % more it writes a run.yaml, which `pcscale compress` runs under that
budget and 0.25 GiB as the process's RLIMIT_DATA, which also counts what is reserved and not written to, or given back.
With 15 % less than the budget `plan` must refuse. The control takes the defaults under the same limit, with --force.
Beside it the time of `plan` for a 70B model and a budget, interpreter start included."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.plan_time import LLAMA_3_1_8B
from benchmarks.report import Row
from benchmarks.shapes import PUBLISHED_START, SMOLLM2_HALF
from pcscale.common.cache import cache_folder
from pcscale.common.files import write_text
from pcscale.common.units import format_bytes, format_seconds
from pcscale.jobs.demo import fetch_smollm2, python_topics

LLAMA_70B = {
    **LLAMA_3_1_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODEL = [f"{key}={value}" for key, value in (SMOLLM2_HALF | PUBLISHED_START).items()]
SHORT = ["max_steps=2", "calibration_tokens=4096", "eval_tokens=2048", "sequence_length=256", "keep_checkpoints=1"]
REPOSITORY = Path(__file__).parents[1]
DISK = "20GB"
MORE, LESS = 1.15, 0.85
RESERVED = 2**28
TOO_LITTLE = 700 * 2**20


def run(scratch: Path) -> list[Row]:
    folder = (scratch / "budget").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "text.txt", python_topics())
    base = str(fetch_smollm2(cache_folder()))
    try:
        return [*_enforced(folder, base), *_large(folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _enforced(folder: Path, base: str) -> list[Row]:
    least = int(_plan(folder, base, TOO_LITTLE).stderr.rsplit("(", 1)[1].split(" bytes")[0])
    budget = int(MORE * least)
    planned = _plan(folder, base, budget)
    chosen = json.loads(planned.stdout)
    values = ", ".join(f"{key} {entry['value']}" for key, entry in chosen["chosen"].items() if entry["why"])
    refused = _plan(folder, base, int(LESS * budget), "--write", "less.yaml")
    began = time.perf_counter()
    run = _compress(folder, budget)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "runs", ignore_errors=True)
    control = _compress(folder, budget, "residency=device", "record_dtype=float32", "moments=32bit", "--force")
    rows: list[Row] = [
        ("least host memory of any settings, by `plan`", format_bytes(least), ""),
        ("budget", format_bytes(budget), f"{MORE} × the least"),
        ("chosen", values, ""),
        (f"`plan` with {LESS:.0%} of the budget", f"exit code {refused.returncode}", "3"),
        ("`compress` under RLIMIT_DATA of the budget and 0.25 GiB", f"exit code {run.returncode}", "0"),
        ("the control under the same limit, with --force", f"exit code {control.returncode}", "not 0"),
        ("what the control says at last", _last_line(control.stderr), ""),
    ]
    if run.returncode:
        return [*rows, ("what it says at last", _last_line(run.stderr), "")]
    peak = json.loads(run.stdout)["peak"]["host_anonymous"]
    return [
        *rows,
        (
            "its peak of anonymous memory",
            format_bytes(peak["measured_bytes"]),
            f"{format_bytes(peak['predicted_bytes'])} predicted",
        ),
        ("time of the whole run", format_seconds(seconds), ""),
    ]


def _plan(folder: Path, base: str, host_memory: int, *more: str) -> subprocess.CompletedProcess[str]:
    budget = ["--host-memory", str(host_memory), "--disk", DISK, "--data", str(folder / "text.txt")]
    command = [sys.executable, "-m", "pcscale", "plan", base, *MODEL, *SHORT, *budget, *more, "--json"]
    return subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)


def _compress(folder: Path, num_bytes: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcscale", "compress", "run.yaml", "--json", "--quiet", *more]
    limit = (num_bytes + RESERVED, num_bytes + RESERVED)
    return subprocess.run(
        command,
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limit),
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:200] if lines else "nothing"


def _large(folder: Path) -> list[Row]:
    base = folder / "llama-70b-config"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA_70B))
    budget = ["--device-memory", "80GB", "--host-memory", "256GiB", "--disk", "4TB"]
    command = [
        sys.executable,
        "-m",
        "pcscale",
        "plan",
        str(base),
        "--hidden-size",
        "4096",
        "--intermediate-size",
        "14336",
        *budget,
        "--json",
    ]
    seconds = []
    for repeat in range(3):
        began = time.perf_counter()
        subprocess.run([*command, "--write", str(folder / f"70b-{repeat}.yaml")], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return [("`plan` with a budget for a 70B, slowest of 3", f"{max(seconds):.1f} s", "under 10 s")]
