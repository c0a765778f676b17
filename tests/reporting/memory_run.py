"""Predicted and measured memory of a run: the parts of plan.json, usage.json and memory.json about it."""

from typing import Any

MB = 1_000_000
TRAIN_SECONDS = {
    "start": 9.0,
    "forward": 960.0,
    "backward": 1440.0,
    "sweep": 1200.0,
    "evaluate": 60.0,
    "checkpoint": 36.0,
}

_HELD = {"records": 804, "moments": 804, "compressed weights": 268, "norms and biases": 2}
_BATCH = {"activations": 320, "logits": 210}
_VISIT = {"base in flight": 44, "sweep temporaries": 110}
PREDICTED_TRAIN = {"libraries": 470, **_HELD, "gradients": 268, **_BATCH, **_VISIT}
"""MB of the host; what lies in files is added by `plan_phases`."""
MEASURED_TRAIN = {"libraries": 455, **_HELD, "gradients": 268, "working memory": 799}
PREDICTED_STAGES = {
    "start": {"libraries": 470, **_HELD, "base in flight": 44},
    "forward": {"libraries": 470, **_HELD, **_BATCH},
    "backward": {"libraries": 470, **_HELD, "gradients": 268, **_BATCH},
    "sweep": {"libraries": 470, **_HELD, "gradients": 268, **_VISIT},
    "evaluate": {"libraries": 470, **_HELD, "logits": 210},
    "checkpoint": {"libraries": 470, **_HELD},
}
MEASURED_STAGES = {
    "start": {"libraries": 455, **_HELD, "working memory": 61},
    "forward": {"libraries": 455, **_HELD, "working memory": 540},
    "backward": {"libraries": 455, **_HELD, "gradients": 268, "working memory": 799},
    "sweep": {"libraries": 455, **_HELD, "gradients": 268, "working memory": 171},
    "evaluate": {"libraries": 455, **_HELD, "working memory": 224},
    "checkpoint": {"libraries": 455, **_HELD, "working memory": 12},
}
PREDICTED_OTHERS = {
    "calibrate": {"libraries": 470, "hidden states": 540, "activations": 90},
    "merge": {"libraries": 470, "sweep temporaries": 230},
    "evaluate": {"libraries": 470, "compressed weights": 268, "logits": 210},
}
MEASURED_OTHERS = {
    "calibrate": {"libraries": 455, "hidden states": 540, "working memory": 55},
    "merge": {"libraries": 255, "working memory": 155},
    "evaluate": {"libraries": 455, "compressed weights": 268, "working memory": 177},
}
WAYS = {
    "published form": (4_900 * MB, "projections, gradients and moments in float32 beside base and model"),
    "hard pruning": (1_700 * MB, "model, gradients and moments, activations"),
    "this run": (3_300 * MB, "records, moments, model, gradients, activations, libraries"),
}


def plan_phases(on_gpu: bool = False) -> dict[str, Any]:
    """`phases` of plan.json; on a GPU all but libraries and hidden states is the device's."""
    files = {"frozen base": {"home": "disk", "bytes": 269_030_016}}
    phases = {
        name: {"components": _homes(parts, on_gpu), "stages": {}}
        for name, parts in {**PREDICTED_OTHERS, "train": PREDICTED_TRAIN}.items()
    }
    phases["train"]["components"] |= files
    phases["train"]["stages"] = {name: _homes(parts, on_gpu) for name, parts in PREDICTED_STAGES.items()}
    return {name: phases[name] for name in ("calibrate", "train", "merge", "evaluate")}


def plan_steps() -> dict[str, Any]:
    """The keys of plan.json about a step, other ways to train, and devices."""
    return {
        "moved": {"base": 269 * MB, "records_read": 0, "records_written": 0},
        "written_bytes_per_step": 200 * MB,
        "communicated_bytes_per_step": 0,
        "alternatives": {way: {"bytes": size, "of": of} for way, (size, of) in WAYS.items()},
        "devices": [
            {"device_bytes": 2 * 10**9, "fits": False, "change": "does not fit"},
            {"device_bytes": 3 * 10**9, "fits": True, "change": "residency: cpu, moments: 8bit"},
            {"device_bytes": 8 * 10**9, "fits": True, "change": ""},
        ],
    }


def usage_phases(on_gpu: bool = False) -> dict[str, Any]:
    """`phases` of usage.json."""
    seconds = {"calibrate": 61.0, "train": 3725.0, "merge": 4.2, "evaluate": 33.0}
    parts = {**MEASURED_OTHERS, "train": MEASURED_TRAIN}
    phases = {name: _used(seconds[name], parts[name], on_gpu) for name in seconds}
    phases["train"]["stages"] = {
        name: _used(TRAIN_SECONDS[name], parts, on_gpu) for name, parts in MEASURED_STAGES.items()
    }
    return phases


def memory_document(steps: int = 24, samples_per_stage: int = 4, on_gpu: bool = False) -> dict[str, Any]:
    """memory.json of a run whose steps breathe: activations come and go, gradients fill up, the sweep ends them."""
    samples = [_sample(0.0, "calibrate", None, {"libraries": 455}, on_gpu)]
    for number in range(1, 9):
        parts = {"libraries": 455, "hidden states": 68 * number, "working memory": 7 * number}
        samples.append(_sample(7.5 * number, "calibrate", None, parts, on_gpu))
    now = 61.0
    for stage, parts in [("start", MEASURED_STAGES["start"])] + [
        (name, MEASURED_STAGES[name]) for _ in range(steps) for name in ("forward", "backward", "sweep")
    ]:
        for number in range(samples_per_stage):
            now += TRAIN_SECONDS[stage] / (1 if stage == "start" else steps) / samples_per_stage
            done = (number + 1) / samples_per_stage
            shares = {"forward": (done, 1), "backward": (1 - 0.5 * done, done), "sweep": (1, 1 - done), "start": (1, 1)}
            working, gradients = shares[stage]
            held = parts | {"working memory": parts["working memory"] * working}
            held["gradients"] = parts.get("gradients", 0) * gradients
            samples.append(_sample(now, "train", stage, held, on_gpu))
    for name in ("evaluate", "checkpoint"):
        now += TRAIN_SECONDS[name]
        samples.append(_sample(now, "train", name, MEASURED_STAGES[name], on_gpu))
    for phase, seconds in (("merge", 4.2), ("evaluate", 33.0)):
        times = [now + seconds * number / 3 for number in range(3)]
        samples += [_sample(time, phase, None, MEASURED_OTHERS[phase], on_gpu) for time in times]
        now += seconds
    return {"samples": samples}


def _home(name: str, on_gpu: bool) -> str:
    return "device" if on_gpu and name not in ("libraries", "hidden states") else "host"


def _homes(parts: dict[str, int], on_gpu: bool) -> dict[str, Any]:
    return {name: {"home": _home(name, on_gpu), "bytes": size * MB} for name, size in parts.items()}


def _held(parts: dict[str, float], on_gpu: bool) -> dict[str, dict[str, int]]:
    held: dict[str, dict[str, int]] = {"host": {}, "device": {}}
    for name, size in parts.items():
        held[_home(name, on_gpu)][name] = int(size * MB)
    return held


def _used(seconds: float, parts: dict[str, int], on_gpu: bool) -> dict[str, Any]:
    held = _held(parts, on_gpu)
    host, device = (sum(held[home].values()) for home in ("host", "device"))
    peak = {
        "host_anonymous": host,
        "host_file": 300 * MB,
        "host_unique": None,
        "pinned": 0,
        "device": device if on_gpu else None,
        "device_reserved": device + 100 * MB if on_gpu else None,
        "written": 24 * 210 * MB,
    }
    most = {"host": host, "device": device} if on_gpu else {"host": host}
    return {"seconds": seconds, "peak": peak, "components": held, "most": most, "stages": {}}


def _sample(seconds: float, phase: str, stage: str | None, parts: dict[str, float], on_gpu: bool) -> dict[str, Any]:
    return {"seconds": seconds, "phase": phase, "stage": stage, **_held(parts, on_gpu)}
