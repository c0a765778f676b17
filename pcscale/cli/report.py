"""`pcscale report`: report.html, report.json and plots of a run."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may still be under way.")],
    memory: Annotated[
        bool, typer.Option("--memory", help="Print the memory of the run, predicted beside measured.")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the run's report anew."""
    from pcscale.reporting.report import write_report
    from pcscale.reporting.table import memory_tables
    from pcscale.run.folder import RunFolder

    report = write_report(run)
    if json:
        print_json(report)
        return
    if memory:
        for title, table in memory_tables(report).items():
            print_table(title, *table)
    print(RunFolder(run).page)
