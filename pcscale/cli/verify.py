"""`pcscale verify`: is what a run left behind what it claims to be?"""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table


@command
def main(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare merged with live logits and a streamed with an in-memory step; hash checkpoint and base again."""
    from pcscale.jobs.verify import verify

    result = verify(run)
    if json:
        print_json(result)
    else:
        print_table(f"{run}: verified", ["check", "found", "allowed"], result["rows"])
    if not result["passed"]:
        raise typer.Exit(1)
