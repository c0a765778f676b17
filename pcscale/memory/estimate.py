"""Predicted bytes per component and phase, from configs alone. Needs no torch.

Homes: `device` is where the model trains (host memory on a machine without a GPU), `host` anonymous host memory,
`disk` files. The base is mapped from its files: file-backed memory, which no budget here counts.
"""

import math
from dataclasses import dataclass
from typing import Any

from pcscale.config.schema import RunConfig
from pcscale.families.axes import FFN, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB
from pcscale.families.plan import Plan, PlannedWeight

FLOAT_BYTES = 4
LIBRARY_BYTES = 450 * 2**20
"""Anonymous memory of Python, torch and transformers with their thread pools, before any tensor."""
MERGE_BLOCK = 1024
"""Rows or columns that a merge composes at a time, whatever the matrix's size."""
PHASES = ("calibrate", "train", "merge", "evaluate")


@dataclass(frozen=True)
class Component:
    """One part of a phase's memory. Units: bytes."""

    home: str
    num_bytes: int


def train_components(plan: Plan, config: RunConfig) -> dict[str, Component]:
    """What training holds at its peak."""
    matrices = list(plan.matrices) if config.method == "projected" else []
    weight_bytes = 2 if config.bf16 else FLOAT_BYTES
    records = sum(planned.trainable for planned in matrices)
    direct = plan.parameters - sum(math.prod(planned.shape) for planned in matrices)
    direct_copies = 3 if config.bf16 else 2  # moments, and a float32 value where the weight has none
    tokens = config.per_device_train_batch_size * config.sequence_length
    return {
        "compressed weights": Component("device", plan.parameters * weight_bytes),
        "gradients": Component("device", plan.parameters * FLOAT_BYTES),
        "records": Component("device", records * FLOAT_BYTES),
        "moments": Component("device", 2 * records * FLOAT_BYTES),
        "norms and biases": Component("device", direct * direct_copies * FLOAT_BYTES),
        "base in flight": Component("device", max((_base_bytes(planned) for planned in matrices), default=0)),
        "sweep temporaries": Component("device", max((_sweep_bytes(planned) for planned in matrices), default=0)),
        "activations": Component("device", tokens * _activation_values(plan, config) * weight_bytes),
        "logits": Component("device", _logit_bytes(plan, tokens)),
        "libraries": Component("host", LIBRARY_BYTES),
    }


def _base_bytes(planned: PlannedWeight) -> int:
    return math.prod(planned.base_shape) * FLOAT_BYTES


def _sweep_bytes(planned: PlannedWeight) -> int:
    """Gradients of the two projections and one product of a side."""
    (base_out, base_in), (out, in_) = planned.base_shape, planned.shape
    both = planned.projects_out and planned.projects_in
    product = max(out * base_in, base_out * in_) if both else out * in_
    return (planned.trainable - out * in_ + product) * FLOAT_BYTES


def _activation_values(plan: Plan, config: RunConfig) -> int:
    """Values a token that the backward pass keeps."""
    sizes = plan.sizes
    layer = 8 * sizes[RESIDUAL] + 3 * (sizes[Q_HEADS] + sizes[KV_HEADS]) + 4 * sizes[FFN]
    if config.gradient_checkpointing:
        return plan.num_layers * sizes[RESIDUAL] + layer
    return plan.num_layers * layer


def _logit_bytes(plan: Plan, tokens: int) -> int:
    from_chunk = 2**23  # compressed/loss.py: entries of one chunk
    return 3 * min(tokens * plan.sizes[VOCAB], from_chunk) * FLOAT_BYTES


def checkpoint_bytes(plan: Plan, config: RunConfig) -> int:
    """Disk that one checkpoint takes: every trainable value with its moments."""
    trainable = plan.trainable if config.method == "projected" else plan.parameters
    return 3 * trainable * FLOAT_BYTES


def merge_need_bytes(plan: Plan, rank: int | None = None) -> int:
    """Anonymous memory that merging takes at most, the interpreter aside: the buffers of merging/blocks.py.

    They are used again from matrix to matrix, so each is as large as the matrix that needs most of it.
    """
    sizes = [_merge_buffers(planned, rank) for planned in plan.matrices]
    return FLOAT_BYTES * sum(max(column) for column in zip(*sizes, strict=True))


def _merge_buffers(planned: PlannedWeight, rank: int | None) -> tuple[int, int, int, int, int]:
    """Values of the buffers `in`, `out`, `base`, of the factors of a low rank, and of the results: kept entries,
    product and two conversions."""
    base_out, base_in = planned.base_shape
    rows, columns = min(base_out, MERGE_BLOCK), min(base_in, MERGE_BLOCK)
    in_side, out_side = base_in * columns * planned.projects_in, base_out * rows * planned.projects_out
    factors = (rank or 0) * (max(base_out, base_in) + MERGE_BLOCK)
    return in_side, out_side, max(in_side, out_side), factors, 4 * rows * columns


def phase_peaks(plan: Plan, config: RunConfig) -> dict[str, dict[str, int]]:
    """`{phase: {device_bytes, host_bytes, disk_bytes}}` at each phase's peak."""
    train = train_components(plan, config)
    layer = _layer_bytes(plan)
    tokens = config.per_device_train_batch_size * config.sequence_length
    hidden = min(2**29, max(config.calibration_tokens, config.eval_tokens) * plan.base_sizes[RESIDUAL] * FLOAT_BYTES)
    working = tokens * (4 * plan.base_sizes[FFN] + 4 * plan.base_sizes[RESIDUAL]) * FLOAT_BYTES
    merged = plan.parameters * FLOAT_BYTES
    device = {
        "calibrate": layer + working + plan.base_sizes[RESIDUAL] ** 2 * FLOAT_BYTES,
        "train": sum(component.num_bytes for component in train.values() if component.home == "device"),
        "merge": 0,
        "evaluate": max(merged + _logit_bytes(plan, tokens), layer + working),
    }
    host = {"calibrate": hidden, "train": 0, "merge": merge_need_bytes(plan), "evaluate": 0}
    disk = {"calibrate": 0, "train": checkpoint_bytes(plan, config) * (config.keep_checkpoints + 1), "merge": merged}
    return {
        phase: {
            "device_bytes": device[phase],
            "host_bytes": host[phase] + LIBRARY_BYTES,
            "disk_bytes": disk.get(phase, 0),
        }
        for phase in PHASES
    }


def _layer_bytes(plan: Plan) -> int:
    return sum(_base_bytes(planned) for planned in plan.matrices if planned.weight.layer == 0)


def plan_document(plan: Plan, config: RunConfig, base_name: str) -> dict[str, Any]:
    """plan.json, and what `pcscale plan --json` prints."""
    trainable = plan.trainable if config.method == "projected" else plan.parameters
    return {
        "base": {
            "name": base_name,
            "family": plan.family.name,
            "parameters": plan.base_parameters,
            "tied": plan.tied,
        },
        "compressed": {
            "hidden_size": plan.hidden_size,
            "intermediate_size": plan.intermediate_size,
            "parameters": plan.parameters,
            "keep_fraction": plan.keep_fraction,
        },
        "trainable": {"parameters": trainable, "bytes": 3 * trainable * FLOAT_BYTES},
        "flops": {
            "compose_per_step": plan.compose_flops if config.method == "projected" else 0,
            "pull_back_per_step": plan.pull_back_flops if config.method == "projected" else 0,
            "train_per_token": plan.train_flops_per_token(config.sequence_length),
        },
        "memory": {
            name: {"home": component.home, "bytes": component.num_bytes}
            for name, component in train_components(plan, config).items()
        },
        "peak": phase_peaks(plan, config),
    }


def on_host_alone(document: dict[str, Any]) -> dict[str, Any]:
    """The same plan on a machine without a GPU: what the device would hold, the host holds."""
    peaks = {
        phase: {**peak, "device_bytes": 0, "host_bytes": peak["host_bytes"] + peak["device_bytes"]}
        for phase, peak in document["peak"].items()
    }
    memory = {
        name: {**component, "home": "host" if component["home"] == "device" else component["home"]}
        for name, component in document["memory"].items()
    }
    return {**document, "memory": memory, "peak": peaks}
