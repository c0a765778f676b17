"""Predicted beside measured as pairs of bars: the parts of memory, the bytes of a step, the seconds of a step."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pcscale.common.units import format_bytes
from pcscale.reporting import side_by_side
from pcscale.reporting.drawing import (
    AMBER,
    BLUE,
    GIB,
    GREY,
    INK,
    PINK,
    SKY,
    VERMILLION,
    dress,
    filled,
    new_figure,
)
from pcscale.reporting.run_data import RunData
from pcscale.reporting.table import format_percent

PREDICTED, MEASURED = ("#E2E8F0", "////"), (BLUE, "")
# On the grid's lines, so with a ground of its own.
BESIDE: dict[str, Any] = {
    "va": "center",
    "fontsize": 9,
    "color": INK,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5},
}
STEP_PARTS = {
    "forward": (SKY, ""),
    "backward": (BLUE, ""),
    "forward and backward": ("#2B93CE", ".."),
    "sweep": (VERMILLION, ""),
    "motion not hidden": (AMBER, "///"),
    "communication": (PINK, ""),
}
"""Colour and hatch. Evaluations and checkpoints are beside the steps, not in them."""


def plot_memory_by_component(data: RunData) -> Figure | None:
    """Each part of memory at its own highest while training, predicted above measured."""
    training = side_by_side.phases(data).get("train")
    return _draw_pairs("Parts of memory while training", training["components"] if training else {})


def plot_bytes_per_step(data: RunData) -> Figure | None:
    """Bytes that a step moves, writes and communicates, predicted above measured."""
    return _draw_pairs("Bytes of a step", side_by_side.bytes_per_step(data))


def plot_step_time(data: RunData) -> Figure | None:
    """The seconds of a step by what they went to, predicted above measured."""
    seconds = side_by_side.step_seconds(data)
    bars = {
        "predicted": {name: value for name, value in (seconds["predicted"] or {}).items() if name != "total"},
        "measured": {name: value for name, value in seconds["measured"].items() if name in STEP_PARTS},
    }
    bars = {label: parts for label, parts in bars.items() if any(parts.values())}
    if not bars:
        return None
    figure = new_figure(5.4, 1.6 + 0.45 * len(bars))
    axes = figure.add_subplot()
    dress(axes, "Seconds of a step")
    longest = max(sum(parts.values()) for parts in bars.values())
    for position, parts in enumerate(bars.values()):
        left = 0.0
        for name, value in parts.items():
            axes.barh(position, value, 0.62, left=left, linewidth=0.8, **filled(*_look(name)))
            left += value
        axes.text(left + longest * 0.02, position, f"{left:.3g} s", **BESIDE)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.16)
    axes.set_xlabel("seconds", color=INK)
    axes.grid(visible=False, axis="y")
    shown = [name for name in STEP_PARTS if any(parts.get(name) for parts in bars.values())]
    handles = [Patch(label=name, **filled(*_look(name))) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _draw_pairs(title: str, pairs: dict[str, dict[str, Any]]) -> Figure | None:
    """Two bars a row with the difference written beside them; None: there is no row."""
    sizes = {name: (pair["predicted_bytes"], pair["measured_bytes"]) for name, pair in pairs.items()}
    sizes = {name: pair for name, pair in sizes.items() if any(pair)}
    if not sizes:
        return None
    figure = new_figure(5.4, 1.3 + 0.42 * len(sizes))
    axes = figure.add_subplot()
    dress(axes, title)
    longest = max(num_bytes or 0 for pair in sizes.values() for num_bytes in pair) / GIB
    for position, (predicted, measured) in enumerate(sizes.values()):
        axes.barh(position - 0.19, (predicted or 0) / GIB, 0.36, linewidth=0.6, **filled(*PREDICTED, edge=GREY))
        axes.barh(position + 0.19, (measured or 0) / GIB, 0.36, linewidth=0.6, **filled(*MEASURED))
        end = max(predicted or 0, measured or 0) / GIB
        axes.text(end + longest * 0.02, position, _said(predicted, measured), **BESIDE)
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.6)
    axes.set_xlabel("GiB", color=INK)
    axes.grid(visible=False, axis="y")
    handles = [
        Patch(label="predicted", **filled(*PREDICTED, edge=GREY)),
        Patch(label="measured", **filled(*MEASURED)),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _said(predicted: float | None, measured: float | None) -> str:
    """What stands beside a pair: the measured size, and how far it is from the predicted one."""
    if measured is None:
        return f"{format_bytes(predicted or 0)},\nnot measured"
    change = side_by_side.difference(predicted, measured)
    return f"{format_bytes(measured)}," + ("\nnot predicted" if change is None else f" {format_percent(change)}")


def _look(name: str) -> tuple[str, str]:
    return STEP_PARTS.get(name, (GREY, "xx"))
