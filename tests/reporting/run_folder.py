"""A run folder as the other parts of the program write it, without running any of them."""

import json
import math
from pathlib import Path
from typing import Any

from pcscale.config.load import dump_run_config
from pcscale.config.schema import DataConfig, RunConfig
from tests.reporting.memory_run import memory_document, plan_phases, plan_steps, usage_phases

STEPS = 24
SKIPPED_STEP = 5
TOKENS_PER_STEP = 16_384

PLAN: dict[str, Any] = {
    "base": {"name": "acme/tiny-llm", "family": "llama", "parameters": 134_515_008, "tied": True},
    "compressed": {
        "hidden_size": 384,
        "intermediate_size": 1088,
        "parameters": 67_000_000,
        "keep_fraction": 67_000_000 / 134_515_008,
    },
    "trainable": {"parameters": 201_000_000, "bytes": 2_412_000_000},
    "flops": {
        "compose_per_step": 81_000_000_000,
        "pull_back_per_step": 162_000_000_000,
        "train_per_token": 412_000_000,
    },
    "peak": {
        "calibrate": {"device_bytes": 0, "host_bytes": 1_100_000_000, "disk_bytes": 2_000_000},
        "train": {"device_bytes": 0, "host_bytes": 3_300_000_000, "disk_bytes": 5_000_000_000},
        "merge": {"device_bytes": 0, "host_bytes": 700_000_000, "disk_bytes": 134_000_000},
    },
    "phases": plan_phases(),
    **plan_steps(),
}


def _model(loss: float, parameters: int, tokens_per_second: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 3.1,
        "parameters": parameters,
        "tokens": 65_536,
        "tokens_per_second": tokens_per_second,
    }


EVALUATION = {
    "base": _model(2.9137, 134_515_008, 812.4),
    "start": _model(8.2718, 67_000_000, 1533.0),
    "compressed": _model(3.4412, 67_000_000, 1541.0),
    "sample": {"prompt": "Once upon a time", "compressed": "there was a <fox> & a crow."},
}

MERGE = {
    "output": "merged",
    "tensors": 272,
    "bytes_written": 134_217_728,
    "shards": 1,
    "seconds": 4.2,
    "peak_anonymous_bytes": 410_000_000,
    "max_memory_bytes": 2_147_483_648,
    "checkpoint": "step-00000024",
}

USAGE: dict[str, Any] = {
    "phases": usage_phases(),
    "machine": {"cpu": "Imaginary CPU 9000", "cores": 2, "gpu": None, "memory_bytes": 8_589_934_592},
    "limits": {"host_bytes": 4 * 2**30, "host_source": "cgroup, memory.max", "device_bytes": None},
}
MEMORY = memory_document()
FINISHED = {"plan": PLAN, "evaluation": EVALUATION, "merge": MERGE, "usage": USAGE, "memory": MEMORY}


def on_gpu() -> dict[str, Any]:
    """The documents of a finished run on a machine with a GPU and two ranks."""
    phases = plan_phases(on_gpu=True)
    peaks = {
        name: {
            f"{home}_bytes": sum(part["bytes"] for part in phase["components"].values() if part["home"] == home)
            for home in ("device", "host", "disk")
        }
        for name, phase in phases.items()
    }
    usage = {
        "phases": usage_phases(on_gpu=True),
        "machine": USAGE["machine"] | {"gpu": "Imaginary GPU"},
        "limits": {"host_bytes": None, "host_source": "unknown", "device_bytes": 4 * 2**30},
    }
    plan = PLAN | {"phases": phases, "peak": peaks, "communicated_bytes_per_step": 540_000_000}
    return FINISHED | {"plan": plan, "usage": usage, "memory": memory_document(on_gpu=True)}


def metrics(count: int) -> list[dict[str, Any]]:
    steps = []
    for step in range(1, count + 1):
        skipped = step == SKIPPED_STEP
        entry: dict[str, Any] = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "loss": None if skipped else 3.4 + 4.5 * math.exp(-8 * step / count) + 0.06 * math.sin(step * 12.9898),
            "learning_rate": 1.5e-4 * min(step / 8, 0.55 + 0.45 * math.cos(math.pi * step / count)),
            "grad_norm": None if skipped else 0.8 + 6 / step + 0.1 * math.cos(step * 7.13),
            "moved_bytes": 270_000_000,
            "seconds": 150.0 + 4.0 * math.sin(step * 3.7),
        }
        if step % max(count // 8, 1) == 0:
            entry["eval_loss"] = 3.44 + 4.4 * math.exp(-8 * step / count)
        if skipped:
            entry["skipped"] = True
        steps.append(entry)
    return steps


def write_run(run: Path, documents: dict[str, Any]) -> Path:
    """A run folder with its settings, its steps, and documents by the names of their files without `.json`."""
    run.mkdir()
    config = RunConfig(base="acme/tiny-llm", output="run", data=DataConfig(train=["text.txt"]), max_steps=STEPS)
    (run / "run.yaml").write_text(dump_run_config(config), encoding="utf-8")
    write_metrics(run, metrics(STEPS))
    for name, document in documents.items():
        write_document(run, f"{name}.json", document)
    return run


def write_metrics(run: Path, steps: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


def write_document(run: Path, name: str, value: Any) -> None:
    (run / name).write_text(json.dumps(value), encoding="utf-8")
