"""`pcscale report`: report.html, report.json and plots of a run."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command, print_table


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may still be under way.")],
    memory: Annotated[
        bool, typer.Option("--memory", help="Print the memory of the run, predicted beside measured.")
    ] = False,
) -> Result:
    """Write the run's report anew."""
    from pcscale.reporting.report import write_report
    from pcscale.reporting.table import memory_tables
    from pcscale.run.folder import RunFolder

    report = write_report(run)

    def show() -> None:
        for title, table in memory_tables(report).items() if memory else ():
            print_table(title, *table)
        print(RunFolder(run).page)

    return Result(report, show)
