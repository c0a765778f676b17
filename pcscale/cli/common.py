"""What every subcommand shares: its flags, its exit codes, and the one place where errors become text."""

import functools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pcscale.common.console import console
from pcscale.common.errors import PcscaleError, PeerFailed

_OUTPUT = "Output"
_GRACE_SECONDS = 2.0
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.", rich_help_panel=_OUTPUT)
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress and no messages.", rich_help_panel=_OUTPUT)]
DebugFlag = Annotated[
    bool, typer.Option("--debug", help="Show a traceback where something fails.", rich_help_panel=_OUTPUT)
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a subcommand the contract of all: quiet when told, errors in a line, the right exit code."""

    @functools.wraps(function)
    def wrapped(**arguments: Any) -> None:
        console.configure(quiet=arguments.get("quiet", False))
        # Accelerate imports DeepSpeed where it is installed, which then logs to standard output.
        logging.getLogger("DeepSpeed").addFilter(_is_serious)
        try:
            function(**arguments)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except typer.Exit:
            raise
        except PeerFailed as error:
            # A launcher ends all processes when the first one exits: those that have something to say go first.
            time.sleep(_GRACE_SECONDS)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if arguments.get("debug"):
                traceback.print_exc()
            if isinstance(error, PcscaleError):
                _fail(str(error), error.exit_code)
            reason = " ".join(str(error).split())[:300]
            _fail(f"unexpected {type(error).__name__}: {reason} (--debug shows where)", 1)

    return wrapped


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _fail(message: str, exit_code: int) -> None:
    print(f"pcscale: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


def print_json(document: Any) -> None:
    """The one document of `--json`."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A result for people, on standard output."""
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
