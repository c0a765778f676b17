"""The plots of a run as matplotlib figures: its curves here, all of them in one table."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from pcscale.reporting.bar_plots import plot_bytes_per_step, plot_memory_by_component, plot_step_time
from pcscale.reporting.drawing import BLUE, INK, VERMILLION, downsample, dress, new_figure, ratio, smooth
from pcscale.reporting.memory_plots import plot_memory_over_time
from pcscale.reporting.run_data import RunData

SMOOTHING_STARTS_AT = 200  # steps; a shorter run is readable as it is
MARKERS_END_AT = 40  # points; beyond it the line alone is clearer


def plot_loss(data: RunData) -> Figure:
    """Training loss per step, held-out loss where evaluated (step 0 too), and the base's held-out loss."""
    figure, axes = _new_plot("Loss", "nats per token")
    taught = ", with the base's share" if data.config.distill else ""
    _draw(axes, _steps(data), _values([step.loss for step in data.steps]), f"training{taught}")
    held_out = [(step.step, step.eval_loss) for step in data.steps if step.eval_loss is not None]
    if start := data.evaluation.get("start"):
        held_out.insert(0, (0, start["loss"]))
    if held_out:
        x, y = downsample(*np.array(held_out, dtype=float).T)
        axes.plot(x, y, color=VERMILLION, marker="o", markersize=4.5, linewidth=1.2, label="held-out")
    if base := data.evaluation.get("base"):
        axes.axhline(base["loss"], color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label="base, held-out")
    axes.legend(frameon=False, fontsize=9)
    return figure


def plot_learning_rate(data: RunData) -> Figure:
    """The learning rate that each step used."""
    figure, axes = _new_plot("Learning rate", "learning rate")
    axes.plot(*downsample(_steps(data), _values([step.learning_rate for step in data.steps])), color=BLUE)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    axes.set_ylim(bottom=0)
    return figure


def plot_grad_norm(data: RunData) -> Figure:
    """The global gradient norm of each step, before clipping."""
    figure, axes = _new_plot("Gradient norm, before clipping", "norm")
    _draw(axes, _steps(data), _values([step.grad_norm for step in data.steps]), "gradient norm")
    axes.set_ylim(bottom=0)
    return figure


def plot_tokens_per_second(data: RunData) -> Figure:
    """Training tokens per second of each step."""
    figure, axes = _new_plot("Training speed", "tokens per second")
    tokens = np.diff(_values([step.tokens for step in data.steps]), prepend=0.0)
    _draw(axes, _steps(data), ratio(tokens, _values([step.seconds for step in data.steps])), "speed")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    return figure


CURVES: dict[str, Callable[[RunData], Figure]] = {
    "loss": plot_loss,
    "learning_rate": plot_learning_rate,
    "grad_norm": plot_grad_norm,
    "tokens_per_second": plot_tokens_per_second,
}
PLOTS: dict[str, Callable[[RunData], Figure | None]] = {
    **CURVES,
    "memory_over_time": plot_memory_over_time,
    "memory_by_component": plot_memory_by_component,
    "step_time": plot_step_time,
    "bytes_per_step": plot_bytes_per_step,
}
"""Every plot by the name of its file; None: the run holds nothing to draw it from."""


def figures(data: RunData) -> Iterator[tuple[str, Figure]]:
    """The plots that the run has something for, by name."""
    for name, plot in PLOTS.items():
        figure = plot(data) if data.steps or name not in CURVES else None
        if figure is not None:
            yield name, figure


def _new_plot(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = new_figure(6.0, 3.4)
    axes = figure.add_subplot()
    dress(axes, title)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    """A line; over a long run each step's value turns pale behind the running mean."""
    if len(x) < SMOOTHING_STARTS_AT:
        marker = "." if len(x) <= MARKERS_END_AT else ""
        axes.plot(x, y, color=BLUE, linewidth=1.6, marker=marker, label=label)
        return
    window = len(x) // 50
    axes.plot(*downsample(x, y), color=BLUE, linewidth=0.8, alpha=0.3)
    axes.plot(*downsample(x, smooth(y, window)), color=BLUE, linewidth=1.6, label=f"{label}, mean of {window} steps")


def _steps(data: RunData) -> np.ndarray:
    return _values([step.step for step in data.steps])


def _values(values: Sequence[float | None]) -> np.ndarray:
    """None becomes NaN, which matplotlib draws as a gap."""
    return np.array(values, dtype=float)
