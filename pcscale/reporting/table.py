"""Results as rows of text, for the page and for the terminal alike."""

from typing import Any

from pcscale.common.units import format_bytes, format_count, format_seconds
from pcscale.reporting.side_by_side import difference

Table = tuple[list[str], list[list[str]]]

ABSENT = "–"
MODELS = {"base": "base", "start": "start", "compressed": "compressed"}


def comparison_rows(evaluation: dict[str, Any]) -> Table:
    """Columns and rows that lay the base, the start and the compressed model side by side.

    Args:
        evaluation: evaluation.json; a model that is absent has no row, and without the base nothing is relative to it.
    """
    columns = ["model", "params", "share", "loss", "vs base", "perplexity", "bits/byte", "tok/s"]
    base = evaluation.get("base")
    rows = []
    for key, label in MODELS.items():
        if model := evaluation.get(key):
            share = f"{model['parameters'] / base['parameters']:.1%}" if base else ABSENT
            difference = format_difference(model["loss"] - base["loss"]) if base else ABSENT
            rows.append([label, format_count(model["parameters"]), share, f"{model['loss']:.4f}", difference])
            rows[-1] += [_perplexity(model["perplexity"]), _bits(model["bits_per_byte"])]
            rows[-1].append(f"{model['tokens_per_second']:,.0f}")
    return columns, rows


def task_rows(evaluation: dict[str, Any]) -> Table:
    """Columns and rows of downstream tasks: every metric of each with its standard error, and their mean.

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


def phase_rows(phases: dict[str, Any], kind: str = "phase") -> Table:
    """Columns and rows of time and peak memory, predicted beside measured.

    Args:
        phases: `phases` of report.json, or `moments` of one of them; device columns appear where one was used.
        kind: what they are.
    """
    memories = {"host_anonymous": "host memory"}
    if any(phase["device"] for phase in phases.values()):
        memories["device"] = "device memory"
    columns = [kind, "time"]
    for label in memories.values():
        columns += [f"peak {label}", "predicted", "difference"]
    rows = []
    for name, phase in phases.items():
        rows.append([name, ABSENT if phase["seconds"] is None else format_seconds(phase["seconds"])])
        for key in memories:
            rows[-1] += pair_cells(phase[key])
    return columns, rows


def plan_rows(plan: dict[str, Any]) -> Table:
    """What training was planned to hold and to compute."""
    trainable = plan["trainable"]
    rows = [
        ["trainable parameters", format_count(trainable["parameters"])],
        ["trainable state", format_bytes(trainable["bytes"])],
    ]
    rows += [[f"FLOPs, {name.replace('_', ' ')}", format_count(count)] for name, count in plan["flops"].items()]
    return ["planned", ""], rows


def memory_rows(plan: dict[str, Any]) -> Table:
    """Where the plan puts each component, and how large it is."""
    components = plan["memory"].items()
    rows = [[name.replace("_", " "), part["home"], format_bytes(part["bytes"])] for name, part in components]
    return ["component", "home", "predicted"], rows


def format_difference(nats: float) -> str:
    """Signed, so that a worse model never looks like a better one."""
    return f"{nats:+.4f}"


def format_percent(fraction: float | None) -> str:
    """Signed, of measured against predicted; None: there is nothing to compare."""
    return ABSENT if fraction is None else f"{round(fraction, 3) + 0.0:+.1%}"


def pair_cells(pair: dict[str, Any] | None) -> list[str]:
    """Measured, predicted and their difference."""
    predicted, measured = (pair[key] if pair else None for key in ("predicted_bytes", "measured_bytes"))
    cells = [ABSENT if size_bytes is None else format_bytes(size_bytes) for size_bytes in (measured, predicted)]
    return [*cells, format_percent(difference(predicted, measured))]


def _score_cells(result: dict[str, Any], base: dict[str, Any], metric: str) -> list[str]:
    """Value and standard error of the model and of the base, and the difference of the values."""
    name, comma, chosen = metric.partition(",")
    stderr = f"{name}_stderr{comma}{chosen}"
    cells = [_score(model.get(key)) for model in (result, base) for key in (metric, stderr)]
    return [*cells, format_difference(result[metric] - base[metric]) if metric in base else ABSENT]


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _bits(value: float) -> str:
    return f"{value:.4f}"
