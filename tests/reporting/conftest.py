"""Run folders that have got more or less far."""

from pathlib import Path

import pytest

from tests.reporting.run_folder import FINISHED, on_gpu, write_run


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run that has written its settings and its first steps, and nothing else."""
    return write_run(tmp_path / "run", {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on a machine without a GPU."""
    return write_run(tmp_path / "run", FINISHED)


@pytest.fixture
def gpu_run(tmp_path: Path) -> Path:
    """A finished run beside a GPU."""
    return write_run(tmp_path / "run", on_gpu())
