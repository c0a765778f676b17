"""`pcscale demo`: the whole job on a real model that a package carries."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json


@command
def main(
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compress SmolLM2-135M to about half, in minutes on two processor cores. Goes on where it was interrupted."""
    from pcscale.cli.compress import print_outcome
    from pcscale.jobs.demo import run_demo

    report, sample = run_demo(output)
    if json:
        print_json(report)
    else:
        print_outcome(report)
        print(f"\n{sample['prompt']} >>> {sample['compressed']}")
