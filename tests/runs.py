"""Tiny runs: what the tests of training, of the command line and of the docs work on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pcscale.cli.main import app
from pcscale.config.load import check_values
from pcscale.config.schema import RunConfig
from pcscale.reporting.summary import summarize
from pcscale.run.folder import RunFolder
from pcscale.run.record import RunRecord
from tests.tiny import build_base, write_text


@dataclass(frozen=True)
class World:
    """A tiny base with its tokenizer, and text that a tiny model can learn from."""

    base: Path
    text: Path


def build_world(folder: Path) -> World:
    return World(build_base(folder / "base", tokenizer=True), write_text(folder / "text.txt", num_words=3000, seed=1))


def run_values(world: World, output: Path, **changes: Any) -> dict[str, Any]:
    """The run.yaml of ten steps in a third of a second."""
    return {
        "base": str(world.base),
        "output": str(output),
        "data": {"train": [str(world.text)]},
        "sequence_length": 24,
        "calibration_tokens": 480,
        "eval_tokens": 480,
        "start": "selection",
        "importance": "activation",
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 5,
        "eval_steps": 5,
        "save_steps": 4,
        **changes,
    }


def run_config(world: World, output: Path, **changes: Any) -> RunConfig:
    return check_values(run_values(world, output, **changes), "test")


def write_yaml(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """The rows without what no two runs share: their times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def merged_weights(run: Path) -> str:
    return snapshot(run / "merged")["model.safetensors"]


def saved_steps(run: Path) -> list[int]:
    return RunFolder(run).saved_steps()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".partial-*"))


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        return self.stderr.strip().splitlines()


def invoke(*arguments: str | Path) -> Outcome:
    """Run the command line in this process."""
    result = CliRunner(env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}).invoke(app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def refusal(*arguments: str | Path, exit_code: int = 2) -> str:
    """The text of an error that keeps the contract of all: its exit code, and one or two plain lines."""
    outcome = invoke(*arguments, "--quiet")
    assert outcome.exit_code == exit_code, outcome
    assert outcome.stdout == ""
    assert 1 <= len(outcome.error_lines) <= 2, outcome.stderr
    assert outcome.stderr.startswith("pcscale: ")
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.removeprefix("pcscale: ").strip()


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read only; build another to change it."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder to be."""
    return tmp_path / "run"


@pytest.fixture
def config(world: World, run: Path) -> Callable[..., RunConfig]:
    """`config(max_steps=3)`: the settings of a run into the folder `run`."""
    return lambda **changes: run_config(world, run, **changes)


def run_lightly() -> None:
    """A thread pool and a disk cost tiny runs more than all their work; what a power cut does is not tested here."""
    torch.set_num_threads(1)
    os.fsync = lambda handle: None


@pytest.fixture(scope="package", autouse=True)
def light_runs() -> Iterator[None]:
    """For one package of tests; the others keep their threads and their disk."""
    threads, sync = torch.get_num_threads(), os.fsync
    run_lightly()
    yield
    torch.set_num_threads(threads)
    os.fsync = sync


def report_without_plots(run: Path) -> dict[str, Any]:
    """Plots take longer than tiny runs."""
    return summarize(RunRecord.read(run))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
