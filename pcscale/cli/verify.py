"""`pcscale verify`: checks that a run's checkpoint and merged model are what they claim to be."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command, print_table


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
) -> Result:
    """Compare merged with live logits and a streamed with an in-memory step; hash checkpoint and base again."""
    from pcscale.jobs.verify import verify

    result = verify(run)
    columns = ["check", "found", "allowed"]
    return Result(
        result, lambda: print_table(f"{run}: verified", columns, result["rows"]), exit_code=0 if result["passed"] else 1
    )
