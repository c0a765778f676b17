"""Fixtures that many tests share."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from pcscale.common.console import console
from tests.tiny import build_base


def pytest_configure(config: pytest.Config) -> None:
    # TensorReader's views of mapped files are read-only by contract, and torch warns of such buffers once per process.
    # The reader's own filter is undone by pytest, which restores the filters around every test.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable:UserWarning")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """`tiny_base(family, tied)`: the folder of `build_base`, written once a session. Copy it to change it."""

    @cache
    def build(family: str = "llama", tied: bool = True) -> Path:
        return build_base(tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}"), family, tied)

    return build


@pytest.fixture(autouse=True)
def silent_console() -> Iterator[None]:
    """A command turns the console on, onto streams that are gone after it."""
    yield
    console.configure(quiet=True)
