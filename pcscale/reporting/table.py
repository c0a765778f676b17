"""Results as columns and rows of text, for the page and for the terminal alike."""

from collections.abc import Callable
from typing import Any

from pcscale.common.units import format_bytes, format_count, format_seconds
from pcscale.reporting.side_by_side import difference, position

Table = tuple[list[str], list[list[str]]]

ABSENT = "–"
MEMORIES = {"host_anonymous": "host memory", "device": "device memory"}
"""Names of the measured peaks."""
SWEEP_PARTS = ("sweep", "motion not hidden")
"""Parts of a predicted step that are measured together."""


def comparison_rows(evaluation: dict[str, Any]) -> Table:
    """The base, the start and the compressed model beside each other.

    Args:
        evaluation: results by model; one that is absent has no row, and without the base nothing is relative to it.
    """
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
    """Downstream tasks: every metric of each with its standard error, and their mean.

    Args:
        evaluation: `compressed`, and `base` where there is one, each with `tasks` and `mean_accuracy`.
    """
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
    """Every table of a run's memory by its title; a table without a row is left out.

    Args:
        report: the contents of report.json.
    """
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
    """Time and peak memory, predicted beside measured; device columns appear where one was used.

    Args:
        phases: `phases` of report.json, or `stages` of one of them.
        kind: heading of the first column.
    """
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
    rows = [
        [name, part["home"], *_pair_cells(part)]
        for name, part in report["phases"][phase]["components"].items()
        if part["predicted_bytes"] or part["measured_bytes"]
    ]
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
    for name in sorted({name for parts in shown.values() for name in parts}, key=position):
        pairs = [parts.get(name, {}) for parts in shown.values()]
        sizes = [[pair.get(key) for key in ("measured_bytes", "predicted_bytes")] for pair in pairs]
        if any(map(any, sizes)):
            cells = [" / ".join(_cell(size, _gibibytes) for size in pair) if any(pair) else ABSENT for pair in sizes]
            rows.append([name, next(pair["home"] for pair in pairs if pair), *cells])
    return ["part", "home", *shown], rows


def alternative_rows(alternatives: dict[str, Any] | None) -> Table:
    """Device and host memory that training needs, relative to what this run took (or was planned to take)."""
    columns = ["training this model by", "memory", "", "relative", "what is in it"]
    this = (alternatives or {}).get("this run", {})
    unit = this.get("measured_bytes") or this.get("bytes")
    rows = []
    for way, need in (alternatives or {}).items():
        sizes = [(need["bytes"], "predicted", need["of"])]
        if need["measured_bytes"] is not None:
            sizes.append((need["measured_bytes"], "measured", "all of it, at its peak"))
        for size_bytes, kind, of in sizes:
            rows.append([way, format_bytes(size_bytes), kind, f"{size_bytes / unit:.2f} ×" if unit else ABSENT, of])
    return columns, rows


def device_rows(devices: list[dict[str, Any]] | None) -> Table:
    """Whether the run fits devices of usual sizes, and what would have to change."""
    rows = []
    for device in devices or []:
        cells = ["after a change", device["change"]] if device["change"] else ["as it is", "nothing"]
        num_bytes = device["device_bytes"]
        size = f"{num_bytes // 10**9} GB" if num_bytes % 10**9 == 0 else format_bytes(num_bytes)
        rows.append([size, *(cells if device["fits"] else ["no", "no setting makes it fit"])])
    return ["device memory", "fits", "what would have to change"], rows


def byte_rows(report: dict[str, Any]) -> Table:
    """Bytes that a step moves, writes and communicates; a kind that nobody predicted or measured has no row."""
    training = report["training"]
    kinds = {
        "moved": {
            "predicted_bytes": training["least_moved_bytes_per_step"] or None,
            "measured_bytes": training["moved_bytes_per_step"],
        },
        "written, with checkpoints": report["written_bytes_per_step"],
        "communicated": report["communicated_bytes_per_step"],
    }
    rows = [[name, *_pair_cells(pair)] for name, pair in kinds.items() if any(pair.values())]
    return ["bytes of a step", "measured", "predicted", "difference"], rows


def step_time_rows(report: dict[str, Any]) -> Table:
    """The time of a step by its parts; the sweep's motion is measured with it."""
    predicted, measured = report["step_seconds"]["predicted"] or {}, report["step_seconds"]["measured"]
    steps, seconds = report["training"]["steps"], report["training"]["seconds"]
    swept = [name for name in SWEEP_PARTS if predicted.get(name)]
    passes = [measured[name] for name in ("forward", "backward") if name in measured]
    pairs = {
        "forward and backward": (sum(passes) if passes else None, predicted.get("forward and backward")),
        " + ".join(swept or ["sweep"]): (measured.get("sweep"), sum(map(predicted.get, swept)) if swept else None),
        "step": (seconds / steps if steps else None, predicted.get("total")),
        "evaluations, shared out": (measured.get("evaluate"), None),
        "checkpoints, shared out": (measured.get("checkpoint"), None),
    }
    rows = [
        [name, _cell(value, _seconds), _cell(expected, _seconds), format_percent(difference(expected, value))]
        for name, (value, expected) in pairs.items()
        if expected is not None or value is not None
    ]
    return ["seconds of a step", "measured", "predicted", "difference"], rows if predicted or measured else []


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
    """Settings and machines that differ; a column for each run of a comparison."""
    machine = {f"machine: {key}": found for key, found in comparison["machine"].items()}
    rows = [
        [key, *(_cell(value, _setting) for value in found)] for key, found in (comparison["settings"] | machine).items()
    ]
    return ["setting", *(run["label"] for run in comparison["runs"])], rows


def format_difference(nats: float) -> str:
    """Signed, so that a worse model never looks like a better one."""
    return f"{nats:+.4f}"


def format_percent(fraction: float | None) -> str:
    """Signed; None: there is nothing to compare."""
    return ABSENT if fraction is None else f"{round(fraction, 3) + 0.0:+.1%}"


def _pair_cells(pair: dict[str, Any] | None) -> list[str]:
    """Measured, predicted and their difference."""
    predicted, measured = (pair[key] if pair else None for key in ("predicted_bytes", "measured_bytes"))
    cells = [_cell(size_bytes, format_bytes) for size_bytes in (measured, predicted)]
    return [*cells, format_percent(difference(predicted, measured))]


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return ABSENT if value is None else form(value)


def _gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
