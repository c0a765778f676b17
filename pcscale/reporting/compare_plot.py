"""The picture of a comparison: held-out loss against tokens and against time, and peak memory, run by run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from pcscale.common.errors import RequestError
from pcscale.common.files import write_bytes
from pcscale.common.units import format_bytes
from pcscale.reporting.bar_plots import BESIDE
from pcscale.reporting.compare import MEMORIES, compare_runs
from pcscale.reporting.drawing import (
    AMBER,
    BLUE,
    GIB,
    GREEN,
    GREY,
    INK,
    PINK,
    SKY,
    VERMILLION,
    downsample,
    dress,
    filled,
    new_figure,
    png,
    time_unit,
)

COLOURS = (BLUE, VERMILLION, GREEN, PINK, AMBER, SKY, INK)
MARKERS = "osD^vPX"
LINE_STYLES = ("-", "--", ":", "-.")
"""Colour and marker change from run to run, the line when all colours are used."""
MARKERS_END_AT = 40  # evaluations; beyond it the line alone is clearer
LONGEST_LABEL = 60  # letters
LEGEND_LETTERS = 120  # side by side, at most


def write_comparison(runs: list[Path], output: Path) -> dict[str, Any]:
    """Compare runs, and draw the comparison into a PNG file, which is replaced where it is there.

    Returns:
        What `compare_runs` gives, with the file as `plot`.

    Raises:
        RequestError: as `compare_runs`, or the file cannot be written there. Nothing is written then.
    """
    _check_output(output, runs)
    comparison = compare_runs(runs)
    write_bytes(output, png(plot_comparison(comparison)))
    return {**comparison, "plot": str(output)}


def plot_comparison(comparison: dict[str, Any]) -> Figure:
    """Curves by tokens and by time above bars of peak memory; dotted lines are where all runs are compared."""
    runs, equal = comparison["runs"], comparison["equal"]
    memories = [key for key in MEMORIES if any(run["peak"][key] is not None for run in runs)]
    names = [*(_plain(run["label"]) for run in runs), "equal tokens, equal time"]
    columns = max(1, min(len(names), LEGEND_LETTERS // (max(map(len, names)) + 6)))
    heights = [3.6, 0.8 + 0.22 * len(runs)] if memories else [3.6]
    figure = new_figure(10.4, sum(heights) + 0.2 * math.ceil(len(names) / columns))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    by_tokens = figure.add_subplot(grid[0, 0])
    by_time = figure.add_subplot(grid[0, 1], sharey=by_tokens)
    dress(by_tokens, "Held-out loss by tokens")
    dress(by_time, "Held-out loss by time")
    divisor, unit = time_unit(max(run["curve"]["seconds"][-1] for run in runs))
    _draw_curves(by_time, runs, "seconds", equal["seconds"], divisor)
    handles = _draw_curves(by_tokens, runs, "tokens", equal["tokens"])
    by_tokens.set_ylabel("nats per token", color=INK)
    by_tokens.set_xlabel("tokens trained on", color=INK)
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_time.set_xlabel(f"{unit} of training", color=INK)
    for position, key in enumerate(memories):
        cells = grid[1, :] if len(memories) == 1 else grid[1, position]
        _draw_peaks(figure.add_subplot(cells), runs, key)
    style: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles, names, loc="outside upper left", **style)
    return figure


def _draw_curves(axes: Axes, runs: list[dict[str, Any]], axis: str, equal: float, divisor: float = 1.0) -> list[Line2D]:
    """A line for each run, and one at what all runs are compared at."""
    lines = []
    for number, run in enumerate(runs):
        x, y = downsample(np.array(run["curve"][axis], dtype=float) / divisor, np.array(run["curve"]["loss"]))
        marker = MARKERS[number % len(MARKERS)] if len(x) <= MARKERS_END_AT else ""
        style = LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
        look: dict[str, Any] = {"color": _colour(number), "marker": marker, "linestyle": style}
        lines += axes.plot(x, y, markersize=4.5, linewidth=1.5, **look)
    mark = axes.axvline(equal / divisor, color=GREY, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    return [*lines, mark]


def _draw_peaks(axes: Axes, runs: list[dict[str, Any]], memory: str) -> None:
    """A bar for each run, the first at the top, with its size written beside it."""
    dress(axes, f"Peak {MEMORIES[memory]}")
    peaks = [run["peak"][memory] for run in runs]
    longest = max(peak or 0 for peak in peaks) / GIB or 1.0
    for number, peak in enumerate(peaks):
        axes.barh(number, (peak or 0) / GIB, 0.62, **filled(_colour(number), ""))
        text = "not measured" if peak is None else format_bytes(peak)
        axes.text((peak or 0) / GIB + 0.01 * longest, number, text, **BESIDE)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("GiB", color=INK)
    axes.grid(visible=False, axis="y")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _plain(label: str) -> str:
    """A name that matplotlib takes as it is: dollars would begin a formula, and an underscore hides a label."""
    short = label if len(label) <= LONGEST_LABEL else f"…{label[1 - LONGEST_LABEL :]}"
    return f" {short}".replace("$", r"\$")


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
