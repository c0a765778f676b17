"""Fixtures of tiny runs: none, one that was killed, one that was not."""

import shutil
from pathlib import Path

import pytest

from pcscale.jobs.compress import compress
from tests.children import run_killed
from tests.runs import (
    World,
    config,
    light_runs,
    no_plots,
    report_without_plots,
    run,
    run_config,
    world,
)

__all__ = ["config", "light_runs", "no_plots", "run", "world"]


@pytest.fixture(scope="package")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps without a stop."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
        compress(run_config(world, run))
    return run


@pytest.fixture(scope="package")
def half_way(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in step 7, after its checkpoint of step 4. Copy it to go on with it."""
    run = tmp_path_factory.mktemp("half-way") / "run"
    run_killed(world, run, "pcscale.training.loop:training_step", 7)
    return run


@pytest.fixture
def stopped(half_way: Path, run: Path) -> Path:
    """A copy of the killed run, whose run.yaml names its new place."""
    shutil.copytree(half_way, run)
    settings = run / "run.yaml"
    settings.write_text(settings.read_text().replace(str(half_way), str(run)))
    return run
