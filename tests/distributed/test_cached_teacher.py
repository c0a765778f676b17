"""Ranks that are taught from one folder: each finds its own sequences, and all stop where some are missing."""

from pathlib import Path

import pytest

from tests.children import wait
from tests.distributed.ranks import start_ranks
from tests.distributed.test_resume import TOLERANCE, begin, losses
from tests.jobs.teaching import TAUGHT, teach
from tests.runs import World, run_values, write_yaml


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "taught"
    teach(world, folder)
    return folder


@pytest.mark.parametrize("file", ["zero1.json", "zero3_offload_cpu.json"])
def test_two_ranks_are_taught_as_one_process_is(file: str, world: World, whole: Path, tmp_path: Path) -> None:
    distill, runs = {**TAUGHT, "cache": str(whole)}, [tmp_path / name / "run" for name in ("one", "two")]
    for run, form in zip(runs, ((1, None), (2, file)), strict=True):
        run.parent.mkdir()
        assert set(begin(world, run, form, distill=distill)) == {0}, (run.parent / "logs" / "0").read_text()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=TOLERANCE)


def test_what_is_missing_is_said_once_with_the_command_for_all_ranks(
    world: World, whole: Path, run: Path, tmp_path: Path
) -> None:
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 10}
    (tmp_path / "stage0.json").write_text("{}")
    values = run_values(world, run, distill={**TAUGHT, "cache": str(whole)}, **batch)
    yaml = write_yaml(tmp_path / "run.yaml", {**values, "deepspeed": str(tmp_path / "stage0.json")})
    logs = tmp_path / "logs"
    assert [wait(process) for process in start_ranks(2, ["compress", yaml], logs)] == [2, 2]
    said = [line for name in "01" for line in (logs / name).read_text().splitlines() if line.startswith("pcscale: ")]
    assert said == [
        f"pcscale: distill.cache {whole} lacks 40 of the 80 sequences that this run trains on. "
        f"Add them: pcscale teach {run / 'run.yaml'} --tokens 1920"
    ]
