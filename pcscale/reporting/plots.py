"""The plots of a run and of a comparison of runs, as matplotlib figures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from pcscale.common.units import format_bytes
from pcscale.reporting import drawing, summary
from pcscale.reporting.drawing import BLUE, GIB, GREY, INK, LINES, VERMILLION, new_figure, styled
from pcscale.reporting.memory_plot import plot_memory_over_time
from pcscale.reporting.table import format_percent
from pcscale.run.record import RunRecord

MARKERS = 40
"""Markers on a line, at most."""
LABEL_LETTERS = 60


def plot_loss(record: RunRecord) -> Figure:
    """Training loss per step, held-out loss where evaluated (step 0 too), and the base's held-out loss."""
    taught = ", with the base's share" if record.config.distill else ""
    figure, axes = _curve(record, "Loss", "nats per token", [step.loss for step in record.steps], f"training{taught}")
    models = record.evaluation.models
    held_out = [(0, models["start"].loss)] if "start" in models else []
    held_out += [(step.step, step.eval_loss) for step in record.steps if step.eval_loss is not None]
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color=VERMILLION, marker="o", markevery=_markevery(steps), label="held-out")
    if "base" in models:
        axes.axhline(models["base"].loss, color=INK, linestyle="--", label="base, held-out")
    axes.legend()
    return figure


def plot_learning_rate(record: RunRecord) -> Figure:
    """The learning rate that each step used."""
    figure, axes = _curve(record, "Learning rate", "learning rate", [step.learning_rate for step in record.steps])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes.set_ylim(bottom=0)
    return figure


def plot_grad_norm(record: RunRecord) -> Figure:
    """The global gradient norm of each step, before clipping."""
    figure, axes = _curve(record, "Gradient norm, before clipping", "norm", [step.grad_norm for step in record.steps])
    axes.set_ylim(bottom=0)
    return figure


def plot_tokens_per_second(record: RunRecord) -> Figure:
    """Training tokens per second of each step."""
    tokens = np.diff([step.tokens for step in record.steps], prepend=0)
    speed = [count / step.seconds if step.seconds else None for count, step in zip(tokens, record.steps, strict=True)]
    figure, axes = _curve(record, "Training speed", "tokens per second", speed)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    return figure


def plot_memory_by_component(record: RunRecord) -> Figure | None:
    """Each part of memory at its own highest while training, predicted above measured."""
    training = summary.phases(record).get("train")
    return _pairs("Parts of memory while training", training["components"] if training else {})


def plot_bytes_per_step(record: RunRecord) -> Figure | None:
    """Bytes that a step moves, writes and communicates, predicted above measured."""
    return _pairs("Bytes of a step", summary.step_bytes(record))


CURVES: dict[str, Callable[[RunRecord], Figure]] = {
    "loss": plot_loss,
    "learning_rate": plot_learning_rate,
    "grad_norm": plot_grad_norm,
    "tokens_per_second": plot_tokens_per_second,
}
PLOTS: dict[str, Callable[[RunRecord], Figure | None]] = {
    **CURVES,
    "memory_over_time": plot_memory_over_time,
    "memory_by_component": plot_memory_by_component,
    "bytes_per_step": plot_bytes_per_step,
}
"""Every plot by the name of its file; None: the run holds nothing to draw it from."""


@styled
def figures(record: RunRecord) -> dict[str, Figure]:
    """The plots that the run has something for, by name."""
    drawn = {name: plot(record) for name, plot in PLOTS.items() if record.steps or name not in CURVES}
    return {name: figure for name, figure in drawn.items() if figure is not None}


@styled
def plot_comparison(comparison: dict[str, Any]) -> Figure:
    """Held-out loss of runs by tokens and by time; dotted lines are where all runs are compared."""
    runs, equal = comparison["runs"], comparison["equal"]
    figure = new_figure(10.4, 3.8 + 0.2 * len(runs))
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    divisor, unit = drawing.time_unit(max(run["curve"]["seconds"][-1] for run in runs))
    for axes, axis, scale in ((by_tokens, "tokens", 1.0), (by_time, "seconds", divisor)):
        axes.set_prop_cycle(LINES)
        for run in runs:
            places = np.array(run["curve"][axis]) / scale
            # A name's end tells it from others; beginning with an underscore it would be hidden.
            label = f" {run['label'][-LABEL_LETTERS:]}"
            axes.plot(places, run["curve"]["loss"], label=label, markevery=_markevery(places))
        axes.axvline(equal[axis] / scale, color=GREY, linestyle=":", label="equal tokens, equal time")
    by_tokens.set(title="Held-out loss by tokens", xlabel="tokens trained on", ylabel="nats per token")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_time.set(title="Held-out loss by time", xlabel=f"{unit} of training")
    figure.legend(*by_tokens.get_legend_handles_labels(), loc="outside upper left")
    return figure


def _curve(
    record: RunRecord, title: str, unit: str, values: Sequence[float | None], label: str = ""
) -> tuple[Figure, Axes]:
    """One value of each step as a line, with a gap where there is none."""
    figure = new_figure(6.0, 3.4)
    axes = figure.add_subplot(title=title, xlabel="optimizer step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    steps = [step.step for step in record.steps]
    values_or_nan = np.array(values, dtype=float)
    axes.plot(steps, values_or_nan, color=BLUE, marker=".", markevery=_markevery(steps), label=label)
    return figure, axes


def _pairs(title: str, pairs: dict[str, dict[str, Any]]) -> Figure | None:
    """Two bars a row, predicted above measured; None: there is no row."""
    pairs = {name: pair for name, pair in pairs.items() if pair["predicted_bytes"] or pair["measured_bytes"]}
    if not pairs:
        return None
    figure = new_figure(5.4, 1.3 + 0.48 * len(pairs))
    axes = figure.add_subplot(title=title, xlabel="GiB", yticks=range(len(pairs)), yticklabels=list(pairs))
    for kind, offset, colour, hatch in (("predicted", -0.19, "#CBD5E1", "////"), ("measured", 0.19, BLUE, None)):
        sizes = [(pair[f"{kind}_bytes"] or 0) / GIB for pair in pairs.values()]
        bars = axes.barh(np.arange(len(pairs)) + offset, sizes, 0.36, label=kind, facecolor=colour, hatch=hatch)
        axes.bar_label(bars, [_bar_text(pair, kind) for pair in pairs.values()], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * axes.dataLim.x1)  # Room for the texts.
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _bar_text(pair: dict[str, Any], kind: str) -> str:
    """The size of a bar and, for a measured one, how far it is from the predicted size."""
    size_bytes = pair[f"{kind}_bytes"]
    if size_bytes is None:
        return f"not {kind}"
    change = summary.difference(pair["predicted_bytes"], size_bytes) if kind == "measured" else None
    return format_bytes(size_bytes) + ("" if change is None else f", {format_percent(change)}")


def _markevery(places: Sequence[float] | np.ndarray) -> int:
    return max(1, len(places) // MARKERS)
