"""A rank that fails ends all of them: its error is said once, nobody hangs, and the last checkpoint is whole."""

import functools
import json
import signal
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.children import Prepare, kill_itself, wait
from tests.distributed.ranks import start_ranks
from tests.runs import World, curve, metrics, run_values, write_yaml

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
EXIT_SECONDS = 60
"""What a rank may take to notice that another is gone."""


def begin(
    run: Path, values: dict[str, Any], *flags: str, prepare: Mapping[int, Prepare] | None = None
) -> tuple[list[int], list[str]]:
    """The exit codes and the output of two ranks, by rank."""
    yaml, logs = write_yaml(run.parent / "run.yaml", values), run.parent / "logs"
    processes = start_ranks(2, ["compress", yaml, *flags], logs, prepare)
    codes = [wait(process) for process in processes]
    return codes, [(logs / str(rank)).read_text() for rank in range(2)]


@pytest.fixture
def values(world: World, run: Path) -> dict[str, Any]:
    return run_values(world, run, deepspeed=str(CONFIGS / "zero3_offload_cpu.json"), per_device_train_batch_size=1)


def said(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("pcscale: ")]


def failing(target: str, message: str) -> Prepare:
    """The process has this function (`module:name`) fail."""
    return functools.partial(_replace, target, message)


def _replace(target: str, message: str) -> None:
    from pcscale.common.errors import RunError

    module_name, _, name = target.partition(":")

    def fail(*positional: Any, **named: Any) -> None:
        raise RunError(message)

    setattr(import_module(module_name), name, fail)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_when_a_rank_is_killed_and_the_run_goes_on(
    killed: int, values: dict[str, Any], run: Path
) -> None:
    yaml, logs = write_yaml(run.parent / "run.yaml", values), run.parent / "logs"
    victim = kill_itself("pcscale.distributed.engine:DeepSpeedEngine.publish", 60)
    processes = start_ranks(2, ["compress", yaml], logs, {killed: victim})
    assert wait(processes[killed]) == -signal.SIGKILL
    gone = time.monotonic()
    assert wait(processes[1 - killed]) == 1
    assert time.monotonic() - gone < EXIT_SECONDS
    other = (logs / str(1 - killed)).read_text()
    assert len(said(other)) == (killed == 1), other
    step = metrics(run)[-1]["step"]
    assert 4 <= step < 10, "killed after a checkpoint, before the end"

    codes, texts = begin(run, values, "--resume")
    assert codes == [0, 0], texts
    assert "resuming at step 4" in texts[0]
    assert [row["step"] for row in curve(run)] == list(range(1, 11))


def test_a_request_that_all_ranks_find_wrong_is_refused_once(values: dict[str, Any], run: Path) -> None:
    codes, texts = begin(run, values | {"learning_rte": 1e-3})
    assert codes == [2, 2]
    assert len(said(texts[0])) == 1
    assert "learning_rte" in texts[0]
    assert texts[1] == ""
    assert not run.exists()


def test_a_file_that_deepspeed_refuses_is_refused_once_before_any_work(values: dict[str, Any], run: Path) -> None:
    file = run.parent / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "mars"}}}))
    codes, texts = begin(run, values | {"deepspeed": str(file)})
    assert codes == [2, 2]
    assert len(said(texts[0])) == 1
    assert "deepspeed.json: DeepSpeed refuses it" in texts[0]
    assert "'mars'" in texts[0]
    assert texts[1] == ""
    assert not run.exists()


def test_ranks_without_a_deepspeed_file_are_refused(values: dict[str, Any], run: Path) -> None:
    codes, texts = begin(run, {key: value for key, value in values.items() if key != "deepspeed"})
    assert codes == [2, 2]
    assert said(texts[0]) == [
        "pcscale: started on 2 processes, and run.yaml names no DeepSpeed file. Set deepspeed, for instance to zero1."
    ]
    assert texts[1] == ""


@pytest.mark.parametrize("failed", [0, 1])
def test_what_one_rank_finds_wrong_it_says_and_all_end(failed: int, values: dict[str, Any], run: Path) -> None:
    prepare = {failed: failing("pcscale.jobs.build:build_optimizer", "no room for records")}
    codes, texts = begin(run, values, prepare=prepare)
    assert codes == [1, 1]
    assert said(texts[failed]) == ["pcscale: no room for records"]
    assert said(texts[1 - failed]) == []


def test_a_step_that_fails_on_one_rank_ends_all(values: dict[str, Any], run: Path) -> None:
    prepare = {1: failing("pcscale.projection.sweep:update", "the disk is full")}
    codes, texts = begin(run, values, prepare=prepare)
    assert codes == [1, 1]
    assert said(texts[1]) == ["pcscale: the disk is full"]
    assert said(texts[0]) == [
        "pcscale: another process of the run has ended. Go on from the last checkpoint with --resume."
    ]


def test_only_the_first_rank_prints(values: dict[str, Any], run: Path) -> None:
    codes, texts = begin(run, values | {"bf16": True, "deepspeed": str(write_stage_0(run.parent))})
    assert codes == [0, 0], texts
    assert texts[1] == ""
    assert "bf16 at ZeRO stage 0 runs as stage 1" in texts[0]
    # What it prints last is the one document of --json.
    assert json.loads(texts[0][texts[0].index("\n{") :])["evaluation"].keys() >= {"base", "start", "compressed"}


def write_stage_0(folder: Path) -> Path:
    path = folder / "stage0.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return path
