"""What every plot of a report shares: colours, axes, and series cut to a bounded size. Drawn without pyplot."""

import io
import math
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GIB = 2**30
MAX_POINTS = 1_000
PLOT_DPI = 180

# Okabe and Ito's colours, told apart with any colour vision. Neighbours in a stack differ in lightness, for grey print.
BLUE, VERMILLION, SKY, AMBER = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"
GREEN, YELLOW, PINK = "#009E73", "#F0E442", "#CC79A7"
INK, GREY, PALE, GRID, RED = "#1F2937", "#6B7280", "#CBD5E1", "#E5E7EB", "#A50026"

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
    return np.add.reduceat(x, starts) / sizes, ratio(
        np.add.reduceat(np.where(present, y, 0.0), starts), np.add.reduceat(present.astype(float), starts)
    )


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The running mean around each value over what is there; a gap stays a gap."""
    present = np.isfinite(y)
    kernel = np.ones(window)
    sums = np.convolve(np.where(present, y, 0.0), kernel, mode="same")
    counts = np.convolve(present.astype(float), kernel, mode="same")
    return ratio(sums, np.where(present, counts, 0.0))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def dress(axes: Axes, title: str, pad: float = 8.0) -> None:
    """The look of all plots: a title at the left, `pad` points above the axes, a light grid, no box."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)


def filled(colour: str, hatch: str, edge: str = "white") -> dict[str, Any]:
    """The look of an area or a bar, for matplotlib; the hatch has the colour of the edge."""
    return {"facecolor": colour, "hatch": hatch, "edgecolor": edge}


def time_unit(longest_seconds: float) -> tuple[float, str]:
    """Seconds of the unit that suits a time axis, and its name."""
    if longest_seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest_seconds < 3 * 3600 else (3600.0, "hours")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file. Letters that the font lacks are boxes."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(image, format="png", dpi=PLOT_DPI)
    return image.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure. Units: inches; 10.4 is the width of the page."""
    return Figure(figsize=(width, height), layout="constrained")
