"""`pcscale`: one subcommand per job. Every subcommand imports what it needs when it runs."""

import typer

from pcscale.cli import calibrate, compress, demo, evaluate, merge, plan, report, verify

app = typer.Typer(
    name="pcscale",
    help="Projected Compression of large language models to ordinary smaller ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, module in (
    ("plan", plan),
    ("compress", compress),
    ("demo", demo),
    ("calibrate", calibrate),
    ("merge", merge),
    ("evaluate", evaluate),
    ("verify", verify),
    ("report", report),
):
    app.command(name)(module.main)


def run() -> None:
    app(prog_name="pcscale")
