"""Runs beside each other: settings, sizes and memory, and held-out losses at equal tokens and equal time."""

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.files import write_bytes
from pcscale.config.schema import RunConfig
from pcscale.reporting import summary
from pcscale.reporting.drawing import png
from pcscale.reporting.plots import plot_comparison
from pcscale.run.folder import RunFolder
from pcscale.run.record import RunRecord
from pcscale.run.token_file import TokenFile, read_token_file, sequences_fingerprint

_AT_EQUAL = {"tokens": "at_equal_tokens", "seconds": "at_equal_seconds"}
_OF_A_MACHINE = ("cpu", "cores", "gpu")


def write_comparison(runs: list[Path], output: Path) -> dict[str, Any]:
    """Compare runs, and draw the comparison into a PNG file, which is replaced where it is there.

    Returns:
        The comparison of `compare_runs`, with the file as `plot`.

    Raises:
        RequestError: as `compare_runs`, or the file cannot be written there. Nothing is written then.
    """
    _check_output(output, runs)
    comparison = compare_runs(runs)
    write_bytes(output, png(plot_comparison(comparison)))
    return {**comparison, "plot": str(output)}


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Lay finished runs over the same data beside each other; the first one is what the others are compared with.

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
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise RequestError(f"{paths[number]} is named twice. Name different runs.")
    runs = [_read_finished(path) for path in paths]
    _check_same_data(runs)
    curves = [_held_out_curve(record) for record in runs]
    shared = set.intersection(*(set(curve["tokens"][1:]) for curve in curves))
    equal = {
        "tokens": max(shared) if shared else min(curve["tokens"][-1] for curve in curves),
        "seconds": min(curve["seconds"][-1] for curve in curves),
    }
    found = [_describe(*run, equal) for run in zip(labels(resolved), runs, curves, strict=True)]
    for run in found:
        first = found[0]["loss"]
        run["difference"] = {key: run["loss"][key] - first[key] for key in ("final", *_AT_EQUAL.values())}
    machines = [vars(record.usage.machine) if record.usage else {} for record in runs]
    return {
        "equal": equal,
        "runs": found,
        "settings": _differing([_settings(record.config) for record in runs]),
        "machine": _differing([{key: machine.get(key) for key in _OF_A_MACHINE} for machine in machines]),
    }


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of different absolute paths: each one below the nearest folder that holds all of them."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def _held_out_curve(record: RunRecord) -> dict[str, list[Any]]:
    """Held-out loss by tokens and by seconds of training, from the start at 0 tokens and 0 seconds on."""
    evaluated = zip(record.steps, accumulate(step.seconds for step in record.steps), strict=True)
    points = [(0, 0.0, record.evaluation.models["start"].loss)]
    points += [(step.tokens, seconds, step.eval_loss) for step, seconds in evaluated if step.eval_loss is not None]
    tokens, seconds, losses = (list(values) for values in zip(*points, strict=True))
    return {"tokens": tokens, "seconds": seconds, "loss": losses}


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all mappings, a value from each; None where one has no such key."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _check_same_data(runs: Sequence[RunRecord]) -> None:
    """Refuse runs whose held-out losses cannot be compared.

    A run reads as much training text as it has steps for, so the shorter text must be the beginning of the longer one.
    """
    files = [read_token_file(record.path) for record in runs]
    for record, file in zip(runs[1:], files[1:], strict=True):
        _check_held_out(f"{runs[0].path} and {record.path}", files[0], file)
    longest = max(range(len(runs)), key=lambda number: files[number].train.shape[0])
    for record, file in zip(runs, files, strict=True):
        _check_training(runs[longest], files[longest], record, file)


def _check_held_out(pair: str, first: TokenFile, other: TokenFile) -> None:
    if other.tokenizer != first.tokenizer:
        raise RequestError(
            f"{pair} have different tokenizers, so a token of one is not a token of the other. "
            "Compare runs with one tokenizer."
        )
    if other.sequence_length != first.sequence_length:
        raise RequestError(
            f"{pair} have sequences of {first.sequence_length} and {other.sequence_length} tokens, so their "
            "held-out losses are over different contexts. Compare runs with one sequence_length."
        )
    sizes = [file.validation.shape[0] for file in (first, other)]
    if sequences_fingerprint(first.validation, sizes[0]) != sequences_fingerprint(other.validation, sizes[1]):
        tokens = " and ".join(f"{size * first.sequence_length:,}" for size in sizes)
        raise RequestError(
            f"{pair} hold out different text, of {tokens} tokens. Compare runs with one data.validation and "
            "one eval_tokens: without data.validation the end of what is trained on is held out, which depends on "
            "max_steps."
        )


def _check_training(longest: RunRecord, longest_file: TokenFile, record: RunRecord, file: TokenFile) -> None:
    """Compare a run with the one of the longest text; one that repeated a shorter text might have gone on in it."""
    size, remedy = file.train.shape[0], "trained on different text. Compare runs with one data.train."
    if sequences_fingerprint(file.train, size) != sequences_fingerprint(longest_file.train, size):
        raise RequestError(f"{longest.path} and {record.path} were {remedy}")
    tokens, most = (each.train.shape[0] * each.sequence_length for each in (file, longest_file))
    if record.steps[-1].tokens > tokens < most:
        raise RequestError(
            f"{record.path} repeated its {tokens:,} tokens of training text, {longest.path} had {most:,}, so they were "
            f"{remedy}"
        )
    if tokens < most:
        console.warn(
            f"{record.path} drew on {tokens:,} tokens of the training text, {longest.path} on {most:,}: they saw it in "
            "another order, and may have calibrated on other parts of it"
        )


def _read_finished(path: Path) -> RunRecord:
    """The record of a run that is finished, and whose curve is whole."""
    record, folder = RunRecord.read(path), RunFolder(path)
    go_on = f"Go on with: pcscale compress {folder.settings} --resume"
    done = record.steps[-1].step if record.steps else 0
    if done < record.config.max_steps:
        raise RequestError(f"{path} is not finished: {done:,} of {record.config.max_steps:,} steps are done. {go_on}")
    missing = [name for name in ("base", "start", "compressed") if name not in record.evaluation.models]
    if missing:
        raise RequestError(f"{path} is not finished: {folder.evaluation.name} has no '{missing[0]}'. {go_on}")
    for number, step in enumerate(record.steps, start=1):
        if step.step != number:
            raise RequestError(f"{folder.metrics} line {number} is of step {step.step}. Restore the file.")
    if record.steps[-1].eval_loss is None:
        raise RequestError(f"{folder.metrics} has no eval_loss in its last line. {go_on} max_steps={done + 1}")
    return record


def _describe(label: str, record: RunRecord, curve: dict[str, list[Any]], equal: dict[str, Any]) -> dict[str, Any]:
    models, phases = record.evaluation.models, summary.phases(record)
    return {
        "label": label,
        "run": str(record.path),
        "base": record.config.base,
        "parameters": models["compressed"].parameters,
        "base_parameters": models["base"].parameters,
        "seed": record.config.seed,
        "steps": len(record.steps),
        "tokens": record.steps[-1].tokens,
        "seconds": sum(step.seconds for step in record.steps),
        "peak": {
            f"{memory}_bytes": summary.highest(phases, memory)["measured_bytes"]
            for memory in ("host_anonymous", "device")
        },
        "loss": {
            "base": models["base"].loss,
            "start": models["start"].loss,
            "final": curve["loss"][-1],
            "merged": models["compressed"].loss,
            **{key: float(np.interp(equal[axis], curve[axis], curve["loss"])) for axis, key in _AT_EQUAL.items()},
        },
        "curve": curve,
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """All settings but the run's folder, those of a group as `group.key`."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json", exclude={"output"}).items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _check_output(output: Path, runs: list[Path]) -> None:
    if output.suffix.lower() != ".png":
        raise RequestError(f"{output} is not the name of a .png file. Name one, such as compare.png.")
    if output.is_dir():
        raise RequestError(f"{output} is a folder. Name a .png file.")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder. Make it, or name another place for {output.name}.")
    for run in runs:
        if run.resolve() in (folder, *folder.parents):
            raise RequestError(f"{output} lies in the run {run}, which is left as it is. Name a file elsewhere.")
