"""`pcscale compare`: finished runs side by side, as tables and as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command, print_table


@command
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN", help="Folders of finished runs, two or more.")],
    output: Annotated[Path, typer.Option(help="The PNG file to write; one that is there is replaced.")] = Path(
        "compare.png"
    ),
) -> Result:
    """Held-out loss by tokens and by time, peak memory, and the settings that differ.

    Differences are from the first run. The start counts as 0 tokens, 0 seconds.
    Equal tokens: the most that all runs were evaluated at or, where no evaluation
    meets another, the most that all have reached. Equal time: the longest
    training that all have reached. Between two evaluations the loss lies on a
    straight line. Seconds count steps, not evaluations and checkpoints. Losses
    are of the model in training, before merging rounds it to its dtype. Peak
    memory is the highest of the whole run.

    Runs must have the same tokenizer, sequence length, held-out text and training
    text; base, number of steps and all other settings may differ.
    """
    from pcscale.reporting.compare import write_comparison
    from pcscale.reporting.table import difference_rows, loss_rows, run_rows

    comparison = write_comparison(runs, output)

    def show() -> None:
        print_table("Runs", *run_rows(comparison))
        print_table("Held-out loss (nats a token)", *loss_rows(comparison))
        columns, rows = difference_rows(comparison)
        if rows:
            print_table("What differs", columns, rows)
        else:
            print("All settings are the same.")
        print(f"plot: {output}")

    return Result(comparison, show)
