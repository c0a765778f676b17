"""Run folders that have got more or less far."""

from pathlib import Path

import pytest

from pcscale.config.load import dump_run_config
from pcscale.config.schema import DataConfig, RunConfig
from tests.reporting.run_folder import EVALUATION, MERGE, PLAN, STEPS, USAGE, metrics, write_document, write_metrics


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run that has written its settings and its first steps, and nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig(base="acme/tiny-llm", output="run", data=DataConfig(train=["text.txt"]), max_steps=STEPS)
    (run / "run.yaml").write_text(dump_run_config(config), encoding="utf-8")
    write_metrics(run, metrics(STEPS))
    return run


@pytest.fixture
def run(bare_run: Path) -> Path:
    """A finished run."""
    for name, document in (("plan", PLAN), ("evaluation", EVALUATION), ("merge", MERGE), ("usage", USAGE)):
        write_document(bare_run, f"{name}.json", document)
    return bare_run
