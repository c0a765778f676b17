"""The curves of a run as matplotlib figures, drawn without pyplot, so nothing outside a figure changes."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from pcscale.reporting.run_data import RunData

MAX_POINTS = 2_000
SMOOTHING_STARTS_AT = 200  # steps; a shorter run is readable as it is
MARKERS_END_AT = 40  # points; beyond it the line alone is clearer

# Okabe and Ito's colours, told apart with any colour vision and in grey print.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#6B7280", "#1F2937"

Series = tuple[np.ndarray, np.ndarray]


def downsample(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> Series:
    """Means over equal buckets, at most `max_points` of them; NaN in `y` counts only where a bucket has nothing else.

    Args:
        x: positions, `[n]`.
        y: values, `[n]`; NaN is a gap.
        max_points: the bound on the result.
    """
    if len(x) <= max_points:
        return x, y
    starts = np.arange(0, len(x), math.ceil(len(x) / max_points))
    present = np.isfinite(y)
    sizes = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / sizes, _ratio(
        np.add.reduceat(np.where(present, y, 0.0), starts), np.add.reduceat(present.astype(float), starts)
    )


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The running mean around each value over what is there; a gap stays a gap."""
    present = np.isfinite(y)
    kernel = np.ones(window)
    sums = np.convolve(np.where(present, y, 0.0), kernel, mode="same")
    counts = np.convolve(present.astype(float), kernel, mode="same")
    return _ratio(sums, np.where(present, counts, 0.0))


def plot_loss(data: RunData) -> Figure:
    """Training loss per step, held-out loss where evaluated (step 0 too), and the base's held-out loss."""
    figure, axes = _new_plot("Loss", "nats per token")
    _draw(axes, _steps(data), _values([step.loss for step in data.steps]), "training")
    held_out = [(step.step, step.eval_loss) for step in data.steps if step.eval_loss is not None]
    if start := data.evaluation.get("start"):
        held_out.insert(0, (0, start["loss"]))
    if held_out:
        x, y = downsample(*np.array(held_out, dtype=float).T)
        axes.plot(x, y, color=ORANGE, marker="o", markersize=4.5, linewidth=1.2, label="held-out")
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
    _draw(axes, _steps(data), _ratio(tokens, _values([step.seconds for step in data.steps])), "speed")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    return figure


PLOTS: dict[str, Callable[[RunData], Figure]] = {
    "loss": plot_loss,
    "learning_rate": plot_learning_rate,
    "grad_norm": plot_grad_norm,
    "tokens_per_second": plot_tokens_per_second,
}


def _new_plot(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
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


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
