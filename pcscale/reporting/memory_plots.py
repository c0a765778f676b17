"""Memory over a run: its components stacked, with phases, predicted peaks and the limit."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation

from pcscale.common.ledger import COMPONENTS
from pcscale.common.units import format_bytes
from pcscale.reporting import side_by_side
from pcscale.reporting.drawing import (
    AMBER,
    BLUE,
    GIB,
    GREEN,
    GREY,
    INK,
    MAX_POINTS,
    PALE,
    PINK,
    RED,
    SKY,
    VERMILLION,
    YELLOW,
    dress,
    filled,
    new_figure,
    time_unit,
)
from pcscale.reporting.run_data import RunData, Sample

LEAST_SHARE = 0.01  # of the highest total; a thinner layer cannot be seen and goes to "others"
LIMIT_SHOWN_BELOW = 1.6  # times the highest total; a limit further up would only flatten what is below it
LETTER_WIDTH = 0.0105  # of the axes' width
OTHERS = f"others, each below {LEAST_SHARE:.0%}"
COLOURS = (
    "#9CA3AF",
    "#D1D5DB",
    "#374151",
    "#B45309",
    BLUE,
    SKY,
    GREEN,
    YELLOW,
    VERMILLION,
    AMBER,
    "#7B3F98",
    PINK,
    "#00584A",
    "#4C1D95",
    "#D9C9A3",
)
LOOKS = {
    **{name: (colour, "") for name, colour in zip(COMPONENTS, COLOURS, strict=True)},
    "frozen base": ("#374151", "..."),
    "gradients": (AMBER, "///"),
    "working memory": ("#D9C9A3", "\\\\\\"),
    OTHERS: (PALE, ""),
}
"""Colour and hatch of a component."""
LINE: dict[str, Any] = {"linewidth": 1.6, "path_effects": [withStroke(linewidth=3.2, foreground="white")]}
"""Seen on any colour."""


def plot_memory_over_time(data: RunData) -> Figure | None:
    """Memory over the whole run, stacked by component, with the phases and the predicted peak of each."""
    samples = thin(data.memory or ())
    homes = [home for home in ("host", "device") if any(_held(sample, home) for sample in samples)]
    times, unit = _times(samples)
    if not homes or times[-1] <= times[0]:
        return None
    phases = side_by_side.phases(data)
    limits = (data.usage or {}).get("limits") or {}
    figure = new_figure(10.4, 1.2 + 2.9 * len(homes))
    panels = figure.subplots(len(homes), sharex=True, squeeze=False)[:, 0]
    names, lines = set[str](), list[Line2D]()
    for axes, home in zip(panels, homes, strict=True):
        layers = _layers(samples, home)
        names.update(layers)
        _draw_stack(axes, times, layers)
        dress(axes, f"{home.capitalize()} memory over the run", pad=26 if axes is panels[0] else 8)
        axes.set_ylabel("GiB", color=INK)
        axes.set_xlim(times[0], times[-1])
        key = "host_anonymous" if home == "host" else "device"
        lines += _mark_predictions(axes, times, samples, {name: phase[key] for name, phase in phases.items()})
        lines += _mark_limit(axes, home, limits.get(f"{home}_bytes"))
        axes.set_ylim(bottom=0)
        _mark_phases(axes, times, samples)
    _name_phases(panels[0], times, samples)
    panels[-1].set_xlabel(unit, color=INK)
    stacked = [Patch(label=name, **filled(*_look(name))) for name in _in_stacking_order(names)]
    marks = {str(line.get_label()): line for line in lines}
    # As the stack reads, from the top.
    handles = [*reversed(stacked), *marks.values()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    return figure


def thin(samples: Sequence[Sample], max_points: int = MAX_POINTS) -> Sequence[Sample]:
    """At most `max_points` of the samples: of neighbours the one that holds most, so that no peak is lost."""
    size = max(1, math.ceil(len(samples) / max_points))
    buckets = [samples[first : first + size] for first in range(0, len(samples), size)]
    return [max(bucket, key=lambda sample: sum((*sample.host.values(), *sample.device.values()))) for bucket in buckets]


def _times(samples: Sequence[Sample]) -> tuple[np.ndarray, str]:
    """When each sample was taken, in a unit that suits the run; where a clock began anew the time goes on."""
    seconds = np.array([sample.seconds for sample in samples] or [0.0], dtype=float)
    steps = np.diff(seconds, prepend=seconds[0])
    seconds += np.cumsum(np.where(steps < 0, -steps, 0.0))
    divisor, unit = time_unit(seconds[-1])
    return seconds / divisor, unit


def _held(sample: Sample, home: str) -> dict[str, int]:
    return sample.host if home == "host" else sample.device


def _layers(samples: Sequence[Sample], home: str) -> dict[str, np.ndarray]:
    """GiB of each component in stacking order; those too thin to be seen are one, the last."""
    names = {name for sample in samples for name in _held(sample, home)}
    layers = {
        name: np.array([_held(sample, home).get(name, 0) for sample in samples], dtype=float) / GIB
        for name in _in_stacking_order(names)
    }
    least = LEAST_SHARE * max(np.sum(list(layers.values()), axis=0))
    unseen = [layers.pop(name) for name in list(layers) if layers[name].max() < least]
    others = np.sum(unseen, axis=0) if unseen else np.zeros(len(samples))
    return layers | ({OTHERS: others} if unseen and others.max() >= least else {})


def _in_stacking_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == OTHERS, side_by_side.position(name), name))


def _look(name: str) -> tuple[str, str]:
    return LOOKS.get(name, (GREY, "xx"))


def _draw_stack(axes: Axes, times: np.ndarray, layers: dict[str, np.ndarray]) -> None:
    below = np.zeros(len(times))
    for name, layer in layers.items():
        axes.fill_between(times, below, below + layer, linewidth=0.5, **filled(*_look(name)))
        below = below + layer


def _mark_predictions(
    axes: Axes, times: np.ndarray, samples: Sequence[Sample], peaks: dict[str, dict[str, int | None] | None]
) -> list[Line2D]:
    """A dashed line over each phase at its predicted peak."""
    lines = []
    for name, first, last in _bands(samples):
        if (peak := peaks.get(name)) and peak["predicted_bytes"]:
            height = peak["predicted_bytes"] / GIB
            style = {**LINE, "color": INK, "linestyle": (0, (4, 2)), "label": "predicted peak"}
            lines += axes.plot(times[[first, last]], [height, height], **style)
    return lines


def _mark_limit(axes: Axes, home: str, limit_bytes: int | None) -> list[Line2D]:
    if not limit_bytes or limit_bytes / GIB > LIMIT_SHOWN_BELOW * axes.get_ylim()[1]:
        return []
    label = f"{home} limit, {format_bytes(limit_bytes)}"
    return [axes.axhline(limit_bytes / GIB, color=RED, linestyle=(0, (6, 2, 1, 2)), label=label, **LINE)]


def _mark_phases(axes: Axes, times: np.ndarray, samples: Sequence[Sample]) -> None:
    """Every other phase on a tinted ground, with a line where each begins."""
    for number, (_, first, last) in enumerate(_bands(samples)):
        if number % 2:
            axes.axvspan(times[first], times[last], color="#F1F5F9", linewidth=0, zorder=0)
        if number:
            axes.axvline(times[first], color=INK, linewidth=0.7)


def _name_phases(axes: Axes, times: np.ndarray, samples: Sequence[Sample]) -> None:
    """The phases' names above the axes, moved apart where short phases crowd, each with a line to its band."""
    shares = (times - times[0]) / (times[-1] - times[0])
    bands = [(name, shares[first], shares[last]) for name, first, last in _bands(samples)]
    # Names that have no room together: the shortest phases go without.
    while sum(len(name) + 2 for name, _, _ in bands) * LETTER_WIDTH > 1:
        shortest = np.argmin([end - start for _, start, end in bands])
        del bands[shortest]
    centres = spread([(start + end) / 2 for _, start, end in bands], [len(name) * LETTER_WIDTH for name, _, _ in bands])
    above = axes.transAxes + ScaledTranslation(0, 9 / 72, axes.figure.dpi_scale_trans)
    for (name, start, end), centre in zip(bands, centres, strict=True):
        inside = end - start > len(name) * LETTER_WIDTH
        axes.annotate(
            name,
            xy=((start + end) / 2, 1.0),
            xycoords="axes fraction",
            xytext=(centre, 1.0),
            textcoords=above,
            arrowprops=None if inside else {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 0},
            ha="center",
            fontsize=9,
            color=INK,
        )


def spread(centres: Sequence[float], widths: Sequence[float], gap: float = 2 * LETTER_WIDTH) -> list[float]:
    """Centres of labels in 0 to 1, in the order they have, moved as little as two passes need to keep them apart."""
    placed, free_from = [], 0.0
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, free_from + width / 2))
        free_from = placed[-1] + width / 2 + gap
    free_to = 1.0
    for position in reversed(range(len(placed))):
        placed[position] = min(placed[position], free_to - widths[position] / 2)
        free_to = placed[position] - widths[position] / 2 - gap
    return placed


def _bands(samples: Sequence[Sample]) -> Iterator[tuple[str, int, int]]:
    """`(phase, first, last)`: runs of samples of one phase; a band ends where the next begins."""
    first = 0
    for position in range(1, len(samples) + 1):
        if position == len(samples) or samples[position].phase != samples[first].phase:
            yield samples[first].phase, first, min(position, len(samples) - 1)
            first = position
