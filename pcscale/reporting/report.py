"""report.html, report.json and plots of a run, written into its folder."""

from pathlib import Path
from typing import Any

from pcscale.common.files import readable_os_errors, write_bytes, write_json, write_text
from pcscale.reporting import side_by_side
from pcscale.reporting.drawing import png
from pcscale.reporting.page import render_page
from pcscale.reporting.plots import PLOTS, figures
from pcscale.reporting.run_data import RunData, read_run


def write_report(run: Path) -> dict[str, Any]:
    """Write `report.html`, `report.json` and `plots/*.png` into a run folder; a run under way is reported as it is.

    Returns:
        What report.json holds.

    Raises:
        RequestError: `run` is no run folder or a file in it is broken.
    """
    data = read_run(run)
    report = summarize(data)
    images = {name: png(figure) for name, figure in figures(data)}
    for name in PLOTS:
        path = run / "plots" / f"{name}.png"
        with readable_os_errors(path):
            if name in images:
                path.parent.mkdir(exist_ok=True)
                write_bytes(path, images[name])
            else:
                path.unlink(missing_ok=True)
    write_text(run / "report.html", render_page(data, report, images))
    write_json(run / "report.json", report)
    return report


def summarize(data: RunData) -> dict[str, Any]:
    """The figures of a run, predicted beside measured; None where the run has not got there."""
    phases = side_by_side.phases(data)
    step_bytes = side_by_side.bytes_per_step(data)
    on_device = any(phase["device"] for phase in phases.values())
    return {
        "run": str(data.run),
        "plan": data.plan,
        "evaluation": {key: data.evaluation.get(key) for key in ("base", "start", "compressed")},
        "peak": {
            "host_anonymous": side_by_side.highest(phases, "host_anonymous"),
            "device": side_by_side.highest(phases, "device") if on_device else None,
        },
        "phases": phases,
        "written_bytes_per_step": step_bytes["written"],
        "communicated_bytes_per_step": step_bytes["communicated"],
        "alternatives": side_by_side.alternatives(data),
        "devices": data.plan.get("devices") if data.plan else None,
        "limits": data.usage.get("limits") if data.usage else None,
        "step_seconds": side_by_side.step_seconds(data),
        "training": _training(data, step_bytes["moved"]),
        "merge": data.merge,
    }


def _training(data: RunData, moved: dict[str, Any]) -> dict[str, Any]:
    steps = data.steps
    return {
        "steps": len(steps),
        "tokens": steps[-1].tokens if steps else 0,
        "seconds": sum(step.seconds for step in steps),
        "final_loss": next((step.loss for step in reversed(steps) if step.loss is not None), None),
        "best_eval_loss": min((step.eval_loss for step in steps if step.eval_loss is not None), default=None),
        "skipped_steps": sum(step.skipped for step in steps),
        "moved_bytes_per_step": moved["measured_bytes"],
        "least_moved_bytes_per_step": (moved["predicted_bytes"] or 0) if data.plan else None,
    }
