"""The page of a run: every figure as text, put into `report.html.j2`. One file, no script, nothing fetched."""

import base64
import inspect
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from pcscale.common.units import format_bytes, format_count, format_seconds, short_name
from pcscale.reporting.memory_tables import (
    alternative_rows,
    byte_rows,
    component_rows,
    device_rows,
    moment_component_rows,
    step_time_rows,
)
from pcscale.reporting.plots import CURVES, PLOTS
from pcscale.reporting.run_data import RunData
from pcscale.reporting.side_by_side import difference
from pcscale.reporting.table import (
    MODELS,
    comparison_rows,
    format_difference,
    format_percent,
    memory_rows,
    phase_rows,
    plan_rows,
)

METHODS = {
    "projected": "trained through projections of the frozen base",
    "hard_prune": "trained on its own after hard pruning (the control arm)",
}


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    note: str


def render_page(data: RunData, report: dict[str, Any], images: dict[str, bytes]) -> str:
    """The whole of report.html.

    Args:
        data: the run.
        report: what report.json holds.
        images: the plots as PNG, by their names in `PLOTS`; those that there is nothing for are absent.
    """
    moments = report["phases"].get("train", {}).get("moments", {})
    environment = Environment(
        loader=FunctionLoader(_read_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        base=short_name(data.plan["base"]["name"] if data.plan else data.config.base),
        sentence=_sentence(data, report["training"]),
        cards=[_kept_card(data), _loss_card(data), _size_card(data), _memory_card(report["peak"])],
        comparison=comparison_rows(data.evaluation),
        not_evaluated=[label for key, label in MODELS.items() if not data.evaluation.get(key)],
        training=_training_text(data, report["training"]),
        plots={name: base64.b64encode(image).decode() for name, image in images.items()},
        captions={name: inspect.getdoc(plot) or name for name, plot in PLOTS.items()},
        curves=[name for name in CURVES if name in images],
        sample=data.evaluation.get("sample"),
        phases=phase_rows(report["phases"]),
        moments=phase_rows(moments, "moment"),
        training_parts=component_rows(report, "train") if "train" in report["phases"] else None,
        other_parts={name: component_rows(report, name) for name in report["phases"] if name != "train"},
        moment_parts=moment_component_rows(moments),
        alternatives=alternative_rows(report["alternatives"]),
        devices=device_rows(report["devices"]),
        steps={"step_time": step_time_rows(report), "bytes_per_step": byte_rows(report)},
        limits=_limits_text(report["limits"]),
        measured=data.usage is not None,
        plan=plan_rows(data.plan) if data.plan else None,
        # Newer plans say more than this about each phase, and have it beside what was measured.
        memory=memory_rows(data.plan) if data.plan and "phases" not in data.plan else None,
        machine=_machine_text(data.usage["machine"]) if data.usage else None,
        run=report["run"],
        settings=data.settings_text,
    )


def _read_resource(name: str) -> str:
    return resources.files("pcscale.reporting").joinpath(name).read_text(encoding="utf-8")


def _sentence(data: RunData, training: dict[str, Any]) -> str:
    words = [METHODS[data.config.method], f"for {training['steps']:,} of {data.config.max_steps:,} steps"]
    words.append(f"on {format_count(training['tokens'])} tokens.")
    if data.plan is None:
        return f"A smaller model cut from {data.config.base}, {' '.join(words)}"
    base, compressed = data.plan["base"], data.plan["compressed"]
    return (
        f"Cut from {format_count(base['parameters'])} to {format_count(compressed['parameters'])} parameters "
        f"(hidden size {compressed['hidden_size']:,}, intermediate size {compressed['intermediate_size']:,}), "
        f"{' '.join(words)}"
    )


def _kept_card(data: RunData) -> Card:
    if data.plan is None:
        return Card("Parameters kept", "not yet", "the run has not got to its plan yet")
    base, compressed = (format_count(data.plan[key]["parameters"]) for key in ("base", "compressed"))
    return Card("Parameters kept", f"{data.plan['compressed']['keep_fraction']:.1%}", f"{compressed} of {base}")


def _loss_card(data: RunData) -> Card:
    losses = {key: data.evaluation[key]["loss"] for key in MODELS if data.evaluation.get(key)}
    label = f"Held-out loss: {' → '.join(MODELS[key] for key in losses)}"
    if "base" not in losses or "compressed" not in losses:
        note = "the run has not got to the comparison with the base yet"
    else:
        note = f"{format_difference(losses['compressed'] - losses['base'])} nats against the base"
    return Card(label.removesuffix(": "), " → ".join(f"{loss:.3f}" for loss in losses.values()) or "not yet", note)


def _size_card(data: RunData) -> Card:
    if data.merge is None:
        return Card("Size on disk", "not yet", "the run has not got to the merge yet")
    shards = data.merge["shards"]
    note = f"merged, {shards:,} {'file' if shards == 1 else 'files'}"
    return Card("Size on disk", format_bytes(data.merge["bytes_written"]), note)


def _memory_card(peak: dict[str, Any]) -> Card:
    """The scarcer memory of the two; the other one is in the table of phases."""
    home, pair = ("device", peak["device"]) if peak["device"] else ("host", peak["host_anonymous"])
    predicted, measured = pair["predicted_bytes"], pair["measured_bytes"]
    label = f"Peak {home} memory"
    expected = "not predicted" if predicted is None else f"predicted {format_bytes(predicted)}"
    if measured is None:
        return Card(label, "not yet", expected)
    change = difference(predicted, measured)
    return Card(label, format_bytes(measured), expected if change is None else f"{expected}, {format_percent(change)}")


def _limits_text(limits: dict[str, Any] | None) -> str | None:
    """What there was to use, where anything is known."""
    parts = []
    if limits and limits["host_bytes"]:
        parts.append(f"{format_bytes(limits['host_bytes'])} of host memory ({limits['host_source']})")
    if limits and limits["device_bytes"]:
        parts.append(f"{format_bytes(limits['device_bytes'])} of device memory")
    return " · ".join(parts) or None


def _training_text(data: RunData, training: dict[str, Any]) -> str:
    parts = [
        f"{training['steps']:,} of {data.config.max_steps:,} steps",
        f"{format_count(training['tokens'])} tokens",
        f"{format_seconds(training['seconds'])} of training",
    ]
    taught = ", with the base's share," if data.config.distill else ""
    losses = {f"last loss{taught}": training["final_loss"], "best held-out loss": training["best_eval_loss"]}
    parts += [f"{label} {loss:.4f}" for label, loss in losses.items() if loss is not None]
    moved, least = training["moved_bytes_per_step"], training["least_moved_bytes_per_step"]
    if moved and least:
        parts.append(f"{format_bytes(moved)} moved a step, {moved / least:.3f} × the least possible")
    return " · ".join([*parts, f"skipped steps: {training['skipped_steps']:,}"])


def _machine_text(machine: dict[str, Any]) -> str:
    parts = [machine["cpu"], f"{machine['cores']:,} cores", f"{format_bytes(machine['memory_bytes'])} of memory"]
    return " · ".join([*parts, machine["gpu"] or "no GPU"])
