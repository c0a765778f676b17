"""The contract that all subcommands share: their flags, how a result is shown, and how an error ends the command."""

import functools
import inspect
import json as json_format
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from pcscale.common.console import console
from pcscale.common.errors import PcscaleError, PeerFailed

_GRACE_SECONDS = 2.0
_FLAGS = {
    "json": "Print one JSON document on standard output.",
    "quiet": "No progress and no messages.",
    "debug": "Show a traceback where something fails.",
}


class Result(NamedTuple):
    """The outcome of a subcommand.

    Attributes:
        document: the JSON document that `--json` prints.
        show: prints the result for people instead.
    """

    document: Any
    show: Callable[[], None]
    exit_code: int = 0


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """Make a subcommand of a function: give it the shared flags, print its result, turn errors into a line each."""

    @functools.wraps(function)
    def wrapped(json: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
        console.configure(quiet)
        # Accelerate imports DeepSpeed where it is installed, which then logs to standard output.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
        try:
            result = function(**arguments)
            if json:
                print(json_format.dumps(result.document, indent=2, ensure_ascii=False, allow_nan=False))
            else:
                result.show()
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except PeerFailed as error:
            # A launcher ends all processes when the first one exits: those that have something to say go first.
            time.sleep(_GRACE_SECONDS)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, PcscaleError):
                _fail(str(error), error.exit_code)
            reason = " ".join(str(error).split())[:300]
            _fail(f"unexpected {type(error).__name__}: {reason} (--debug shows where)", 1)
        if result.exit_code:
            raise typer.Exit(result.exit_code)

    parameters = list(inspect.signature(function).parameters.values())
    for name, text in _FLAGS.items():
        kind = Annotated[bool, option("Output", text, f"--{name}")]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind))
    vars(wrapped)["__signature__"] = inspect.Signature(parameters)  # Typer makes the flags of it.
    return wrapped


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """A flag with its help, which stands in a panel of its own where one is named."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"pcscale: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table for people on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Plain enough for the eight columns of the largest table to fit a terminal of eighty.
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A file has no width of its own; a table cut to 80 columns would lose its figures.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140).print(table)
