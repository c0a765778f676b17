"""`pcscale demo`: the whole job on a real model that a package carries."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command


@command
def main(
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> Result:
    """Compress SmolLM2-135M to about half, in minutes on two processor cores. Goes on where it was interrupted."""
    from pcscale.cli.compress import print_outcome
    from pcscale.jobs.demo import run_demo

    report, sample = run_demo(output)

    def show() -> None:
        print_outcome(report)
        print(f"\n{sample['prompt']} >>> {sample['compressed']}")

    return Result(report, show)
