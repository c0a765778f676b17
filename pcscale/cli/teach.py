"""`pcscale teach`: teacher targets of a text, kept for every run that learns from them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcscale.cli.common import Result, command, option

if TYPE_CHECKING:
    from pcscale.config.schema import PlanConfig

_DEFAULT_TOP_K = 64
_SETTINGS = "Settings: what a run.yaml says, or instead of it"
_SOURCE_HELP = "A run's settings, or a base: checkpoint folder or Hub id."
_OVERRIDES_HELP = "Settings that override the file's."
_DATA_HELP = "Text: files, globs or a Hub data set id; may be repeated."
_TOKENS_HELP = "How much of the text, from its beginning; what one process would train on."


@command
def main(
    source: Annotated[str, typer.Argument(metavar="RUN.yaml|BASE", help=_SOURCE_HELP)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=_OVERRIDES_HELP)] = None,
    data: Annotated[list[str] | None, option(_SETTINGS, _DATA_HELP)] = None,
    output: Annotated[Path | None, option(_SETTINGS, "The folder to fill, or to add to (distill.cache).")] = None,
    top_k: Annotated[int | None, option(_SETTINGS, "Tokens to keep of each distribution (distill.top_k); 64.")] = None,
    temperature: Annotated[float | None, option(_SETTINGS, "Of the distillation (distill.temperature); 1.")] = None,
    sequence_length: Annotated[int | None, option(_SETTINGS, "Tokens of a sequence; 512.")] = None,
    tokens: Annotated[int | None, option(None, _TOKENS_HELP, min=1)] = None,
) -> Result:
    """Keep the base's most likely tokens for a text, so that runs on it learn without running the base.

    `compress` reads them where distill.cache names the folder. What is there already is not made again: an interrupted
    one goes on, and more text of the same base is added.
    """
    from pcscale.common.units import format_bytes
    from pcscale.jobs.teach import teach

    flags = {
        "sequence_length": sequence_length,
        "distill.cache": None if output is None else str(output),
        "distill.top_k": top_k,
        "distill.temperature": temperature,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    result = teach(*_settings(source, [*given, *(overrides or [])], data), tokens)
    text = (
        f"{result['output']}: {result['sequences']:,} sequences ({result['added']:,} new), {result['tokens']:,} "
        f"tokens, {format_bytes(result['bytes'])}, {result['bytes_per_token']:.1f} bytes a token"
    )
    return Result(result, lambda: print(text))


def _settings(source: str, overrides: list[str], data: list[str] | None) -> tuple["PlanConfig", list[str]]:
    """The settings of the teacher and its text: of a run.yaml, or of a base alone."""
    from pcscale.common.errors import RequestError
    from pcscale.config.load import apply_overrides, check_settings, check_values, read_values
    from pcscale.config.schema import PlanConfig

    of_run = Path(source).suffix in (".yaml", ".yml")
    values: dict[str, Any] = apply_overrides(read_values(Path(source)) if of_run else {"base": source}, overrides)
    if isinstance(values.get("distill"), dict):
        values["distill"].setdefault("top_k", _DEFAULT_TOP_K)
    if of_run:
        config = check_values(values | ({"data": {"train": data}} if data else {}), source)
        text = config.data.train
    elif data:
        config, text = check_settings(PlanConfig, values, "teach"), data
    else:
        raise RequestError(f"{source} is taken for a base, whose text is not known: give --data, or name a run.yaml.")
    if config.distill is None or config.distill.cache is None:
        raise RequestError("no folder to fill: give --output, or set distill.cache in run.yaml.")
    return config, text
