"""`pcscale evaluate`: held-out loss and downstream tasks of a model, beside its base's."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table

_TEXT = "Held-out text"
_TASKS = "Downstream tasks, run by lm_eval (the extra eval)"

_Model = Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")]
_Base = Annotated[str | None, typer.Option(help="The base to show beside it: folder or Hub id.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
_Data = Annotated[
    list[str] | None,
    typer.Option(help="Text: files, globs or a Hub data set id; may be repeated.", rich_help_panel=_TEXT),
]
_Tokens = Annotated[int, typer.Option(help="At most so many tokens of text.", rich_help_panel=_TEXT)]
_SequenceLength = Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=_TEXT)]
_Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Tasks of lm_eval, with commas between; paper: the nine of the method's authors.", rich_help_panel=_TASKS
    ),
]
_NumFewshot = Annotated[
    int | None,
    typer.Option(help="Solved examples in a prompt; absent: the task's own number, else 0.", rich_help_panel=_TASKS),
]
_Limit = Annotated[
    int | None, typer.Option(help="At most so many documents of a task: to try it.", rich_help_panel=_TASKS)
]


@command
def main(
    model: _Model,
    base: _Base = None,
    batch_size: _BatchSize = 4,
    data: _Data = None,
    tokens: _Tokens = 65_536,
    sequence_length: _SequenceLength = 512,
    tasks: _Tasks = None,
    num_fewshot: _NumFewshot = None,
    limit: _Limit = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
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
    if json:
        print_json(result)
        return
    results = {"compressed": result, **({"base": result["base"]} if base else {})}
    if text:
        print_table("Held-out text (loss in nats a token)", *comparison_rows(results))
    if request:
        print_table("Downstream tasks", *task_rows(results))
