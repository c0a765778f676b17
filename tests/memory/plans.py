"""Settings and plans that the tests of predicted memory share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from pcscale.common import ledger
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.families.hf_config import read_config
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory.components import (
    ACTIVATIONS,
    ALLOCATOR,
    HEAD_GRADIENT,
    IN_FLIGHT,
    LOGITS,
    ON_ITS_WAY,
    START,
    TEMPORARIES,
)
from pcscale.memory.hardware import HARDWARE
from pcscale.memory.place import Parts, Place, ZeroForm
from tests.tiny import SIZES


def settings(**changes: Any) -> RunConfig:
    """From the published start on."""
    published = {"start": "selection", "importance": "activation"}
    return RunConfig(base="-", output="-", data=DataConfig(train=["-"]), **(published | changes))


def written_plan(folder: Path, family: str, widths: tuple[int, int], **changes: Any) -> Plan:
    """A plan from the config.json that stock transformers writes."""
    CONFIG_MAPPING[family](**{**SIZES, **changes}).save_pretrained(folder)
    return plan_widths(FAMILIES[family], read_config(folder), *widths)


KEYS = {"calibrate": "calibration_tokens", "evaluate": "eval_tokens"}
HEADER_SHARE = 0.1
"""Of a tiny checkpoint: safetensors headers and kept indices, which the estimate leaves out."""
GPU, HOST = Place(), Place(on_gpu=False)
ON_GPU_ALONE = {ledger.CONTEXT, ledger.PINNED_BUFFERS, ON_ITS_WAY}
HELD = {
    ledger.LIBRARIES: "host",
    ledger.CONTEXT: "device",
    ledger.WEIGHTS: "device",
    ledger.DIRECT: "device",
    ledger.FROZEN_BASE: "disk",
    ledger.RECORDS: "device",
    ledger.MOMENTS: "device",
    ledger.RECORD_BUFFERS: "device",
    ledger.PINNED_BUFFERS: "pinned",
}
"""What training holds all the time on a GPU, by the defaults, and where."""
COMPONENTS = HELD | {
    ledger.GRADIENTS: "device",
    ACTIVATIONS: "device",
    LOGITS: "device",
    HEAD_GRADIENT: "device",
    ON_ITS_WAY: "device",
    IN_FLIGHT: "device",
    TEMPORARIES: "device",
    ALLOCATOR: "device",
    START: "host",
}
"""And all that it holds at one time or another."""
PLACES = {
    "gpu": GPU,
    "host": HOST,
    "2 ranks": Place(ranks=2, zero=ZeroForm(1)),
    "4 ranks, offload": Place(ranks=4, zero=ZeroForm(3, "cpu", "cpu")),
}
FORMS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 1, "gradient_checkpointing": True},
    {"residency": "cpu", "base_home": "cpu", "bf16": True, "record_dtype": "bfloat16", "moments": "8bit"},
    {"residency": "disk", "base_precision": "int8", "base_home": "device", "gradient_home": "cpu"},
    {"method": "hard_prune"},
    # On a GPU the device's peak is in the backward pass, the host's in the sweep.
    {"gradient_home": "cpu", "gradient_accumulation_steps": 1, "sequence_length": 4096},
]


def with_vocabulary(plan: Plan, vocab_size: int) -> Plan:
    return replace(plan, base_config={**plan.base_config, "vocab_size": vocab_size})


def held_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def sums(parts: Parts) -> dict[str, int]:
    found = {"device_bytes": 0, "host_bytes": 0}
    for part in parts.values():
        if part.home != "disk":
            found["device_bytes" if part.home == "device" else "host_bytes"] += part.num_bytes
    return found


SLOW_HOST = replace(
    HARDWARE["rtx-4090"],
    name="host",
    product_rates={"float32": 1.5e11, "bfloat16": 1e10},
    training_rates={"float32": 1.1e11, "bfloat16": 5e9},
    memory_bandwidth=1.5e10,
    bus_bandwidth=1.2e10,
    rank_bandwidth=4e8,
    update_seconds={"float32/32bit": 2e-9, "float32/8bit": 4e-9, "bfloat16/32bit": 6e-9, "bfloat16/8bit": 8e-9},
    decode_seconds=1.5e-9,
    device_bytes=None,
)
"""A host of two cores without a GPU, about as fast as those that reports were measured on."""
