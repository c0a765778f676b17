"""Predicted beside measured: memory by phase, stage and component; bytes and seconds of a step."""

from typing import Any

from pcscale.common.ledger import COMPONENTS, WORKING
from pcscale.run.record import Peaks, RunRecord, Usage

STEP_STAGES = ("teach", "forward", "backward", "sweep", "evaluate", "checkpoint")
"""The stages of training that recur; `start` comes once."""


def phases(record: RunRecord) -> dict[str, Any]:
    """Every phase that was planned or has run, in that order, with its components and stages.

    Returns:
        `{phase: {seconds, host_anonymous, device, components, stages}}`, and of each stage the same without stages.
        None: not predicted, or not measured. Units: seconds, bytes.
    """
    plan = record.plan or {"phases": {}, "peak": {}}
    measured = record.usage.phases if record.usage else {}
    found = {}
    for name in dict.fromkeys([*plan["phases"], *measured]):
        planned, usage = plan["phases"].get(name, {}), measured.get(name)
        stages, used = planned.get("stages", {}), usage.stages if usage else {}
        found[name] = _span(plan["peak"].get(name, {}), planned.get("components", {}), usage)
        found[name]["stages"] = {
            stage: _span(_totals(stages[stage]) if stage in stages else {}, stages.get(stage, {}), used.get(stage))
            for stage in dict.fromkeys([*stages, *used])
        }
    return found


def highest(phases: dict[str, Any], memory: str) -> dict[str, int | None]:
    """The peak of a run, as predicted and as measured. Units: bytes.

    Args:
        phases: as `phases` gives them.
        memory: `host_anonymous` or `device`.
    """
    peaks = [phase[memory] for phase in phases.values() if phase[memory]]
    return {
        key: max((peak[key] for peak in peaks if peak[key] is not None), default=None)
        for key in ("predicted_bytes", "measured_bytes")
    }


def components(predicted: dict[str, Any], measured: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """The memory of a phase or stage by component, in stacking order.

    Working memory is measured as what is left, so its predicted parts are summed. Files are no memory and are left out;
    pinned memory is the host's. A component on device and host has two entries: `records` and `records (host)`.

    Args:
        predicted: `{name: {home, bytes}}` of plan.json.
        measured: `{placement: {name: bytes}}` of usage.json.

    Returns:
        `{name: {home, predicted_bytes, measured_bytes}}`; home is `host` or `device`.
    """
    pairs: dict[tuple[str, str], dict[str, int | None]] = {}

    def add(name: str, placement: str, key: str, num_bytes: int) -> None:
        pair = pairs.setdefault((name, placement), _pair(None, None))
        pair[key] = (pair[key] or 0) + num_bytes

    listed = {*COMPONENTS, *(name for held in measured.values() for name in held)}
    for name, part in predicted.items():
        if part["home"] != "disk":
            placement = "device" if part["home"] == "device" else "host"
            add(name if name in listed else WORKING, placement, "predicted_bytes", part["bytes"])
    for placement, held in measured.items():
        for name, num_bytes in held.items():
            add(name, placement, "measured_bytes", num_bytes)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for name, _ in pairs}, key=position):
        placements = [placement for placement in ("device", "host") if (name, placement) in pairs]
        for placement in [each for each in placements if any(pairs[name, each].values())] or placements[:1]:
            label = f"{name} ({placement})" if name in found else name
            found[label] = {"home": placement, **pairs[name, placement]}
    return found


def step_seconds(record: RunRecord) -> dict[str, Any]:
    """The time of a step; evaluations and checkpoints are shared out over all steps.

    Returns:
        `{predicted: {part: seconds} or None, measured: {stage: seconds}}`. Units: seconds a step.
    """
    stages = _training(record).stages if record.steps else {}
    return {
        "predicted": (record.plan or {}).get("step_seconds"),
        "measured": {name: stages[name].seconds / len(record.steps) for name in STEP_STAGES if name in stages},
    }


def bytes_per_step(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Bytes that a step moves to where it computes and back, writes to files, and communicates between ranks.

    Checkpoints count as written. No run measures what it communicates.

    Returns:
        `{kind: {predicted_bytes, measured_bytes}}`. Units: bytes a step.
    """
    plan, training, steps = record.plan or {}, _training(record), len(record.steps)
    swept = [step.moved_bytes for step in record.steps if not step.skipped]
    written = training.peak.written / steps if steps and training.seconds else None
    return {
        "moved": _pair(sum(plan["moved"].values()) if plan else None, sum(swept) / max(len(swept), 1)),
        "written": _pair(plan.get("written_bytes_per_step"), written),
        "communicated": _pair(plan.get("communicated_bytes_per_step"), None),
    }


def alternatives(record: RunRecord) -> dict[str, Any] | None:
    """Device and host memory that training needs, this way and others; only this run can be measured.

    Returns:
        `{way: {bytes, of, measured_bytes}}`; `bytes` is predicted. None: the run has no plan yet.
    """
    if record.plan is None:
        return None
    peak = _training(record).peak
    # Pinned memory is a part of anonymous memory.
    measured = None if peak.host_anonymous is None else peak.host_anonymous + (peak.device or 0)
    return {
        way: {**need, "measured_bytes": measured if way == "this run" else None}
        for way, need in record.plan["alternatives"].items()
    }


def difference(predicted: float | None, measured: float | None) -> float | None:
    """Measured against predicted as a fraction: 0.1 is ten per cent more than predicted. None: nothing to compare."""
    return measured / predicted - 1 if measured is not None and predicted else None


def position(name: str) -> int:
    """The place of a component in the stack; one that nobody knows comes last, with working memory."""
    name = name.removesuffix(" (host)")
    return COMPONENTS.index(name) if name in COMPONENTS else COMPONENTS.index(WORKING)


def _span(predicted: dict[str, int], parts: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
    """A phase or a stage."""
    peak = usage.peak if usage else Peaks()
    return {
        "seconds": usage.seconds if usage else None,
        "host_anonymous": _pair(predicted.get("host_bytes"), peak.host_anonymous),
        "device": None if peak.device is None else _pair(predicted.get("device_bytes"), peak.device),
        "components": components(parts, usage.components if usage else {}),
    }


def _totals(parts: dict[str, Any]) -> dict[str, int]:
    """The predicted sums of a stage."""
    return {
        f"{homes[0]}_bytes": sum(part["bytes"] for part in parts.values() if part["home"] in homes)
        for homes in (("host", "pinned"), ("device",))
    }


def _pair(predicted: Any, measured: Any) -> dict[str, Any]:
    return {"predicted_bytes": predicted, "measured_bytes": measured}


def _training(record: RunRecord) -> Usage:
    """The usage of the training phase; before it nothing was used."""
    return record.usage.phases.get("train", Usage()) if record.usage else Usage()
