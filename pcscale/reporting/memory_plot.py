"""Memory over a run: its components stacked, with phases, predicted peaks and the limit."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from pcscale.common.ledger import COMPONENTS
from pcscale.common.units import format_bytes
from pcscale.reporting import side_by_side
from pcscale.reporting.drawing import GIB, GREY, INK, new_figure, time_unit
from pcscale.run.record import RunRecord, Sample

LIMIT_SHOWN_BELOW = 1.6
"""Times the height of the axes: a limit further up would only flatten what is below it."""
CLOSE = 0.15
"""Share of the width."""
COLOURS = (
    *("#9CA3AF", "#D1D5DB", "#374151", "#B45309", "#0072B2", "#56B4E9", "#009E73", "#F0E442"),
    *("#D55E00", "#E69F00", "#7B3F98", "#CC79A7", "#00584A", "#4C1D95", "#D9C9A3"),
)
COLOUR_OF: dict[str, str] = dict(zip(COMPONENTS, COLOURS, strict=True))
"""Neighbours in the stack differ in lightness, for grey print."""

Band = tuple[str, float, float]
"""A phase, its begin and its end."""


def plot_memory_over_time(record: RunRecord) -> Figure | None:
    """Memory over the whole run, stacked by component, with the phases and the predicted peak of each."""
    samples = record.samples
    memories = {"host": [sample.host for sample in samples], "device": [sample.device for sample in samples]}
    memories = {memory: held for memory, held in memories.items() if any(any(parts.values()) for parts in held)}
    if not memories or samples[-1].seconds <= samples[0].seconds:
        return None
    divisor, unit = time_unit(samples[-1].seconds)
    times = np.array([sample.seconds for sample in samples]) / divisor
    bands = _bands(samples, times)
    phases = side_by_side.phases(record)
    limits = vars(record.usage.limits) if record.usage else {}
    figure = new_figure(10.4, 1.2 + 2.9 * len(memories))
    panels = figure.subplots(len(memories), sharex=True, squeeze=False)[:, 0]
    for axes, (memory, held) in zip(panels, memories.items(), strict=True):
        layers = _layers(held)
        colours = [COLOUR_OF.get(name, GREY) for name in layers]
        axes.stackplot(times, *layers.values(), labels=list(layers), colors=colours, edgecolor="white", linewidth=0.5)
        axes.set(title=f"{memory.capitalize()} memory over the run", ylabel="GiB", xlim=(times[0], times[-1]))
        key = "host_anonymous" if memory == "host" else "device"
        _mark_predictions(axes, bands, {name: phase[key] for name, phase in phases.items()})
        limit_bytes = limits.get(f"{memory}_bytes")
        if limit_bytes and limit_bytes / GIB <= LIMIT_SHOWN_BELOW * axes.get_ylim()[1]:
            label = f"{memory} limit, {format_bytes(limit_bytes)}"
            axes.axhline(limit_bytes / GIB, color="#A50026", linestyle="-.", label=label)
        axes.set_ylim(bottom=0)
        for _, start, _ in bands[1:]:
            axes.axvline(start, color=INK, linewidth=0.7)
    _name_phases(panels[0], bands)
    panels[-1].set_xlabel(unit)
    _add_legend(figure, panels)
    return figure


def _bands(samples: Sequence[Sample], times: np.ndarray) -> list[Band]:
    """Stretches of samples of one phase; each ends where the next begins."""
    stretches = groupby(range(len(samples)), key=lambda number: samples[number].phase)
    begins = [(phase, times[next(numbers)]) for phase, numbers in stretches]
    ends = [begin for _, begin in begins[1:]] + [times[-1]]
    return [(phase, begin, end) for (phase, begin), end in zip(begins, ends, strict=True)]


def _layers(held: Sequence[dict[str, int]]) -> dict[str, np.ndarray]:
    """GiB of each component that is ever there, in stacking order."""
    names = sorted({name for parts in held for name, num_bytes in parts.items() if num_bytes}, key=_stack_order)
    return {name: np.array([parts.get(name, 0) for parts in held]) / GIB for name in names}


def _stack_order(name: str) -> tuple[int, str]:
    return side_by_side.position(name), name


def _mark_predictions(axes: Axes, bands: Sequence[Band], peaks: dict[str, Any]) -> None:
    """A dashed line over each phase at its predicted peak."""
    known = [(begin, end, peaks[phase]) for phase, begin, end in bands if peaks.get(phase)]
    lines = [(begin, end, peak["predicted_bytes"] / GIB) for begin, end, peak in known if peak["predicted_bytes"]]
    if lines:
        begins, ends, heights = zip(*lines, strict=True)
        axes.hlines(heights, begins, ends, color=INK, linestyle="--", label="predicted peak")


def _name_phases(axes: Axes, bands: Sequence[Band]) -> None:
    """Phases by name above their begin; those that begin close to each other share one label."""
    first, last = axes.get_xlim()
    labels: list[tuple[float, list[str]]] = []
    for phase, begin, _ in bands:
        if not labels or begin - labels[-1][0] >= CLOSE * (last - first):
            labels.append((begin, []))
        labels[-1][1].append(phase)
    above = axes.secondary_xaxis("top")
    above.set_xticks(
        [begin for begin, _ in labels], [", ".join(dict.fromkeys(phases)) for _, phases in labels], ha="left"
    )
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)


def _add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend of all panels: the layers as they lie, from the top, and the lines."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    layers = [label for label, handle in found.items() if isinstance(handle, PolyCollection)]
    labels = sorted(layers, key=_stack_order, reverse=True) + [label for label in found if label not in layers]
    figure.legend([found[label] for label in labels], labels, loc="outside right upper")
