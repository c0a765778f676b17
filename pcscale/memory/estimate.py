"""Predicted bytes per component and phase, from configs alone. Needs no torch.

Homes: `device` is where the model trains (host memory on a machine without a GPU), `host` anonymous host memory,
`disk` files. The base is mapped from its files: file-backed memory, which no budget here counts.
"""

import math
from dataclasses import dataclass
from typing import Any

from pcscale.common.units import parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.families.axes import FFN, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB
from pcscale.families.costs import compose_flops, out_side_first, pull_back_flops
from pcscale.families.hf_config import stored_dtype
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.families.spec import Config
from pcscale.projection.layout import (
    AHEAD,
    AUX,
    QUANTISED_BLOCK,
    RecordFormat,
    overlap_bytes,
    record_bytes,
    record_layout,
    row_blocks,
    trainable_values,
    value_shapes,
)

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


def record_format(config: RunConfig) -> RecordFormat:
    """The format that a run keeps its records in."""
    aux_start = config.weight_decay > 0 and config.base_precision == "int8"
    return RecordFormat(config.record_dtype, config.moments, config.rank, aux_start)


def train_components(plan: Plan, config: RunConfig) -> dict[str, Component]:
    """What training holds at its peak."""
    matrices = list(plan.matrices) if config.method == "projected" else []
    form = record_format(config)
    layouts = [record_layout(planned, form) for planned in matrices]
    sizes = [sum(spec.num_bytes for spec in layout.values()) for layout in layouts]
    values = sum(spec.num_bytes for layout in layouts for name, spec in layout.items() if "." not in name)
    record_home = {"device": "device", "cpu": "host", "disk": "disk"}[config.residency]
    weight_bytes = 2 if config.bf16 else FLOAT_BYTES
    gradient_bytes = 2 if config.gradient_dtype == "bfloat16" else FLOAT_BYTES
    direct = plan.parameters - sum(math.prod(planned.shape) for planned in matrices)
    direct_copies = 3 if config.bf16 else 2  # moments, and a float32 value where the weight has none
    tokens = config.per_device_train_batch_size * config.sequence_length
    overlap = 0 if config.residency == "device" else overlap_bytes(sizes)
    staging = overlap if config.residency == "disk" else 0
    if config.pinned_memory is not None:
        staging = min(staging, parse_bytes(config.pinned_memory))
    kept = [kept_base_bytes(planned, plan.base_config, config) for planned in matrices]
    base_home = {"device": "device", "cpu": "host", "zero": "host", "disk": "disk"}[config.base_home]
    return {
        "compressed weights": Component("device", plan.parameters * weight_bytes),
        "gradients": Component("host" if config.gradient_home == "cpu" else "device", plan.parameters * gradient_bytes),
        "frozen base": Component(base_home, sum(kept)),
        "records": Component(record_home, values),
        "moments": Component(record_home, sum(sizes) - values),
        "record buffers": Component("device", overlap),
        "pinned buffers": Component("host", staging),
        "norms and biases": Component("device", direct * direct_copies * FLOAT_BYTES),
        "base on its way": Component("device", 0 if config.base_home == "device" else _under_way(kept)),
        "base in flight": Component("device", max((_block_bytes(planned) for planned in matrices), default=0)),
        "sweep temporaries": Component("device", max((_sweep_bytes(planned, form) for planned in matrices), default=0)),
        "activations": Component("device", tokens * _activation_values(plan, config) * weight_bytes),
        "logits": Component("device", _logit_bytes(plan, tokens)),
        "libraries": Component("host", LIBRARY_BYTES),
    }


def kept_base_bytes(planned: PlannedWeight, base_config: Config, config: RunConfig) -> int:
    """One base weight as `base_precision` keeps it."""
    values = math.prod(planned.base_shape)
    if config.base_precision == "int8":
        return values + FLOAT_BYTES * -(-values // QUANTISED_BLOCK)
    return values * (FLOAT_BYTES if stored_dtype(base_config) == "float32" else 2)


def _under_way(kept: list[int]) -> int:
    """Base weights on a GPU at a time: the one that is worked on and those that were fetched ahead of it."""
    return max((sum(kept[first : first + AHEAD + 1]) for first in range(len(kept))), default=0)


def moved_bytes(plan: Plan, config: RunConfig) -> dict[str, int]:
    """The least that a step can move: each base weight once, each record in and out once."""
    if config.method != "projected":
        return {"base": 0, "records_read": 0, "records_written": 0}
    records = sum(record_bytes(planned, record_format(config)) for planned in plan.matrices)
    records = 0 if config.residency == "device" else records
    base = sum(kept_base_bytes(planned, plan.base_config, config) for planned in plan.matrices)
    base = 0 if config.base_home == "device" else base
    return {"base": base, "records_read": records, "records_written": records}


def _base_bytes(planned: PlannedWeight) -> int:
    return math.prod(planned.base_shape) * FLOAT_BYTES


def _block_bytes(planned: PlannedWeight) -> int:
    """The base weight, or a block of its rows, in the dtype of the products."""
    rows = max(block.stop - block.start for block in row_blocks(planned))
    return rows * planned.base_shape[1] * FLOAT_BYTES


def _sweep_bytes(planned: PlannedWeight, form: RecordFormat) -> int:
    """What a visit holds beside base and record: float32 factors, their gradients, and products."""
    shapes = value_shapes(planned, form.rank)
    factors = sum(math.prod(shape) for name, shape in shapes.items() if name != AUX)
    copies = 0 if form.dtype == "float32" else factors
    (base_out, base_in), (out, in_) = planned.base_shape, planned.shape
    if not planned.projects_out:
        # The gradient of one block beside the sum of those before, or the kept columns beside a product.
        rows = max(block.stop - block.start for block in row_blocks(planned))
        return (copies + max(2 * factors, 2 * rows * in_)) * FLOAT_BYTES
    product = out * base_in if out_side_first(*planned.shapes, form.rank) else base_out * in_
    # Gradients beside one product, or the product beside the kept entries that it is added to.
    return (copies + max(factors + product, 2 * product)) * FLOAT_BYTES


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
    """Disk that one checkpoint takes: every trainable value with its moments.

    With residency disk it shares its files with the records until they are written anew.
    """
    if config.method != "projected":
        return 3 * plan.parameters * FLOAT_BYTES
    direct = sum(math.prod(planned.shape) for planned in plan.weights if not planned.is_matrix)
    records = sum(record_bytes(planned, record_format(config)) for planned in plan.matrices)
    return records + 3 * direct * FLOAT_BYTES


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
    train_host = sum(part.num_bytes for name, part in train.items() if part.home == "host" and name != "libraries")
    host = {"calibrate": hidden, "train": train_host, "merge": merge_need_bytes(plan, config.rank), "evaluate": 0}
    coded = sum(kept_base_bytes(planned, plan.base_config, config) for planned in plan.matrices) * (
        config.base_precision == "int8"
    )
    disk = {
        "calibrate": 0,
        "train": checkpoint_bytes(plan, config) * (config.keep_checkpoints + 1) + coded,
        "merge": merged,
    }
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
    projected = config.method == "projected"
    values = sum(trainable_values(planned, config.rank if projected else None) for planned in plan.weights)
    trainable = values if projected else plan.parameters
    matrices = [planned.shapes for planned in plan.matrices] if projected else []
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
        "trainable": {"parameters": trainable, "bytes": checkpoint_bytes(plan, config)},
        "flops": {
            "compose_per_step": sum(compose_flops(*shapes, config.rank) for shapes in matrices),
            "pull_back_per_step": sum(pull_back_flops(*shapes, config.rank) for shapes in matrices),
            "train_per_token": plan.train_flops_per_token(config.sequence_length),
        },
        "moved": moved_bytes(plan, config),
        "memory": {
            name: {"home": component.home, "bytes": component.num_bytes}
            for name, component in train_components(plan, config).items()
        },
        "peak": phase_peaks(plan, config),
    }


def on_host_alone(document: dict[str, Any]) -> dict[str, Any]:
    """The same plan on a machine without a GPU: what the device would hold, the host holds."""
    # Without a copy to the device one set of buffers does for both.
    staged = document["memory"]["pinned buffers"]["bytes"] > 0
    gpu_only = ("base on its way", "record buffers" if staged else "pinned buffers")
    absent = sum(document["memory"][name]["bytes"] for name in gpu_only)
    peaks = {
        phase: {
            **peak,
            "device_bytes": 0,
            "host_bytes": peak["host_bytes"] + peak["device_bytes"] - absent * (phase == "train"),
        }
        for phase, peak in document["peak"].items()
    }
    memory = {
        name: {**component, "home": "host" if component["home"] == "device" else component["home"]}
        for name, component in document["memory"].items()
        if name not in gpu_only
    }
    return {**document, "memory": memory, "peak": peaks}
