"""Fixtures of tiny runs, and one that is finished."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcscale.jobs.compress import compress
from pcscale.run.folder import RunFolder
from tests.runs import (
    World,
    config,
    leftovers,
    light_runs,
    no_plots,
    refusal,
    run,
    run_config,
    run_values,
    snapshot,
    world,
    write_yaml,
)

__all__ = ["config", "finished", "light_runs", "no_plots", "run", "world"]


@pytest.fixture(scope="package")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run. Read only; copy it to change it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    compress(run_config(world, run))
    return run


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    """A copy of the base, to be spoilt."""
    return Path(shutil.copytree(world.base, tmp_path / "base"))


@pytest.fixture
def refuse(world: World, base: Path, run: Path, tmp_path: Path) -> Callable[..., str]:
    """Ask for a run; returns why not, after a look at what is there now."""

    def ask(*overrides: str, exit_code: int = 2, **changes: Any) -> str:
        yaml = write_yaml(tmp_path / "run.yaml", run_values(World(base, world.text), run, **changes))
        before = snapshot(base)
        said = refusal("compress", yaml, *overrides, exit_code=exit_code)
        assert snapshot(base) == before
        assert _whole_parts(run) == []
        assert leftovers(tmp_path) == []
        return said

    return ask


def _whole_parts(run: Path) -> list[str]:
    """What a person would take for a result."""
    names = ("merged", "merge.json", "report.json", "report.html", "metrics.jsonl")
    if not run.is_dir():
        return []
    return [name for name in names if (run / name).exists()] + [str(step) for step in RunFolder(run).saved_steps()]
