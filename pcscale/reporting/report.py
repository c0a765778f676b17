"""report.html, report.json and plots of a run, written into its folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pcscale.common.files import readable_os_errors, write_bytes, write_json, write_text
from pcscale.reporting import side_by_side
from pcscale.reporting.drawing import png
from pcscale.reporting.page import render_page
from pcscale.reporting.plots import PLOTS, figures
from pcscale.run.folder import RunFolder
from pcscale.run.record import RunRecord


def write_report(run: Path) -> dict[str, Any]:
    """Write `report.html`, `report.json` and `plots/*.png` into a run folder; a run under way is reported as it is.

    Returns:
        The contents of report.json.

    Raises:
        RequestError: `run` is no run folder or a file in it is broken.
    """
    record, folder = RunRecord.read(run), RunFolder(run)
    report = summarize(record)
    images = {name: png(figure) for name, figure in figures(record).items()}
    for name in PLOTS:
        path = folder.plots / f"{name}.png"
        with readable_os_errors(path):
            if name in images:
                path.parent.mkdir(exist_ok=True)
                write_bytes(path, images[name])
            else:
                path.unlink(missing_ok=True)
    write_text(folder.page, render_page(record, report, images))
    write_json(folder.report, report)
    return report


def summarize(record: RunRecord) -> dict[str, Any]:
    """The figures of a run, predicted beside measured; None where the run has not got there."""
    phases = side_by_side.phases(record)
    step_bytes = side_by_side.bytes_per_step(record)
    on_device = any(phase["device"] for phase in phases.values())
    evaluation = asdict(record.evaluation)
    return {
        "run": str(record.path),
        "plan": record.plan,
        "evaluation": {key: evaluation[key] for key in ("base", "start", "compressed")},
        "peak": {
            "host_anonymous": side_by_side.highest(phases, "host_anonymous"),
            "device": side_by_side.highest(phases, "device") if on_device else None,
        },
        "phases": phases,
        "written_bytes_per_step": step_bytes["written"],
        "communicated_bytes_per_step": step_bytes["communicated"],
        "alternatives": side_by_side.alternatives(record),
        "devices": (record.plan or {}).get("devices"),
        "limits": asdict(record.usage.limits) if record.usage else None,
        "step_seconds": side_by_side.step_seconds(record),
        "training": _training(record, step_bytes["moved"]),
        "merge": record.merge,
    }


def _training(record: RunRecord, moved: dict[str, Any]) -> dict[str, Any]:
    steps = record.steps
    return {
        "steps": len(steps),
        "tokens": steps[-1].tokens if steps else 0,
        "seconds": sum(step.seconds for step in steps),
        "final_loss": next((step.loss for step in reversed(steps) if step.loss is not None), None),
        "best_eval_loss": min((step.eval_loss for step in steps if step.eval_loss is not None), default=None),
        "skipped_steps": sum(step.skipped for step in steps),
        "moved_bytes_per_step": moved["measured_bytes"],
        "least_moved_bytes_per_step": moved["predicted_bytes"],
    }
