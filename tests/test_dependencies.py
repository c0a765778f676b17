"""Declared dependencies and imported packages are the same."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PACKAGES = {"yaml": "pyyaml"}
"""Names to install, where they are not those to import."""
_ON_REQUEST = {"wandb"}
"""Packages that a setting asks for (`report_to`)."""


def _imported() -> Iterator[str]:
    for path in (ROOT / "pcscale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield node.module.partition(".")[0]


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", text)[0].replace("-", "_") for text in requirements}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    third_party = set(_imported()) - sys.stdlib_module_names - {"pcscale"}
    imported = {_PACKAGES.get(name, name) for name in third_party} - _ON_REQUEST
    needed, extras = _names(project["dependencies"]), project["optional-dependencies"]
    optional = _names([*extras["demo"], *extras["deepspeed"], *extras["eval"]])
    assert needed <= imported <= needed | optional


def test_every_declared_package_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = _names([*project["dependencies"], *chain(*project["optional-dependencies"].values())]) - {"pcscale"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().split()
    assert {name.lower() for name in declared} <= _names(pins)
