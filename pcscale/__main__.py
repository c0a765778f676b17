"""`python -m pcscale`."""

from pcscale.cli.main import run

run()
