"""report.html, report.json and plots of a run. The page is one file without scripts that refers to nothing outside."""

import base64
import inspect
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pcscale.common.files import readable_os_errors, write_bytes, write_json, write_text
from pcscale.common.units import format_bytes, format_count, format_seconds, short_name
from pcscale.reporting import table
from pcscale.reporting.drawing import png
from pcscale.reporting.plots import CURVES, PLOTS, figures
from pcscale.reporting.summary import difference, summarize
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
    with readable_os_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    for name in PLOTS:
        path = folder.plots / f"{name}.png"
        if name in images:
            write_bytes(path, images[name])
        else:
            path.unlink(missing_ok=True)
    write_text(folder.page, _render_page(record, report, images))
    write_json(folder.report, report)
    return report


def _render_page(record: RunRecord, report: dict[str, Any], images: dict[str, bytes]) -> str:
    """The whole of report.html, from `report.html.j2`."""
    environment = Environment(
        loader=PackageLoader("pcscale.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "seconds": format_seconds,
        "number": "{:,}".format,
        "short": "{:.3f}".format,
        "signed": table.format_difference,
        "percent": table.format_percent,
    }
    return environment.get_template("report.html.j2").render(
        record=record,
        plan=record.plan,
        report=report,
        training=report["training"],
        base=short_name(record.plan["base"]["name"] if record.plan else record.config.base),
        losses={name: model.loss for name, model in record.evaluation.models.items()},
        comparison=table.comparison_rows(report["evaluation"]),
        difference=difference,
        plots={name: base64.b64encode(image).decode() for name, image in images.items()},
        captions={name: inspect.getdoc(plot) for name, plot in PLOTS.items()},
        curves=[name for name in CURVES if name in images],
        tables=table.memory_tables(report),
        planned=table.plan_rows(record.plan) if record.plan else None,
    )
