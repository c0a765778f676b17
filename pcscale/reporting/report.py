"""report.html, report.json and plots of a run, written into its folder."""

import io
from pathlib import Path
from typing import Any

from pcscale.common.files import publish, said_plainly, temporary_beside, write_json, write_text
from pcscale.reporting.page import render_page
from pcscale.reporting.plots import PLOTS
from pcscale.reporting.run_data import RunData, read_run

PLOT_DPI = 180


def write_report(run: Path) -> dict[str, Any]:
    """Write `report.html`, `report.json` and `plots/*.png` into a run folder; a run under way is reported as it is.

    Returns:
        What report.json holds.

    Raises:
        RequestError: `run` is no run folder or a file in it is broken.
    """
    data = read_run(run)
    report = summarize(data)
    images = {name: _png(data, name) for name in PLOTS} if data.steps else {}
    for name, image in images.items():
        _write_image(run / "plots" / f"{name}.png", image)
    write_text(run / "report.html", render_page(data, report, images))
    write_json(run / "report.json", report)
    return report


def summarize(data: RunData) -> dict[str, Any]:
    """The figures of a run, predicted beside measured; None where the run has not got there."""
    phases = _phases(data)
    on_device = any(phase["device"] for phase in phases.values())
    return {
        "run": str(data.run),
        "plan": data.plan,
        "evaluation": {key: data.evaluation.get(key) for key in ("base", "start", "compressed")},
        "peak": {
            "host_anonymous": _highest(phases, "host_anonymous"),
            "device": _highest(phases, "device") if on_device else None,
        },
        "phases": phases,
        "training": _training(data),
        "merge": data.merge,
    }


def _training(data: RunData) -> dict[str, Any]:
    steps = data.steps
    swept = [step.moved_bytes for step in steps if not step.skipped]
    return {
        "steps": len(steps),
        "tokens": steps[-1].tokens if steps else 0,
        "seconds": sum(step.seconds for step in steps),
        "final_loss": next((step.loss for step in reversed(steps) if step.loss is not None), None),
        "best_eval_loss": min((step.eval_loss for step in steps if step.eval_loss is not None), default=None),
        "skipped_steps": sum(step.skipped for step in steps),
        "moved_bytes_per_step": sum(swept) / len(swept) if swept else 0,
        "least_moved_bytes_per_step": sum(data.plan.get("moved", {}).values()) if data.plan else None,
    }


def _phases(data: RunData) -> dict[str, Any]:
    """Every phase that was planned or has run, in that order."""
    predicted = data.plan["peak"] if data.plan else {}
    measured = data.usage["phases"] if data.usage else {}
    phases = {}
    for name in dict.fromkeys([*predicted, *measured]):
        plan, usage = predicted.get(name, {}), measured.get(name, {})
        host_bytes, device_bytes = usage.get("peak_host_anonymous_bytes"), usage.get("peak_device_bytes")
        phases[name] = {
            "seconds": usage.get("seconds"),
            "host_anonymous": {"predicted_bytes": plan.get("host_bytes"), "measured_bytes": host_bytes},
            "device": None
            if device_bytes is None
            else {"predicted_bytes": plan.get("device_bytes"), "measured_bytes": device_bytes},
        }
    return phases


def _highest(phases: dict[str, Any], memory: str) -> dict[str, int | None]:
    peaks = [phase[memory] for phase in phases.values() if phase[memory]]
    return {
        key: max((peak[key] for peak in peaks if peak[key] is not None), default=None)
        for key in ("predicted_bytes", "measured_bytes")
    }


def _png(data: RunData, name: str) -> bytes:
    image = io.BytesIO()
    PLOTS[name](data).savefig(image, format="png", dpi=PLOT_DPI)
    return image.getvalue()


def _write_image(path: Path, image: bytes) -> None:
    temporary = temporary_beside(path)
    with said_plainly(path):
        path.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(image)
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
