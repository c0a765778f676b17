"""`pcscale report`: report.html, report.json and plots of a run."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may still be under way.")],
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the run's report anew."""
    from pcscale.reporting.report import write_report

    report = write_report(run)
    if json:
        print_json(report)
    else:
        print(run / "report.html")
