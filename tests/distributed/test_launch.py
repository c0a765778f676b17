"""Whole commands under the launchers that people use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merging.trained import REPOSITORY
from tests.runs import World, metrics, run_values, write_yaml

SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--standalone", "-m"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--module"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_the_whole_job(launcher: str, world: World, run: Path) -> None:
    values = run_values(world, run, per_device_train_batch_size=1, max_steps=2)
    yaml = write_yaml(run.parent / "run.yaml", values)
    program, *arguments = LAUNCHERS[launcher]
    command = [SCRIPTS / program, *arguments, "pcscale", "compress", yaml, "--json"]
    found = subprocess.run(
        [*map(str, command), "deepspeed=deepspeed_configs/zero3_offload_cpu.json"],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    assert [row["step"] for row in metrics(run)] == [1, 2]
    # DeepSpeed's launcher talks on standard output; our result is the one document on it.
    printed = found.stdout[found.stdout.index("\n{\n") if launcher == "deepspeed" else 0 :]
    report, _ = json.JSONDecoder().raw_decode(printed.strip())
    assert report["evaluation"].keys() >= {"base", "start", "compressed"}
    assert found.stdout.count('"evaluation"') == 1
