"""Settings and plans that the tests of predicted memory share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from pcscale.common import ledger
from pcscale.config.schema import PlanConfig
from pcscale.distributed.zero_form import ZeroForm
from pcscale.families.hf_config import read_config
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory.deployment import ONE_GPU, Deployment, Parts
from pcscale.memory.stages import (
    ACTIVATIONS,
    ALLOCATOR,
    HEAD_GRADIENT,
    IN_FLIGHT,
    LOGITS,
    ON_ITS_WAY,
    START,
    TEMPORARIES,
)
from tests.tiny import SIZES


def settings(**changes: Any) -> PlanConfig:
    """From the published start on."""
    published = {"start": "selection", "importance": "activation"}
    return PlanConfig(base="a base", **(published | changes))


def written_plan(folder: Path, family: str, widths: tuple[int, int], **changes: Any) -> Plan:
    """A plan from the config.json that stock transformers writes."""
    CONFIG_MAPPING[family](**{**SIZES, **changes}).save_pretrained(folder)
    return plan_widths(FAMILIES[family], read_config(folder), *widths)


KEYS = {"calibrate": "calibration_tokens", "evaluate": "eval_tokens"}
HEADER_SHARE = 0.1
"""Of a tiny checkpoint: safetensors headers and kept indices, which the estimate leaves out."""
GPU, HOST = ONE_GPU, Deployment(on_gpu=False)
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
"""Placements of the parts that training holds all the time on a GPU, by the defaults."""
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
"""Placements of all parts that training holds at one time or another."""
DEPLOYMENTS = {
    "gpu": GPU,
    "host": HOST,
    "2 ranks": Deployment(ranks=2, zero=ZeroForm(1)),
    "4 ranks, offload": Deployment(ranks=4, zero=ZeroForm(3, "cpu", "cpu")),
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
        if part.placement != "disk":
            found["device_bytes" if part.placement == "device" else "host_bytes"] += part.num_bytes
    return found
