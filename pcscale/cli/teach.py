"""`pcscale teach`: teacher targets of a text, kept for every run that learns from them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json

if TYPE_CHECKING:
    from pcscale.config.schema import PlanConfig

_DEFAULT_TOP_K = 64
_SETTINGS = "Settings: what a run.yaml says, or instead of it"


@command
def main(
    source: Annotated[
        str, typer.Argument(metavar="RUN.yaml|BASE", help="A run's settings, or a base: checkpoint folder or Hub id.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, globs or a Hub data set id; may be repeated.", rich_help_panel=_SETTINGS),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to fill, or to add to (distill.cache).", rich_help_panel=_SETTINGS),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Tokens to keep of each distribution (distill.top_k); 64.", rich_help_panel=_SETTINGS),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the distillation (distill.temperature); 1.", rich_help_panel=_SETTINGS)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; 512.", rich_help_panel=_SETTINGS)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="How much of the text, from its beginning; what one process would train on."),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Keep the base's most likely tokens for a text, so that runs on it learn without running the base.

    `compress` reads them where distill.cache names the folder. What is there already is not made again: an interrupted
    one goes on, and more text of the same base is added.
    """
    from pcscale.common.units import format_bytes
    from pcscale.jobs.teach import teach

    distill = {"cache": None if output is None else str(output), "top_k": top_k, "temperature": temperature}
    config, text = _settings(source, overrides or [], data, sequence_length, distill)
    result = teach(config, text, tokens)
    if json:
        print_json(result)
    else:
        print(
            f"{result['output']}: {result['sequences']:,} sequences ({result['added']:,} new), {result['tokens']:,} "
            f"tokens, {format_bytes(result['bytes'])}, {result['bytes_per_token']:.1f} bytes a token"
        )


def _settings(
    source: str, overrides: list[str], data: list[str] | None, sequence_length: int | None, distill: dict[str, Any]
) -> tuple["PlanConfig", list[str]]:
    """The settings of the teacher and its text: of a run.yaml, or of a base and the flags; flags win."""
    from pcscale.common.errors import RequestError
    from pcscale.config.load import apply_overrides, check_settings, check_values, read_values
    from pcscale.config.schema import PlanConfig

    of_run = Path(source).suffix in (".yaml", ".yml")
    values = apply_overrides(read_values(Path(source)) if of_run else {"base": source}, overrides)
    if sequence_length is not None:
        values["sequence_length"] = sequence_length
    found = {} if values.get("distill") is None else values["distill"]
    if isinstance(found, dict):
        given = ({key: value for key, value in each.items() if value is not None} for each in (found, distill))
        found = {"top_k": _DEFAULT_TOP_K} | next(given) | next(given)
        if "cache" not in found:
            raise RequestError("no folder to fill: give --output, or set distill.cache in run.yaml.")
        values["distill"] = found
    if of_run:
        config = check_values(values | ({"data": {"train": data}} if data else {}), source)
        return config, config.data.train
    if not data:
        raise RequestError(f"{source} is taken for a base, whose text is not known: give --data, or name a run.yaml.")
    return check_settings(PlanConfig, values, "teach"), data
