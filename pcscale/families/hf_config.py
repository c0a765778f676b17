"""config.json files: the base's, and the compressed model's made from it."""

import copy
from pathlib import Path

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.families.spec import Config, head_dim_of

CONFIG_NAME = "config.json"


def read_config(folder: Path) -> Config:
    """The parsed config.json of a checkpoint folder.

    Raises:
        RequestError: there is none, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder. Name a checkpoint folder or a Hub id.")
    if not (folder / CONFIG_NAME).exists():
        raise RequestError(f"{folder} has no {CONFIG_NAME}. Name a folder with a Hugging Face checkpoint.")
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict):
        raise RequestError(f"{folder / CONFIG_NAME} holds no JSON object. Restore the file.")
    return config


def compressed_config(base: Config, hidden_size: int, intermediate_size: int) -> Config:
    """The base's config at new widths. Everything else, RoPE scaling included, is the base's own."""
    # Heads keep their size, so it can no longer be derived from the hidden size.
    sizes = {"head_dim": head_dim_of(base), "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    config = copy.deepcopy(base) | sizes
    config.pop("_name_or_path", None)
    return config


def stored_dtype(config: Config) -> str:
    """The dtype that the config names: `dtype`, or `torch_dtype` in older files; float32 where it has neither."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
