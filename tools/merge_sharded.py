"""The sharded merger as a script: the same arguments as `pcscale merge`."""

import typer

from pcscale.cli.merge import main

if __name__ == "__main__":
    typer.run(main)
