"""Runs side by side: what sets them apart, what they needed, their held-out losses at equal tokens and equal time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

from pcscale.common.errors import RequestError
from pcscale.common.units import format_bytes, format_count, format_seconds
from pcscale.config.schema import RunConfig
from pcscale.reporting import side_by_side
from pcscale.reporting.run_data import METRICS_FILE, SETTINGS_FILE, RunData, is_number, read_run
from pcscale.reporting.same_data import check_same_data
from pcscale.reporting.table import ABSENT, Table, format_difference

MEMORIES = {"host_anonymous_bytes": "host memory", "device_bytes": "device memory"}
_MODELS = ("base", "start", "compressed")
_AT_EQUAL = {"tokens": "at_equal_tokens", "seconds": "at_equal_seconds"}
_OF_A_MACHINE = ("cpu", "cores", "gpu")


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Lay finished runs over the same data side by side; the first one is what the others are compared with.

    The loss at a number of tokens or seconds lies on a straight line between the evaluations before and after it. Equal
    tokens are the most that all runs were evaluated at, or, where no evaluation meets another, the most that all have
    reached; equal seconds are the most that all have reached.

    Args:
        paths: run folders; nothing is written there.

    Returns:
        `{equal, runs, settings, machine}`: `settings` and `machine` hold only what differs, a value for each run.
        Units: nats a token, seconds of steps (evaluations and checkpoints are not counted), bytes.

    Raises:
        RequestError: fewer than two runs, a folder that is no finished run, or runs over different data.
    """
    if len(paths) < 2:
        raise RequestError(f"a comparison takes two runs at least, found {len(paths)}. Name more run folders.")
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise RequestError(f"{paths[position]} is named twice. Name different runs.")
    runs = [_read_finished(path) for path in paths]
    check_same_data(runs)
    curves = [held_out_curve(data) for data in runs]
    shared = set.intersection(*(set(curve["tokens"][1:]) for curve in curves))
    equal = {
        "tokens": max(shared) if shared else min(curve["tokens"][-1] for curve in curves),
        "seconds": min(curve["seconds"][-1] for curve in curves),
    }
    found = [_describe(*run, equal) for run in zip(labels(resolved), runs, curves, strict=True)]
    for run in found:
        first = found[0]["loss"]
        run["difference"] = {key: run["loss"][key] - first[key] for key in ("final", *_AT_EQUAL.values())}
    machines = [(data.usage or {}).get("machine") for data in runs]
    known = [machine if isinstance(machine, dict) else {} for machine in machines]
    return {
        "equal": equal,
        "runs": found,
        "settings": differing([_settings(data.config) for data in runs]),
        "machine": differing([{key: machine.get(key) for key in _OF_A_MACHINE} for machine in known]),
    }


def labels(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of those above it as tell it from the others.

    Args:
        paths: absolute, all different.
    """

    def ends_like_another(path: Path, length: int) -> bool:
        return any(other.parts[-length:] == path.parts[-length:] for other in paths if other != path)

    lengths = [next(length for length in count(1) if not ends_like_another(path, length)) for path in paths]
    return [str(Path(*path.parts[-length:])) for path, length in zip(paths, lengths, strict=True)]


def held_out_curve(data: RunData) -> dict[str, list[Any]]:
    """Held-out loss by tokens and by seconds of training, from the start at 0 tokens and 0 seconds on.

    Returns:
        `{tokens, seconds, loss}`, equally long; tokens rise.
    """
    evaluated = zip(data.steps, accumulate(step.seconds for step in data.steps), strict=True)
    points = [(0, 0.0, data.evaluation["start"]["loss"])]
    points += [(step.tokens, seconds, step.eval_loss) for step, seconds in evaluated if step.eval_loss is not None]
    tokens, seconds, losses = (list(values) for values in zip(*points, strict=True))
    return {"tokens": tokens, "seconds": seconds, "loss": losses}


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What is not the same in all mappings, a value from each; None where one has no such key."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def run_rows(comparison: dict[str, Any]) -> Table:
    """Sizes, seeds, lengths and peak memory."""
    runs = comparison["runs"]
    memories = {key: label for key, label in MEMORIES.items() if any(run["peak"][key] is not None for run in runs)}
    columns = ["run", "params", "of base", "seed", "steps", "tokens", "training", *memories.values()]
    rows = []
    for run in runs:
        share = f"{run['parameters'] / run['base_parameters']:.1%}"
        rows.append([run["label"], format_count(run["parameters"]), share, str(run["seed"]), f"{run['steps']:,}"])
        rows[-1] += [f"{run['tokens']:,}", _duration(run["seconds"])]
        peaks = (run["peak"][key] for key in memories)
        rows[-1] += [ABSENT if peak is None else format_bytes(peak) for peak in peaks]
    return columns, rows


def loss_rows(comparison: dict[str, Any]) -> Table:
    """Held-out losses, and their differences from the first run's."""
    equal = comparison["equal"]
    headings = {
        "final": "final",
        "at_equal_tokens": f"at {equal['tokens']:,} tokens",
        "at_equal_seconds": f"at {_duration(equal['seconds'])}",
    }
    columns = ["run", "base", "start"]
    for heading in headings.values():
        columns += [heading, "vs first"]
    rows = []
    for run in comparison["runs"]:
        rows.append([run["label"], *(f"{run['loss'][key]:.4f}" for key in ("base", "start"))])
        for key in headings:
            rows[-1] += [f"{run['loss'][key]:.4f}", format_difference(run["difference"][key])]
    return columns, rows


def difference_rows(comparison: dict[str, Any]) -> Table:
    """The settings that differ, and what the machines differ in; a column for each run."""
    settings, machine = comparison["settings"], comparison["machine"]
    values = settings | {f"machine: {key}": found for key, found in machine.items()}
    rows = [[key, *(_cell(value) for value in found)] for key, found in values.items()]
    return ["setting", *(run["label"] for run in comparison["runs"])], rows


def _read_finished(path: Path) -> RunData:
    """A run whose curve is complete and whole.

    Raises:
        RequestError: the folder is no run, the run is not finished, or a file is broken.
    """
    data = read_run(path)
    settings, metrics, evaluation = path / SETTINGS_FILE, path / METRICS_FILE, path / "evaluation.json"
    go_on = f"Go on with: pcscale compress {settings} --resume"
    done = data.steps[-1].step if data.steps else 0
    if done < data.config.max_steps:
        raise RequestError(f"{path} is not finished: {done:,} of {data.config.max_steps:,} steps are done. {go_on}")
    for name in _MODELS:
        if name not in data.evaluation:
            raise RequestError(f"{path} is not finished: {evaluation.name} has no '{name}'. {go_on}")
        model = data.evaluation[name]
        for key in ("loss", "parameters"):
            if not isinstance(model, dict) or not is_number(model.get(key)) or model[key] <= 0:
                raise RequestError(f"{evaluation} has no positive number as {name}.{key}. Restore the file.")
    tokens = 0
    for number, step in enumerate(data.steps, start=1):
        if step.step != number or step.tokens <= tokens or step.seconds < 0:
            found = f"step {step.step}, {step.tokens} tokens, {step.seconds} seconds"
            raise RequestError(f"{metrics} line {number} does not follow the one before ({found}). Restore the file.")
        tokens = step.tokens
    if data.steps[-1].eval_loss is None:
        raise RequestError(f"{metrics} has no eval_loss in its last line. {go_on} max_steps={done + 1}")
    return data


def _describe(label: str, data: RunData, curve: dict[str, list[Any]], equal: dict[str, Any]) -> dict[str, Any]:
    evaluation = data.evaluation
    return {
        "label": label,
        "run": str(data.run),
        "base": data.config.base,
        "parameters": evaluation["compressed"]["parameters"],
        "base_parameters": evaluation["base"]["parameters"],
        "seed": data.config.seed,
        "steps": len(data.steps),
        "tokens": data.steps[-1].tokens,
        "seconds": sum(step.seconds for step in data.steps),
        "peak": _peak(data),
        "loss": {
            "base": evaluation["base"]["loss"],
            "start": evaluation["start"]["loss"],
            "final": curve["loss"][-1],
            "merged": evaluation["compressed"]["loss"],
            **{key: float(np.interp(equal[axis], curve[axis], curve["loss"])) for axis, key in _AT_EQUAL.items()},
        },
        "curve": curve,
    }


def _peak(data: RunData) -> dict[str, int | None]:
    """The highest memory of all phases, as measured."""
    try:
        phases = side_by_side.phases(replace(data, plan=None))
        peak = {
            f"{memory}_bytes": side_by_side.highest(phases, memory)["measured_bytes"]
            for memory in ("host_anonymous", "device")
        }
        if not all(value is None or is_number(value) for value in peak.values()):
            raise TypeError("a peak is no number")
        return peak
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{data.run / 'usage.json'} is not as it was written ({error}). Restore the file.") from None


def _settings(config: RunConfig) -> dict[str, Any]:
    """All settings but the place of the run, those of a group as `group.key`."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json", exclude={"output"}).items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
