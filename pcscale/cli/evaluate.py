"""`pcscale evaluate`: held-out loss and downstream tasks of a model, beside its base's."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table

_TEXT = "Held-out text"
_TASKS = "Downstream tasks, run by lm_eval (the extra eval)"


@command
def main(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    base: Annotated[str | None, typer.Option(help="The base to show beside it: folder or Hub id.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 4,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, globs or a Hub data set id; may be repeated.", rich_help_panel=_TEXT),
    ] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of text.", rich_help_panel=_TEXT)] = 65_536,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=_TEXT)] = 512,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm_eval, with commas between; paper: the nine of the method's authors; "
            "or task files: ./my_task.yaml, ./folder.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Solved examples in a prompt; absent: the task's own number, else 0.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many documents of a task: to try it.", rich_help_panel=_TASKS),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Perplexity, bits per byte, size and speed on the same tokens, accuracy on the same tasks: of model and base."""
    from pcscale.common.errors import RequestError
    from pcscale.config.load import check_values
    from pcscale.evaluation.tasks import TaskRequest, task_specs
    from pcscale.jobs.evaluate import evaluate
    from pcscale.reporting.table import comparison_rows, task_rows

    if not data and not tasks:
        raise RequestError("there is nothing to evaluate on. Name text with --data, tasks with --tasks, or both.")
    values = {
        "base": base or str(model),
        "output": str(model),
        "data": {"train": data},
        "eval_tokens": tokens,
        "sequence_length": sequence_length,
        "per_device_train_batch_size": batch_size,
    }
    text = check_values(values, "evaluate") if data else None
    request = TaskRequest(task_specs(tasks), num_fewshot, limit, batch_size) if tasks else None
    result = evaluate(model, base, text, request)
    if json:
        print_json(result)
        return
    results = {"compressed": result, **({"base": result["base"]} if base else {})}
    if text:
        print_table("Held-out text (loss in nats a token)", *comparison_rows(results))
    if request:
        print_table("Downstream tasks", *task_rows(results))
