"""A base model by its name: a local checkpoint folder, or a Hub id that is fetched once into the Hub's own cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from pcscale.common.errors import RequestError, one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FETCHED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class BaseFolder:
    """A base model on this machine."""

    folder: Path
    name: str
    """The name that the user gave."""
    revision: str | None
    """The Hub's commit; None: a local folder."""


def resolve_base(name: str, revision: str | None = None, config_only: bool = False) -> BaseFolder:
    """The folder of a base model, fetched from the Hub where `name` is an id.

    Args:
        revision: the Hub's commit; None: the newest.
        config_only: config.json is enough; weights are used where they are there already.

    Raises:
        RequestError: there is no such folder, and the name is no Hub id or cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.exists() or not _HUB_ID.fullmatch(name):
        if not folder.is_dir():
            raise RequestError(f"{name} is neither a checkpoint folder nor a Hub id. Check the path.")
        return BaseFolder(folder, name, None)
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if config_only else _FETCHED
    try:
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # The client raises its own and its HTTP library's exceptions.
        reason = one_line(error)
        raise RequestError(f"{name} is no local folder and could not be fetched from the Hub: {reason}") from None
    return BaseFolder(fetched, name, fetched.name)
