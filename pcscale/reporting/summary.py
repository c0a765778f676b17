"""The contents of report.json: predicted beside measured memory by phase, stage and component; bytes of a step."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from pcscale.common.ledger import COMPONENTS, WORKING
from pcscale.run.record import Peaks, RunRecord, Usage

STEP_STAGES = ("teach", "forward", "backward", "sweep", "evaluate", "checkpoint")
"""The stages of training that recur; `start` comes once."""


def summarize(record: RunRecord) -> dict[str, Any]:
    """The figures of a run; a pair is `{predicted_bytes, measured_bytes}`, and None is not known (yet)."""
    found, steps = phases(record), record.steps
    device = highest(found, "device")
    return {
        "run": str(record.path),
        "plan": record.plan,
        "evaluation": {key: value for key, value in asdict(record.evaluation).items() if key != "sample"},
        "peak": {
            "host_anonymous": highest(found, "host_anonymous"),
            "device": None if device["measured_bytes"] is None else device,
        },
        "phases": found,
        "step_bytes": step_bytes(record),
        "step_seconds": {"measured": step_seconds(record)},
        "alternatives": _alternatives(record),
        "devices": (record.plan or {}).get("devices"),
        "limits": asdict(record.usage.limits) if record.usage else None,
        "training": {
            "steps": len(steps),
            "tokens": steps[-1].tokens if steps else 0,
            "seconds": sum(step.seconds for step in steps),
            "final_loss": next((step.loss for step in reversed(steps) if step.loss is not None), None),
            "best_eval_loss": min((step.eval_loss for step in steps if step.eval_loss is not None), default=None),
            "skipped_steps": sum(step.skipped for step in steps),
        },
        "merge": record.merge,
    }


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
    """The pair of a run's peaks in `host_anonymous` or `device` memory."""
    peaks = [phase[memory] for phase in phases.values() if phase[memory]]
    return {key: max((peak[key] for peak in peaks if peak[key] is not None), default=None) for key in _pair(None, None)}


def components(predicted: dict[str, Any], measured: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """The memory of a phase or stage by component, in stacking order; what holds nothing is left out.

    Working memory is measured as what is left, so its predicted parts are summed. Files are no memory; pinned memory is
    the host's. A component on device and host has two entries: `records` and `records (host)`.

    Args:
        predicted: `{name: {home, bytes}}` of plan.json.
        measured: `{placement: {name: bytes}}` of usage.json.

    Returns:
        `{name: {home, predicted_bytes, measured_bytes}}`; home is `host` or `device`.
    """
    held = {(name, home): num_bytes for home, parts in measured.items() for name, num_bytes in parts.items()}
    listed = {*COMPONENTS, *(name for name, _ in held)}
    planned: Counter[tuple[str, str]] = Counter()
    for name, part in predicted.items():
        if part["home"] != "disk":
            home = "device" if part["home"] == "device" else "host"
            planned[name if name in listed else WORKING, home] += part["bytes"]
    found: dict[str, dict[str, Any]] = {}
    for name, home in sorted({*planned, *held}, key=lambda part: (*stack_order(part[0]), part[1])):
        pair = _pair(planned.get((name, home)), held.get((name, home)))
        if any(pair.values()):
            found[f"{name} ({home})" if name in found else name] = {"home": home, **pair}
    return found


def stack_order(name: str) -> tuple[int, str]:
    """The place of a component in a stack or a table; one that is not listed comes last, with working memory."""
    name = name.removesuffix(" (host)")
    return COMPONENTS.index(name if name in COMPONENTS else WORKING), name


def step_seconds(record: RunRecord) -> dict[str, float]:
    """Measured seconds of a step by stage; evaluations and checkpoints are shared out over all steps."""
    stages = _training(record).stages if record.steps else {}
    return {name: stages[name].seconds / len(record.steps) for name in STEP_STAGES if name in stages}


def step_bytes(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Pairs of the bytes that a step moves to where it computes and back, writes to files, and communicates.

    Checkpoints count as written. No run measures what it communicates between ranks.
    """
    plan, training, steps = record.plan or {}, _training(record), len(record.steps)
    swept = [step.moved_bytes for step in record.steps if not step.skipped]
    written = training.peak.written / steps if steps and training.seconds else None
    return {
        "moved": _pair(sum(plan["moved"].values()) if plan else None, sum(swept) / max(len(swept), 1)),
        "written": _pair(plan.get("written_bytes_per_step"), written),
        "communicated": _pair(plan.get("communicated_bytes_per_step"), None),
    }


def difference(predicted: float | None, measured: float | None) -> float | None:
    """Measured against predicted as a fraction: 0.1 is ten per cent more than predicted. None: nothing to compare."""
    return measured / predicted - 1 if measured is not None and predicted else None


def _alternatives(record: RunRecord) -> dict[str, Any] | None:
    """Device and host memory that training needs in this way and in others, of which only this one is measured."""
    peak = _training(record).peak
    # Pinned memory is a part of anonymous memory.
    measured = None if peak.host_anonymous is None else peak.host_anonymous + (peak.device or 0)
    return record.plan and {
        way: {**need, "measured_bytes": measured if way == "this run" else None}
        for way, need in record.plan["alternatives"].items()
    }


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


def _pair(predicted: float | None, measured: float | None) -> dict[str, Any]:
    return {"predicted_bytes": predicted, "measured_bytes": measured}


def _training(record: RunRecord) -> Usage:
    """The usage of the training phase; before it nothing was used."""
    return record.usage.phases.get("train", Usage()) if record.usage else Usage()
