"""Memory over a run: its components stacked, with phases, predicted peaks and the limit."""

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from pcscale.common.ledger import COMPONENTS
from pcscale.common.units import format_bytes
from pcscale.reporting.drawing import GIB, GREY, INK, new_figure, time_unit
from pcscale.reporting.summary import stack_order
from pcscale.run.record import RunRecord

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


def plot_memory_over_time(record: RunRecord) -> Figure | None:
    """Memory over the whole run, stacked by component, with the phases and the predicted peak of each."""
    samples = record.samples
    memories = {"host": [sample.host for sample in samples], "device": [sample.device for sample in samples]}
    memories = {memory: held for memory, held in memories.items() if any(any(parts.values()) for parts in held)}
    if not memories or samples[-1].seconds <= samples[0].seconds:
        return None
    divisor, unit = time_unit(samples[-1].seconds)
    times = np.array([sample.seconds for sample in samples]) / divisor
    stretches = groupby(range(len(samples)), key=lambda number: samples[number].phase)
    begins = [(phase, times[next(numbers)]) for phase, numbers in stretches]
    ends = [begin for _, begin in begins[1:]] + [times[-1]]
    planned = record.plan["peak"] if record.plan else {}
    figure = new_figure(10.4, 1.2 + 2.9 * len(memories))
    panels = figure.subplots(len(memories), sharex=True, squeeze=False)[:, 0]
    for axes, (memory, held) in zip(panels, memories.items(), strict=True):
        _stack(axes, times, held)
        axes.set(title=f"{memory.capitalize()} memory over the run", ylabel="GiB", xlim=(times[0], times[-1]))
        peaks = {phase: peak[f"{memory}_bytes"] / GIB for phase, peak in planned.items()}
        bands = zip(begins, ends, strict=True)
        lines = [(peaks[phase], begin, end) for (phase, begin), end in bands if peaks.get(phase)]
        if lines:
            axes.hlines(*zip(*lines, strict=True), color=INK, linestyle="--", label="predicted peak")
        limit_bytes = vars(record.usage.limits)[f"{memory}_bytes"] if record.usage else None
        if limit_bytes and limit_bytes / GIB <= LIMIT_SHOWN_BELOW * axes.get_ylim()[1]:
            label = f"{memory} limit, {format_bytes(limit_bytes)}"
            axes.axhline(limit_bytes / GIB, color="#A50026", linestyle="-.", label=label)
        axes.set_ylim(bottom=0)
        for _, begin in begins[1:]:
            axes.axvline(begin, color=INK, linewidth=0.7)
    _name_phases(panels[0], begins)
    panels[-1].set_xlabel(unit)
    _add_legend(figure, panels)
    return figure


def _stack(axes: Axes, times: np.ndarray, held: Sequence[dict[str, int]]) -> None:
    """A layer for each component that is ever there, in stacking order."""
    names = sorted({name for parts in held for name, num_bytes in parts.items() if num_bytes}, key=stack_order)
    layers = [[parts.get(name, 0) / GIB for parts in held] for name in names]
    colours = [COLOUR_OF.get(name, GREY) for name in names]
    axes.stackplot(times, *layers, labels=names, colors=colours, edgecolor="white", linewidth=0.5)


def _name_phases(axes: Axes, begins: Sequence[tuple[str, float]]) -> None:
    """Phases by name above their begin; those that begin close to each other share one label."""
    first, last = axes.get_xlim()
    labels: list[tuple[float, list[str]]] = []
    for phase, begin in begins:
        if not labels or begin - labels[-1][0] >= CLOSE * (last - first):
            labels.append((begin, []))
        labels[-1][1].append(phase)
    above = axes.secondary_xaxis("top")
    names = [", ".join(dict.fromkeys(phases)) for _, phases in labels]
    above.set_xticks([begin for begin, _ in labels], names, ha="left")
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)


def _add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend of all panels: the layers as they lie, from the top, and the lines."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    layers = [label for label, handle in found.items() if isinstance(handle, PolyCollection)]
    labels = sorted(layers, key=stack_order, reverse=True) + [label for label in found if label not in layers]
    figure.legend([found[label] for label in labels], labels, loc="outside right upper")
