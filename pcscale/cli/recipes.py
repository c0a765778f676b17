"""`pcscale recipes`: the files to start from that come with the package, listed and copied."""

from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command

_SUFFIXES = (".yaml", ".sh")


@command
def main(
    name: Annotated[str | None, typer.Argument(help="The recipe to copy; absent: list all.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; never replaces one. Absent: the recipe's own name, in this folder."),
    ] = None,
) -> Result:
    """List the run.yaml files and scripts to start from, or copy one of them."""
    from pcscale.common.errors import RequestError
    from pcscale.common.files import write_text
    from pcscale.config.files import RECIPES_FOLDER, packaged_files

    recipes = packaged_files(RECIPES_FOLDER, *_SUFFIXES)
    if name is None:
        if output is not None:
            raise RequestError("--output needs the name of a recipe. `pcscale recipes` lists them.")
        summaries = {known: _summary(path) for known, path in recipes.items()}
        lines = [f"{known:<{max(map(len, summaries))}}  {text}" for known, text in summaries.items()]
        listed = [{"name": known, "summary": text} for known, text in summaries.items()]
        return Result({"recipes": listed}, lambda: print(*lines, sep="\n"))
    if name not in recipes:
        raise RequestError(f"there is no recipe '{name}'. Choose among {', '.join(recipes)}.")
    target = output or Path(recipes[name].name)
    if target.exists():
        raise RequestError(f"{target} exists already. Name another file with --output, or remove it.")
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} does not exist. Name a file in a folder that does.")
    write_text(target, recipes[name].read_text(encoding="utf-8"))
    document = {"recipe": name, "output": str(target)}
    return Result(document, lambda: print(f"{target}: change what differs for you, then use it."))


def _summary(path: Path) -> str:
    """The first comment of a recipe, a shell's first line apart."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))
