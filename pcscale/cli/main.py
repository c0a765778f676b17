"""`pcscale`: one subcommand per job. Every subcommand imports what it needs when it runs."""

import atexit
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pcscale.cli import calibrate, compare, compress, demo, evaluate, merge, plan, recipes, report, teach, verify

_UsageError: Any = typer.BadParameter.__base__  # Click's own, wherever this version of typer keeps it.


class _PlainGroup(TyperGroup):
    """A group of subcommands that reports a wrong flag or argument in one line, as any other error."""

    def main(self, *positional: Any, **named: Any) -> Any:
        if not named.get("args", sys.argv[1:]):
            return super().main(*positional, **named)  # The help.
        try:
            exit_code = super().main(*positional, **(named | {"standalone_mode": False}))
        except _UsageError as error:
            command_path = error.ctx.command_path if error.ctx else "pcscale"
            message = error.format_message().rstrip(".")
            print(f"pcscale: {message}. `{command_path} --help` lists what there is.", file=sys.stderr)
            sys.exit(2)
        sys.exit(exit_code or 0)


app = typer.Typer(
    cls=_PlainGroup,
    name="pcscale",
    help="Projected Compression of large language models to ordinary smaller ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (plan, compress, demo, calibrate, teach, merge, evaluate, verify, report, compare, recipes):
    app.command(module.__name__.rpartition(".")[2])(module.main)


@app.callback()
def _accept_launcher(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    # DeepSpeed's launcher passes it here and in the environment, which is where it is read.
    del local_rank


def run() -> None:
    # Torch reads it when it first allocates: a fresh tensor of some megabytes then costs a quarter of the page faults'
    # time (docs/decisions/0011). Linux only; elsewhere nobody reads it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Arrow, which reads text, would reserve a GiB by an allocator of its own, all of it against RLIMIT_DATA.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        app(prog_name="pcscale")
    except SystemExit as done:
        if "pcscale.distributed.group" in sys.modules:
            _leave(done.code)
        raise


def _leave(code: Any) -> None:
    """End a process of several, whose work is done, without taking the interpreter apart.

    gloo's threads live on, since nothing makes DeepSpeed let go of its groups; one that asks for an interpreter that is
    being taken apart aborts the process.
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
