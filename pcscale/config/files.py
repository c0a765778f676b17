"""Files that come with the package: recipes to start from and DeepSpeed files, found by name. Needs no torch."""

from importlib.resources import files
from pathlib import Path

from pcscale.common.errors import RequestError

DEEPSPEED_FOLDER = "deepspeed_configs"
RECIPES_FOLDER = "recipes"


def packaged_files(folder: str, *suffixes: str) -> dict[str, Path]:
    """The files of one of the package's data folders that end in one of the suffixes: name without suffix → path."""
    paths = (Path(str(entry)) for entry in (files("pcscale") / folder).iterdir())
    return {path.stem: path for path in sorted(paths) if path.suffix in suffixes}


def resolve_deepspeed(name_or_path: str) -> Path:
    """The DeepSpeed file that a run names: a path, or else the name of a file that comes with pcscale.

    Raises:
        RequestError: there is neither such a file nor such a name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    packaged = packaged_files(DEEPSPEED_FOLDER, ".json")
    if name_or_path not in packaged:
        raise RequestError(
            f"deepspeed: {name_or_path} does not exist. Name a file, or one that comes with pcscale: "
            f"{', '.join(packaged)}."
        )
    return packaged[name_or_path]
