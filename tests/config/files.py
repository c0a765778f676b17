"""run.yaml files of tests, and what is said of those that are refused."""

import re
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.config.load import load_run_config
from pcscale.config.schema import RunConfig

NEEDED = "base: some/base\noutput: runs/one\ndata:\n  train: [text.txt]\n"


def yaml_file(folder: Path, more: str = "", needed: str = NEEDED) -> Path:
    path = folder / "run.yaml"
    path.write_text(needed + more, encoding="utf-8")
    return path


def load(folder: Path, more: str = "", *overrides: str) -> RunConfig:
    return load_run_config(yaml_file(folder, more), overrides)


def refusal(folder: Path, more: str = "", *overrides: str, needed: str = NEEDED) -> str:
    """The message, without the file's name in front."""
    path = yaml_file(folder, more, needed)
    with pytest.raises(RequestError, match=re.escape(str(path))) as error:
        load_run_config(path, overrides)
    return str(error.value).removeprefix(f"{path}: ")
