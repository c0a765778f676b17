"""A run folder as the other parts of the program write it, without running any of them."""

import json
import math
from pathlib import Path
from typing import Any

STEPS = 24
SKIPPED_STEP = 5
TOKENS_PER_STEP = 16_384

PLAN = {
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
    "memory": {
        "records": {"home": "device", "bytes": 804_000_000},
        "moments": {"home": "device", "bytes": 1_608_000_000},
        "frozen_base": {"home": "disk", "bytes": 269_030_016},
    },
    "peak": {
        "calibrate": {"device_bytes": 0, "host_bytes": 1_100_000_000, "disk_bytes": 2_000_000},
        "train": {"device_bytes": 0, "host_bytes": 3_300_000_000, "disk_bytes": 5_000_000_000},
        "merge": {"device_bytes": 0, "host_bytes": 700_000_000, "disk_bytes": 134_000_000},
    },
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
}

USAGE = {
    "phases": {
        "calibrate": {"seconds": 61.0, "peak_host_anonymous_bytes": 1_050_000_000, "peak_device_bytes": None},
        "train": {"seconds": 3725.0, "peak_host_anonymous_bytes": 3_400_000_000, "peak_device_bytes": None},
        "merge": {"seconds": 4.2, "peak_host_anonymous_bytes": 410_000_000, "peak_device_bytes": None},
        "evaluate": {"seconds": 33.0, "peak_host_anonymous_bytes": 900_000_000, "peak_device_bytes": None},
    },
    "machine": {"cpu": "Imaginary CPU 9000", "cores": 2, "gpu": None, "memory_bytes": 8_589_934_592},
    "skipped_steps": 1,
}


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
            "seconds": 2.0 + 0.1 * math.sin(step * 3.7),
        }
        if step % max(count // 8, 1) == 0:
            entry["eval_loss"] = 3.44 + 4.4 * math.exp(-8 * step / count)
        if skipped:
            entry["skipped"] = True
        steps.append(entry)
    return steps


def write_metrics(run: Path, steps: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


def write_document(run: Path, name: str, value: Any) -> None:
    (run / name).write_text(json.dumps(value), encoding="utf-8")
