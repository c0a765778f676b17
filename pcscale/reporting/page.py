"""The page of a run, rendered from `report.html.j2`: one file, no script, nothing fetched."""

import base64
import inspect
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pcscale.common.units import format_bytes, format_count, format_seconds, short_name
from pcscale.reporting import table
from pcscale.reporting.plots import CURVES, PLOTS
from pcscale.reporting.side_by_side import difference
from pcscale.run.record import RunRecord


def render_page(record: RunRecord, report: dict[str, Any], images: dict[str, bytes]) -> str:
    """The whole of report.html.

    Args:
        report: the contents of report.json.
        images: the plots as PNG, by their names in `PLOTS`; those that there is nothing for are absent.
    """
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
