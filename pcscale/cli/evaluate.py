"""`pcscale evaluate`: held-out loss and downstream tasks of a model, beside its base's."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command, option, print_table

_TEXT = "Held-out text"
_TASKS = "Downstream tasks, run by lm_eval (the extra eval)"
_DATA_HELP = "Text: files, globs or a Hub data set id; may be repeated."
_TASKS_HELP = "Tasks of lm_eval, with commas between; paper: the nine of the method's authors."
_SHOTS_HELP = "Solved examples in a prompt; absent: the task's own number, else 0."


@command
def main(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    base: Annotated[str | None, option(None, "The base to show beside it: folder or Hub id.")] = None,
    batch_size: Annotated[int, option(None, "Sequences at a time.", min=1)] = 4,
    data: Annotated[list[str] | None, option(_TEXT, _DATA_HELP)] = None,
    tokens: Annotated[int, option(_TEXT, "At most so many tokens of text.")] = 65_536,
    sequence_length: Annotated[int, option(_TEXT, "Tokens of a sequence.")] = 512,
    tasks: Annotated[list[str] | None, option(_TASKS, _TASKS_HELP)] = None,
    num_fewshot: Annotated[int | None, option(_TASKS, _SHOTS_HELP)] = None,
    limit: Annotated[int | None, option(_TASKS, "At most so many documents of a task: to try it.")] = None,
) -> Result:
    """Measure perplexity, bits per byte, size and speed of a model on text, and accuracy on tasks, beside its base."""
    from pcscale.common.errors import RequestError
    from pcscale.config.load import check_settings
    from pcscale.config.schema import EvaluateSettings
    from pcscale.evaluation.tasks import TaskRequest, task_names
    from pcscale.jobs.evaluate import evaluate
    from pcscale.reporting.table import comparison_rows, task_rows

    if not data and not tasks:
        raise RequestError("there is nothing to evaluate on. Name text with --data, tasks with --tasks, or both.")
    values = {"data": data, "tokens": tokens, "sequence_length": sequence_length, "batch_size": batch_size}
    text = check_settings(EvaluateSettings, values, "evaluate") if data else None
    request = TaskRequest(task_names(tasks), num_fewshot, limit, batch_size) if tasks else None
    result = evaluate(model, base, text, request)

    def show() -> None:
        models = {"compressed": result, **({"base": result["base"]} if base else {})}
        if text:
            print_table("Held-out text (loss in nats a token)", *comparison_rows(models))
        if request:
            print_table("Downstream tasks", *task_rows(models))

    return Result(result, show)
