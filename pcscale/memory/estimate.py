"""The plan of a run: sizes, FLOPs, bytes per component, phase and home, bytes moved and written, from configs alone.

Needs no torch. What a phase holds is in memory/components.py, how long a step takes in memory/step_time.py.
"""

import math
from typing import Any

from pcscale.common import ledger
from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan
from pcscale.memory import components, working
from pcscale.memory.components import record_format
from pcscale.memory.hardware import Hardware
from pcscale.memory.place import FLOAT_BYTES, Part, Parts, Place
from pcscale.memory.step_time import step_seconds
from pcscale.projection.costs import sweep_flops
from pcscale.projection.layout import record_bytes, trainable_values

PHASES = ("calibrate", "train", "merge", "evaluate")
TRAIN = "train"
PUBLISHED_BYTES = 16
"""A trainable value in the published form: a float32 value, its gradient and two moments."""
_HOMES = {"device": "device_bytes", "host": "host_bytes", "pinned": "host_bytes"}


def phase_parts(plan: Plan, config: RunConfig, place: Place) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """What each phase holds at its peak, and each moment of training."""
    moments = components.train_moments(plan, config, place)
    phases = {
        "calibrate": components.calibrate_parts(plan, config, place),
        TRAIN: max(moments.values(), key=lambda parts: _peak_order(parts, place)),
        "merge": components.merge_parts(plan, config, place),
        "evaluate": components.evaluate_parts(plan, config, place),
    }
    return phases, moments


def totals(parts: Parts) -> dict[str, int]:
    """`{device_bytes, host_bytes}`, pinned memory counted as the host's."""
    found = {"device_bytes": 0, "host_bytes": 0}
    for part in parts.values():
        if part.home in _HOMES:
            found[_HOMES[part.home]] += part.num_bytes
    return found


def _peak_order(parts: Parts, place: Place) -> int:
    return totals(parts)["device_bytes" if place.on_gpu else "host_bytes"]


def peaks(plan: Plan, config: RunConfig, place: Place) -> dict[str, dict[str, int]]:
    """`{phase: {device_bytes, host_bytes, disk_bytes}}` of one rank; the disk's are of all ranks together.

    The device's and the host's peak may be in different moments.
    """
    phases, moments = phase_parts(plan, config, place)
    found = {phase: totals(parts) for phase, parts in phases.items()}
    for parts in moments.values():
        for key, num_bytes in totals(parts).items():
            found[TRAIN][key] = max(found[TRAIN][key], num_bytes)
    disk = disk_parts(plan, config)
    return {phase: {**found[phase], "disk_bytes": sum(disk[phase].values())} for phase in PHASES}


def disk_parts(plan: Plan, config: RunConfig) -> dict[str, dict[str, int]]:
    """What lies in the run folder at most, by phase. Units: bytes."""
    sizes = {record_bytes(planned, record_format(config)): 0 for planned, _ in plan.alike}
    for planned, count in plan.alike:
        sizes[record_bytes(planned, record_format(config))] += count
    in_files = config.residency == "disk" and config.method == "projected"
    coded = {"8-bit base": _kept_base_bytes(plan, config) * (config.base_precision == "int8")}
    one = checkpoint_bytes(plan, config)
    rebuilt = 2 * plan.num_layers * working.rebuilt_values(plan) * config.rebuilds
    return {
        "calibrate": {"rebuilt channels": rebuilt},
        TRAIN: {
            **coded,
            "rebuilt channels": rebuilt,
            "records and moments": sum(size * count for size, count in sizes.items()) * in_files,
            "spare files": sum(sizes) * in_files,
            "checkpoints": one * (config.keep_checkpoints + 1),
        },
        "merge": {**coded, "checkpoints": one * config.keep_checkpoints, "merged model": merged_bytes(plan)},
        "evaluate": {**coded, "checkpoints": one * config.keep_checkpoints, "merged model": merged_bytes(plan)},
    }


def merged_bytes(plan: Plan) -> int:
    """Of the finished model, in the base's dtype."""
    return plan.parameters * working.stored_bytes(plan.base_config)


def checkpoint_bytes(plan: Plan, config: RunConfig) -> int:
    """Disk that one checkpoint takes: every trainable value with its moments.

    With residency disk it shares its files with the records until they are written anew.
    """
    if config.method != "projected":
        return 3 * plan.parameters * FLOAT_BYTES
    matrices = sum(math.prod(planned.shape) * count for planned, count in plan.alike)
    records = sum(record_bytes(planned, record_format(config)) * count for planned, count in plan.alike)
    return records + 3 * (plan.parameters - matrices) * FLOAT_BYTES + working.basis_bytes(plan) * config.rotates


def moved_bytes(plan: Plan, config: RunConfig, place: Place | None = None) -> dict[str, int]:
    """The least that a step can move, over all ranks: each base weight once, each record in and out once.

    With a teacher also what it reads: every rank the base's weights for its own tokens, or their part of a cache.
    """
    place = place or Place()
    taught = working.taught_bytes(plan, config, 2 if place.on_gpu and config.bf16 else FLOAT_BYTES) * place.ranks
    teacher = {"teacher": taught} if config.distill is not None else {}
    if config.method != "projected":
        return {"base": 0, "records_read": 0, "records_written": 0, **teacher}
    records = sum(record_bytes(planned, record_format(config)) * count for planned, count in plan.alike)
    records = 0 if config.residency == "device" else records
    base = 0 if config.base_home == "device" else _kept_base_bytes(plan, config)
    return {"base": base, "records_read": records, "records_written": records, **teacher}


def _kept_base_bytes(plan: Plan, config: RunConfig) -> int:
    return sum(working.kept_base_bytes(planned, plan.base_config, config) * count for planned, count in plan.alike)


def written_bytes_per_step(plan: Plan, config: RunConfig) -> int:
    """What a step writes to files, a checkpoint's share with it: the wear of the disk."""
    in_files = config.residency == "disk" and config.method == "projected"
    records = moved_bytes(plan, config)["records_written"] * in_files
    # Where records are files, a checkpoint links them.
    checkpoint = checkpoint_bytes(plan, config) * (not in_files)
    return records + checkpoint // config.save_steps


def communicated_bytes_per_step(plan: Plan, config: RunConfig, place: Place) -> int:
    """Payload of one rank's collectives: gradients reduced and weights sent once at stage 0, twice at stages 1 to 3."""
    if place.ranks == 1:
        return 0
    once = plan.parameters * (FLOAT_BYTES + working.weight_bytes(config))
    return once * (2 if place.zero is not None and place.zero.stage > 0 else 1)


def alternatives(plan: Plan, config: RunConfig, place: Place) -> dict[str, dict[str, Any]]:
    """Device and host memory that training takes, beside that of the published form and of hard pruning."""
    moments = components.train_moments(plan, config, place)
    backward = moments["backward"]
    same = sum(
        backward[name].num_bytes
        for name in (ledger.LIBRARIES, ledger.CONTEXT, *components.WORKING_PARTS)
        if name in backward
    )
    values = sum(trainable_values(planned) for planned in plan.weights)
    base = plan.base_parameters * working.stored_bytes(plan.base_config)
    composed = 2 * FLOAT_BYTES * sum(math.prod(planned.shape) * count for planned, count in plan.alike)
    own = max(sum(totals(parts).values()) for parts in moments.values())
    return {
        "published form": {
            "bytes": base + PUBLISHED_BYTES * values + composed + same,
            "of": "the base, 16 bytes a trainable value, the composed weights with their gradients, and activations",
        },
        "hard pruning": {
            "bytes": PUBLISHED_BYTES * plan.parameters + same,
            "of": "16 bytes a parameter of the compressed model, and activations",
        },
        "this run": {"bytes": own * place.ranks, "of": "all that training holds on devices and hosts, libraries too"},
    }


def plan_document(
    plan: Plan, config: RunConfig, base_name: str, place: Place | None = None, hardware: Hardware | None = None
) -> dict[str, Any]:
    """plan.json, and what `pcscale plan --json` prints.

    Args:
        place: None: one GPU.
        hardware: what a step's time is predicted for; None: it is not.
    """
    place = place or Place()
    projected = config.method == "projected"
    phases, moments = phase_parts(plan, config, place)
    largest = {
        name: max((parts[name] for parts in moments.values() if name in parts), key=lambda part: part.num_bytes)
        for name in dict.fromkeys(name for parts in moments.values() for name in parts)
    }
    values = sum(trainable_values(planned, config.rank if projected else None) for planned in plan.weights)
    compose, pull_back = sweep_flops(plan, config.product_rank)
    zero_stage = place.zero.stage if place.zero else 0
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
        "trainable": {
            "parameters": values if projected else plan.parameters,
            "bytes": checkpoint_bytes(plan, config),
        },
        "flops": {
            "compose_per_step": compose * projected,
            "pull_back_per_step": pull_back * projected,
            "train_per_token": plan.train_flops_per_token(config.sequence_length),
        },
        "moved": moved_bytes(plan, config, place),
        "written_bytes_per_step": written_bytes_per_step(plan, config),
        "communicated_bytes_per_step": communicated_bytes_per_step(plan, config, place),
        "step_seconds": step_seconds(plan, config, hardware, place.ranks, zero_stage) if hardware else None,
        "memory": _document(largest),
        "peak": peaks(plan, config, place),
        "phases": {
            phase: {
                "components": _document(parts),
                "moments": {name: _document(held) for name, held in moments.items()} if phase == TRAIN else {},
            }
            for phase, parts in phases.items()
        },
        "disk": disk_parts(plan, config),
        "alternatives": alternatives(plan, config, place),
        "ranks": place.ranks,
    }


def _document(parts: dict[str, Part]) -> dict[str, dict[str, Any]]:
    return {name: {"home": part.home, "bytes": part.num_bytes} for name, part in parts.items()}
