"""Results as columns and rows of text, for the page and for the terminal alike."""

from collections.abc import Callable
from typing import Any

from pcscale.common.units import format_bytes, format_count, format_seconds
from pcscale.reporting.summary import difference, stack_order

Table = tuple[list[str], list[list[str]]]

ABSENT = "–"
MEMORIES = {"host_anonymous": "host memory", "device": "device memory"}
"""Names of the measured peaks."""


def comparison_rows(evaluation: dict[str, Any]) -> Table:
    """The base, the start and the compressed model, as far as there are results; without the base none is relative."""
    columns = ["model", "params", "share", "loss", "vs base", "perplexity", "bits/byte", "tok/s"]
    base = evaluation.get("base")
    rows = []
    for name in ("base", "start", "compressed"):
        if model := evaluation.get(name):
            share = f"{model['parameters'] / base['parameters']:.1%}" if base else ABSENT
            against = format_difference(model["loss"] - base["loss"]) if base else ABSENT
            perplexity = f"{model['perplexity']:,.{2 if model['perplexity'] < 1000 else 0}f}"
            rows.append([name, format_count(model["parameters"]), share, f"{model['loss']:.4f}", against, perplexity])
            rows[-1] += [f"{model['bits_per_byte']:.4f}", f"{model['tokens_per_second']:,.0f}"]
    return columns, rows


def task_rows(evaluation: dict[str, Any]) -> Table:
    """Downstream tasks of the compressed model and the base: each metric with its standard error, and the mean."""
    columns = ["task", "metric", "compressed", "±", "base", "±", "vs base", "samples"]
    results, base = evaluation["compressed"], evaluation.get("base")
    rows = []
    for name, result in results["tasks"].items():
        other = base["tasks"][name] if base else {}
        metrics = (key for key in result if key != "samples" and "_stderr" not in key)
        rows += [[name, metric, *_score_cells(result, other, metric), f"{result['samples']:,}"] for metric in metrics]
    means = [{"mean": model["mean_accuracy"]} if model else {} for model in (results, base)]
    if len(results["tasks"]) > 1 and means[0]["mean"] is not None:
        rows.append(["mean", "acc_norm, or acc", *_score_cells(means[0], means[1], "mean"), ""])
    return columns, rows


def _score_cells(result: dict[str, Any], base: dict[str, Any], metric: str) -> list[str]:
    """Value and standard error of the model and of the base, and the difference of the values."""
    name, comma, chosen = metric.partition(",")
    stderr = f"{name}_stderr{comma}{chosen}"
    cells = [_cell(model.get(key), "{:.4f}".format) for model in (result, base) for key in (metric, stderr)]
    return [*cells, format_difference(result[metric] - base[metric]) if metric in base else ABSENT]


def plan_rows(plan: dict[str, Any]) -> Table:
    """Trainable state and FLOPs, as planned."""
    trainable = plan["trainable"]
    rows = [
        ["trainable parameters", format_count(trainable["parameters"])],
        ["trainable state", format_bytes(trainable["bytes"])],
    ]
    rows += [[f"FLOPs, {name.replace('_', ' ')}", format_count(count)] for name, count in plan["flops"].items()]
    return ["planned", ""], rows


def memory_tables(report: dict[str, Any]) -> dict[str, Table]:
    """Every table of report.json's memory, bytes and seconds by its title; a table without a row is left out."""
    stages = report["phases"].get("train", {}).get("stages", {})
    tables = {"Peak of each phase": phase_rows(report["phases"])}
    tables |= {f"Parts of {name}": component_rows(report, name) for name in report["phases"]}
    tables |= {
        "Stages of training": phase_rows(stages, "stage"),
        "Parts in each stage of training (GiB, measured / predicted)": stage_component_rows(stages),
        "What training needs, this way and others": alternative_rows(report["alternatives"]),
        "What would have to change to fit": device_rows(report["devices"]),
        "Bytes of a step": byte_rows(report),
        "Seconds of a step": step_time_rows(report),
    }
    return {title: table for title, table in tables.items() if table[1]}


def phase_rows(phases: dict[str, Any], kind: str = "phase") -> Table:
    """Time and peak memory of phases, or of the stages of one; a device has columns where one was used."""
    memories = [key for key in MEMORIES if key != "device" or any(phase["device"] for phase in phases.values())]
    columns = [kind, "time"]
    for key in memories:
        columns += [f"peak {MEMORIES[key]}", "predicted", "difference"]
    rows = []
    for name, phase in phases.items():
        rows.append([name, _cell(phase["seconds"], format_seconds)])
        for key in memories:
            rows[-1] += _pair_cells(phase[key])
    return columns, rows


def component_rows(report: dict[str, Any], phase: str) -> Table:
    """Each part of a phase's memory at its own highest, and what lies in files instead."""
    rows = [[name, part["home"], *_pair_cells(part)] for name, part in report["phases"][phase]["components"].items()]
    planned = (report["plan"] or {"phases": {}})["phases"].get(phase, {}).get("components", {})
    rows += [
        [name, "files", ABSENT, format_bytes(part["bytes"]), ABSENT]
        for name, part in planned.items()
        if part["home"] == "disk" and part["bytes"]
    ]
    return ["part", "home", "measured", "predicted", "difference"], rows


def stage_component_rows(stages: dict[str, Any]) -> Table:
    """Parts by stages, in GiB: measured / predicted. A stage that nothing is known of has no column."""
    shown = {name: stage["components"] for name, stage in stages.items() if stage["components"]}
    rows = []
    for name in sorted({name for parts in shown.values() for name in parts}, key=stack_order):
        pairs = [parts.get(name) for parts in shown.values()]
        rows.append([name, next(pair["home"] for pair in pairs if pair), *map(_gibibytes, pairs)])
    return ["part", "home", *shown], rows


def alternative_rows(alternatives: dict[str, Any] | None) -> Table:
    """Device and host memory that training needs, relative to what this run took (or was planned to take)."""
    columns = ["training this model by", "memory", "", "relative", "what is in it"]
    this = (alternatives or {}).get("this run", {})
    unit = this.get("measured_bytes") or this.get("bytes")
    rows = []
    for way, need in (alternatives or {}).items():
        measured = ("measured", need["measured_bytes"], "all of it, at its peak")
        for kind, num_bytes, of in (("predicted", need["bytes"], need["of"]), measured):
            if num_bytes is not None:
                rows.append([way, format_bytes(num_bytes), kind, f"{num_bytes / unit:.2f} ×" if unit else ABSENT, of])
    return columns, rows


def device_rows(devices: list[dict[str, Any]] | None) -> Table:
    """Devices of usual sizes, whether the run fits them, and what would have to change."""
    rows = []
    for device in devices or []:
        cells = ["after a change", device["change"]] if device["change"] else ["as it is", "nothing"]
        cells = cells if device["fits"] else ["no", "no setting makes it fit"]
        rows.append([f"{device['device_bytes'] // 10**9} GB", *cells])
    return ["device memory", "fits", "what would have to change"], rows


def byte_rows(report: dict[str, Any]) -> Table:
    """Bytes that a step moves, writes and communicates; a kind that nobody predicted or measured has no row."""
    rows = [[kind, *_pair_cells(pair)] for kind, pair in report["step_bytes"].items() if any(pair.values())]
    return ["bytes of a step", "measured", "predicted", "difference"], rows


def step_time_rows(report: dict[str, Any]) -> Table:
    """Measured seconds of a step by stage."""
    rows = [[stage, _duration(seconds)] for stage, seconds in report["step_seconds"]["measured"].items()]
    return ["seconds of a step", "measured"], rows


def run_rows(comparison: dict[str, Any]) -> Table:
    """Sizes, seeds, lengths and peak memory of the runs of a comparison."""
    runs = comparison["runs"]
    memories = [key for key in MEMORIES if any(run["peak"][f"{key}_bytes"] is not None for run in runs)]
    columns = ["run", "params", "of base", "seed", "steps", "tokens", "training", *map(MEMORIES.get, memories)]
    rows = []
    for run in runs:
        share = f"{run['parameters'] / run['base_parameters']:.1%}"
        rows.append([run["label"], format_count(run["parameters"]), share, str(run["seed"]), f"{run['steps']:,}"])
        rows[-1] += [f"{run['tokens']:,}", _duration(run["seconds"])]
        rows[-1] += [_cell(run["peak"][f"{key}_bytes"], format_bytes) for key in memories]
    return columns, rows


def loss_rows(comparison: dict[str, Any]) -> Table:
    """Held-out losses of the runs of a comparison, and their differences from the first run's."""
    tokens, seconds = f"at {comparison['equal']['tokens']:,} tokens", f"at {_duration(comparison['equal']['seconds'])}"
    columns = ["run", "base", "start", "final", "vs first", tokens, "vs first", seconds, "vs first"]
    rows = []
    for run in comparison["runs"]:
        rows.append([run["label"], *(f"{run['loss'][key]:.4f}" for key in ("base", "start"))])
        for key, nats in run["difference"].items():
            rows[-1] += [f"{run['loss'][key]:.4f}", format_difference(nats)]
    return columns, rows


def difference_rows(comparison: dict[str, Any]) -> Table:
    """Settings and machines that differ; a column for each run of a comparison."""
    machine = {f"machine: {key}": found for key, found in comparison["machine"].items()}
    differing = comparison["settings"] | machine
    rows = [[key, *(_cell(value, _setting) for value in found)] for key, found in differing.items()]
    return ["setting", *(run["label"] for run in comparison["runs"])], rows


def format_difference(nats: float) -> str:
    """Write a difference of losses with its sign, so that a worse model never looks like a better one."""
    return f"{nats:+.4f}"


def format_percent(fraction: float | None) -> str:
    """Write a fraction as signed per cent; None: there is nothing to compare."""
    return ABSENT if fraction is None else f"{round(fraction, 3) + 0.0:+.1%}"


def _pair_cells(pair: dict[str, Any] | None) -> list[str]:
    """Measured, predicted and their difference."""
    predicted, measured = (pair[key] if pair else None for key in ("predicted_bytes", "measured_bytes"))
    cells = [_cell(size_bytes, format_bytes) for size_bytes in (measured, predicted)]
    return [*cells, format_percent(difference(predicted, measured))]


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return ABSENT if value is None else form(value)


def _gibibytes(pair: dict[str, Any] | None) -> str:
    sizes = (pair[key] for key in ("measured_bytes", "predicted_bytes")) if pair else ()
    return " / ".join(_cell(size, lambda num_bytes: f"{num_bytes / 2**30:.2f}") for size in sizes) or ABSENT


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else format_seconds(seconds)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
