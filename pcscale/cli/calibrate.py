"""`pcscale calibrate`: importance scores and second moments."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command


@command
def main(
    base: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    data: Annotated[list[str], typer.Option(help="Text: files, globs or a Hub data set id; may be repeated.")],
    output: Annotated[Path, typer.Option(help="The file to write, such as scores.safetensors.")],
    importance: Annotated[str, typer.Option(help="energy, activation, magnitude or random.")] = "energy",
    tokens: Annotated[int, typer.Option(help="At most so many tokens of text.")] = 262_144,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of random scores.")] = 0,
) -> Result:
    """Score every channel of the base, reading each of its weights once."""
    from pcscale.config.load import check_settings
    from pcscale.config.schema import CalibrateSettings
    from pcscale.jobs.calibrate import calibrate

    files = {"base": base, "data": data, "output": str(output)}
    sizes = {"tokens": tokens, "sequence_length": sequence_length, "batch_size": batch_size}
    values = {**files, **sizes, "importance": importance, "seed": seed}
    result = calibrate(check_settings(CalibrateSettings, values, "calibrate"))
    text = f"{output}: {result['importance']} scores from {result['tokens']:,} tokens"
    return Result(result, lambda: print(text))
