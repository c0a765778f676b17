"""A run's memory, and the bytes and seconds of its steps, as rows of text for the page and for the terminal alike."""

from typing import Any

from pcscale.common.units import format_bytes
from pcscale.reporting.side_by_side import difference, position
from pcscale.reporting.table import ABSENT, Table, format_percent, pair_cells, phase_rows

MEMORY_KEYS = (
    "peak",
    "phases",
    "alternatives",
    "devices",
    "limits",
    "step_seconds",
    "written_bytes_per_step",
    "communicated_bytes_per_step",
)
"""The part of report.json that is about memory."""
WAYS = {
    "published form": "the published form",
    "hard pruning": "hard pruning",
    "this run": "this run",
}
DOES_NOT_FIT = "does not fit"
SWEEP_PARTS = ("sweep", "motion not hidden", "communication")


def memory_tables(report: dict[str, Any]) -> dict[str, Table]:
    """Every table of a run's memory by its title; a table without a row is left out.

    Args:
        report: what report.json holds.
    """
    moments = report["phases"].get("train", {}).get("moments", {})
    tables = {"Peak of each phase": phase_rows(report["phases"])}
    tables |= {f"Parts of {name}": component_rows(report, name) for name in report["phases"]}
    tables |= {
        "Moments of training": phase_rows(moments, "moment"),
        "Parts in each moment of training (GiB, measured / predicted)": moment_component_rows(moments),
        "What training needs, this way and others": alternative_rows(report["alternatives"]),
        "What would have to change to fit": device_rows(report["devices"]),
        "Bytes of a step": byte_rows(report),
        "Seconds of a step": step_time_rows(report),
    }
    return {title: table for title, table in tables.items() if table[1]}


def component_rows(report: dict[str, Any], phase: str) -> Table:
    """Each part of a phase's memory at its own highest, and what lies in files instead."""
    rows = [
        [name, part["home"], *pair_cells(part)]
        for name, part in report["phases"][phase]["components"].items()
        if part["predicted_bytes"] or part["measured_bytes"]
    ]
    planned = (report["plan"] or {}).get("phases", {}).get(phase, {}).get("components", {})
    rows += [
        [name, "files", ABSENT, format_bytes(part["bytes"]), ABSENT]
        for name, part in planned.items()
        if part["home"] == "disk" and part["bytes"]
    ]
    return ["part", "home", "measured", "predicted", "difference"], rows


def moment_component_rows(moments: dict[str, Any]) -> Table:
    """Parts by moments, in GiB: measured / predicted. A moment that nothing is known of has no column."""
    shown = {name: moment["components"] for name, moment in moments.items() if moment["components"]}
    names = sorted({name for parts in shown.values() for name in parts}, key=position)
    rows = []
    for name in names:
        pairs = [parts.get(name, {}) for parts in shown.values()]
        if any(pair.get(key) for pair in pairs for key in ("predicted_bytes", "measured_bytes")):
            home = next(pair["home"] for pair in pairs if pair)
            rows.append([name, home, *(_gibibytes(pair) for pair in pairs)])
    return ["part", "home", *shown], rows


def alternative_rows(alternatives: dict[str, Any] | None) -> Table:
    """What training needs on device and host together, relative to what this run took (or was planned to take)."""
    if not alternatives:
        return ["training this model by", "memory", "", "relative", "what is in it"], []
    this = alternatives.get("this run", {})
    measured = this.get("measured_bytes")
    unit = measured or this.get("bytes")
    rows = []
    for way, need in alternatives.items():
        sizes = [(need["bytes"], "predicted", need["of"])]
        if need["measured_bytes"] is not None:
            sizes.append((need["measured_bytes"], "measured", "all of it, at its peak"))
        for size_bytes, kind, of in sizes:
            relative = f"{size_bytes / unit:.2f} ×" if unit else ABSENT
            rows.append([WAYS.get(way, way), format_bytes(size_bytes), kind, relative, of])
    return ["training this model by", "memory", "", "relative", "what is in it"], rows


def device_rows(devices: list[dict[str, Any]] | None) -> Table:
    """Whether the run fits devices of usual sizes, and what would have to change."""
    rows = []
    for device in devices or []:
        change = device["change"]
        if change == DOES_NOT_FIT or (not device["fits"] and not change):
            cells = ["no", "no setting makes it fit"]
        else:
            cells = ["after a change", change] if change else ["as it is", "nothing"]
        rows.append([_device_size(device["device_bytes"]), *cells])
    return ["device memory", "fits", "what would have to change"], rows


def byte_rows(report: dict[str, Any]) -> Table:
    """What a step moves, writes and communicates; a kind that nobody predicted or measured has no row."""
    training = report["training"]
    kinds = {
        "moved": {
            "predicted_bytes": training["least_moved_bytes_per_step"] or None,
            "measured_bytes": training["moved_bytes_per_step"],
        },
        "written, with checkpoints": report["written_bytes_per_step"],
        "communicated": report["communicated_bytes_per_step"],
    }
    rows = [[name, *pair_cells(pair)] for name, pair in kinds.items() if any(pair.values())]
    return ["bytes of a step", "measured", "predicted", "difference"], rows


def step_time_rows(report: dict[str, Any]) -> Table:
    """What the seconds of a step go to; the sweep's motion and communication are measured with it."""
    predicted, measured = report["step_seconds"]["predicted"] or {}, report["step_seconds"]["measured"]
    steps, seconds = report["training"]["steps"], report["training"]["seconds"]
    swept = [name for name in SWEEP_PARTS if predicted.get(name)]
    passes = [measured[name] for name in ("forward", "backward") if name in measured]
    pairs = {
        "forward and backward": (predicted.get("forward and backward"), sum(passes) if passes else None),
        " + ".join(swept or ["sweep"]): (
            sum(predicted[name] for name in swept) if swept else None,
            measured.get("sweep"),
        ),
        "step": (predicted.get("total"), seconds / steps if steps else None),
        "evaluations, shared out": (None, measured.get("evaluate")),
        "checkpoints, shared out": (None, measured.get("checkpoint")),
    }
    rows = [
        [name, _seconds(value), _seconds(expected), format_percent(difference(expected, value))]
        for name, (expected, value) in pairs.items()
        if expected is not None or value is not None
    ]
    return ["seconds of a step", "measured", "predicted", "difference"], rows if predicted or measured else []


def _gibibytes(pair: dict[str, Any]) -> str:
    sizes = [pair.get("measured_bytes"), pair.get("predicted_bytes")]
    if not any(sizes):
        return ABSENT
    return " / ".join(ABSENT if size_bytes is None else f"{size_bytes / 2**30:.2f}" for size_bytes in sizes)


def _device_size(num_bytes: int) -> str:
    return f"{num_bytes // 10**9} GB" if num_bytes % 10**9 == 0 else format_bytes(num_bytes)


def _seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
