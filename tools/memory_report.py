"""The memory of a run, predicted beside measured: its tables on the terminal, and the run's report anew."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may still be under way.")],
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Print what a run's memory was predicted and measured to be; write its report anew."""
    from pcscale.reporting.memory_tables import MEMORY_KEYS, memory_tables
    from pcscale.reporting.report import write_report

    report = write_report(run)
    if json:
        print_json({key: report[key] for key in MEMORY_KEYS})
        return
    for title, table in memory_tables(report).items():
        print_table(title, *table)


if __name__ == "__main__":
    typer.run(main)
