"""`pcscale compress`: the whole job."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pcscale.cli.common import Result, command, print_table
from pcscale.config.help import settings_help


@command
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder; begin one where there is none.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check base, data, widths and output; print the plan; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run also what is predicted not to fit.")] = False,
) -> Result:
    """Plan, calibrate, train, merge, evaluate and report, into one run folder."""
    from pcscale.config.load import load_run_config
    from pcscale.jobs.compress import compress
    from pcscale.jobs.processes import reported_once

    config = reported_once(lambda: load_run_config(run, overrides or []))
    report = compress(config, resume=resume, dry_run=dry_run, force=force)
    return Result(report, lambda: print_plan(report) if dry_run else print_outcome(report))


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a run would do."""
    compressed = plan["compressed"]
    print(
        f"would compress to {compressed['parameters']:,} parameters ({compressed['keep_fraction']:.1%}), "
        f"hidden {compressed['hidden_size']}, ffn {compressed['intermediate_size']}; nothing was written"
    )


def print_outcome(report: dict[str, Any]) -> None:
    """Print the table base / start / compressed, and where everything lies."""
    from pcscale.common.units import format_bytes
    from pcscale.reporting.table import comparison_rows

    print_table("Held-out text (loss in nats a token)", *comparison_rows(report["evaluation"]))
    host = report["peak"]["host_anonymous"]["measured_bytes"]
    print(f"peak anonymous host memory {format_bytes(host)}")
    print(f"model:  {report['merge']['output']}")
    print(f"report: {Path(report['run']) / 'report.html'}")


main.__doc__ = f"{main.__doc__}\n\n{settings_help()}"
