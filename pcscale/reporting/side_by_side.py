"""What was predicted beside what was measured: memory by phase, moment and component; bytes and seconds of a step."""

from typing import Any

from pcscale.common.ledger import COMPONENTS, WORKING
from pcscale.reporting.run_data import RunData

STEP_MOMENTS = ("teach", "forward", "backward", "sweep", "evaluate", "checkpoint")
"""The moments of training that recur; `start` comes once."""


def phases(data: RunData) -> dict[str, Any]:
    """Every phase that was planned or has run, in that order, with its components and moments.

    Returns:
        `{phase: {seconds, host_anonymous, device, components, moments}}`, and of each moment the same without moments.
        None: not predicted, or not measured. Units: seconds, bytes.
    """
    predicted = data.plan["peak"] if data.plan else {}
    parts = data.plan.get("phases", {}) if data.plan else {}
    measured = data.usage["phases"] if data.usage else {}
    found = {}
    for name in dict.fromkeys([*predicted, *measured]):
        plan, usage = parts.get(name, {}), measured.get(name, {})
        moments, used_moments = plan.get("moments", {}), usage.get("moments", {})
        found[name] = _span(predicted.get(name, {}), plan.get("components", {}), usage)
        found[name]["moments"] = {
            moment: _span(_totals(moments.get(moment)), moments.get(moment, {}), used_moments.get(moment, {}))
            for moment in dict.fromkeys([*moments, *used_moments])
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
    """The memory of a phase or moment by component, in stacking order.

    Working memory is measured as what is left, so its predicted parts are summed. Files are no memory and are left out;
    pinned memory is the host's. A component on device and host has two entries: `records` and `records (host)`.

    Args:
        predicted: `{name: {home, bytes}}` of plan.json.
        measured: `{home: {name: bytes}}` of usage.json.

    Returns:
        `{name: {home, predicted_bytes, measured_bytes}}`; home is `host` or `device`.
    """
    beside: dict[str, dict[str, dict[str, int | None]]] = {}

    def add(name: str, home: str, key: str, num_bytes: int) -> None:
        pair = beside.setdefault(name, {}).setdefault(home, _pair(None, None))
        pair[key] = (pair[key] or 0) + num_bytes

    listed = {*COMPONENTS, *(name for held in measured.values() for name in held)}
    for name, part in predicted.items():
        if part["home"] != "disk":
            home = "device" if part["home"] == "device" else "host"
            add(name if name in listed else WORKING, home, "predicted_bytes", part["bytes"])
    for home, held in measured.items():
        for name, num_bytes in held.items():
            add(name, home, "measured_bytes", num_bytes)
    found = {}
    for name in sorted(beside, key=position):
        homes = beside[name]
        used = [home for home in ("device", "host") if any(homes.get(home, {}).values())] or list(homes)[:1]
        for home in used:
            label = name if home == used[0] else f"{name} ({home})"
            found[label] = {"home": home, **homes[home]}
    return found


def step_seconds(data: RunData) -> dict[str, Any]:
    """What a step takes; evaluations and checkpoints are shared out over all steps.

    Returns:
        `{predicted: {part: seconds} or None, measured: {moment: seconds}}`. Units: seconds per step.
    """
    moments, steps = _training(data).get("moments", {}), len(data.steps)
    return {
        "predicted": (data.plan or {}).get("step_seconds"),
        "measured": {name: moments[name]["seconds"] / steps for name in STEP_MOMENTS if steps and name in moments},
    }


def bytes_per_step(data: RunData) -> dict[str, dict[str, Any]]:
    """What a step moves to where it computes and back, writes to files, and communicates between ranks.

    Checkpoints count as written. No run measures what it communicates.

    Returns:
        `{kind: {predicted_bytes, measured_bytes}}`. Units: bytes per step.
    """
    plan, steps = data.plan or {}, len(data.steps)
    swept = [step.moved_bytes for step in data.steps if not step.skipped]
    written = _training(data).get("peak", {}).get("written")
    return {
        "moved": _pair(sum(plan["moved"].values()) if "moved" in plan else None, sum(swept) / max(len(swept), 1)),
        "written": _pair(plan.get("written_bytes_per_step"), None if written is None or not steps else written / steps),
        "communicated": _pair(plan.get("communicated_bytes_per_step"), None),
    }


def alternatives(data: RunData) -> dict[str, Any] | None:
    """What training needs on device and host together, this way and others. Only this run can be measured.

    Returns:
        `{way: {bytes, of, measured_bytes}}`; `bytes` is predicted. None: the plan says nothing about it.
    """
    planned = (data.plan or {}).get("alternatives")
    if planned is None:
        return None
    peak = _training(data).get("peak", {})
    # Pinned memory is a part of anonymous memory.
    host_bytes, device_bytes = peak.get("host_anonymous"), peak.get("device")
    measured = None if host_bytes is None else host_bytes + (device_bytes or 0)
    return {way: {**need, "measured_bytes": measured if way == "this run" else None} for way, need in planned.items()}


def difference(predicted: float | None, measured: float | None) -> float | None:
    """Measured against predicted as a fraction: 0.1 is ten per cent more than predicted. None: nothing to compare."""
    return measured / predicted - 1 if measured is not None and predicted else None


def _span(prediction: dict[str, int], parts: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    """A phase or a moment."""
    # Runs from before there were moments have the two peaks as keys of their own.
    peak = usage.get("peak", {})
    host_bytes = peak.get("host_anonymous", usage.get("peak_host_anonymous_bytes"))
    device_bytes = peak.get("device", usage.get("peak_device_bytes"))
    return {
        "seconds": usage.get("seconds"),
        "host_anonymous": _pair(prediction.get("host_bytes"), host_bytes),
        "device": None if device_bytes is None else _pair(prediction.get("device_bytes"), device_bytes),
        "components": components(parts, usage.get("components", {})),
    }


def _totals(parts: dict[str, Any] | None) -> dict[str, int]:
    """The predicted sums of a moment; nothing where it was not predicted."""
    if parts is None:
        return {}
    return {
        f"{homes[0]}_bytes": sum(part["bytes"] for part in parts.values() if part["home"] in homes)
        for homes in (("host", "pinned"), ("device",))
    }


def _pair(predicted: Any, measured: Any) -> dict[str, Any]:
    return {"predicted_bytes": predicted, "measured_bytes": measured}


def _training(data: RunData) -> dict[str, Any]:
    """The training phase in usage.json; empty before it."""
    return data.usage["phases"].get("train", {}) if data.usage else {}


def position(name: str) -> int:
    """Where a component is stacked; one that nobody knows comes last but for working memory."""
    name = name.removesuffix(" (host)")
    return COMPONENTS.index(name) if name in COMPONENTS else COMPONENTS.index(WORKING)
