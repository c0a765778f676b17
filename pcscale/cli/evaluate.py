"""`pcscale evaluate`: held-out loss of a model, beside its base's."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table


@command
def main(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    data: Annotated[list[str], typer.Option(help="Text: files, globs or a Hub data set id; may be repeated.")],
    base: Annotated[str | None, typer.Option(help="The base to show beside it: folder or Hub id.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of text.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Perplexity, bits per byte, size and speed, on the same tokens for model and base."""
    from pcscale.config.load import check_values
    from pcscale.reporting.table import comparison_rows
    from pcscale.training.jobs import evaluate

    values = {
        "base": base or str(model),
        "output": str(model),
        "data": {"train": data},
        "eval_tokens": tokens,
        "sequence_length": sequence_length,
        "per_device_train_batch_size": batch_size,
    }
    result = evaluate(model, base, check_values(values, "evaluate"))
    if json:
        print_json(result)
    else:
        rows = {"compressed": {key: value for key, value in result.items() if key != "base"}}
        print_table(
            "Held-out text (loss in nats a token)", *comparison_rows(rows | ({"base": result["base"]} if base else {}))
        )
