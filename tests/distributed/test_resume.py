"""A run goes on with other ranks, another ZeRO stage or none: its curve is that of one process without a stop."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.children import Prepare, kill_itself, start, wait
from tests.distributed.ranks import start_ranks
from tests.runs import World, leftovers, metrics, run_values, snapshot, write_yaml

TOLERANCE = 1e-4
"""Of a loss. Sums over ranks and partitions round in another order."""
CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
STAGE_0 = "stage0.json"
"""Made here: it has nothing to say."""
SEQUENCES = 4
"""What a step sees in all."""

Form = tuple[int, str | None]
"""How many ranks, and the DeepSpeed file; None: one process without."""


def begin(
    world: World, run: Path, form: Form, *flags: str, prepare: Prepare | None = None, **changes: Any
) -> list[int]:
    """The exit codes of all ranks."""
    ranks, file = form
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SEQUENCES // ranks}
    (run.parent / STAGE_0).write_text("{}")
    engine = {"deepspeed": str(run.parent / file if file == STAGE_0 else CONFIGS / file)} if file else {}
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run, **batch, **engine, **changes))
    logs, arguments = run.parent / "logs", ["compress", yaml, *flags]
    logs.mkdir(exist_ok=True)
    if file is None:
        return [wait(start(arguments, logs / "0", prepare))]
    every = dict.fromkeys(range(ranks), prepare) if prepare else {}
    return [wait(process) for process in start_ranks(ranks, arguments, logs, every)]


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without DeepSpeed and without a stop."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert begin(world, run, (1, None)) == [0]
    return run


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "zero1.json"), (2, "zero1.json")),
        ((2, "zero2_offload.json"), (1, "zero2.json")),
        ((2, STAGE_0), (2, "zero3_offload_cpu.json")),
        ((2, "zero3.json"), (1, None)),
        ((1, None), (2, "zero3_offload_cpu.json")),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_in_another_form(
    before: Form, after: Form, world: World, run: Path, reference: Path
) -> None:
    killed = begin(world, run, before, prepare=kill_itself("pcscale.training.loop:training_step", 7))
    assert set(killed) == {-signal.SIGKILL}
    names = {path.name for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert all(name.endswith((".safetensors", ".json")) for name in names), "nothing is in DeepSpeed's own format"
    log = run.parent / "logs" / "0"
    assert set(begin(world, run, after, "--resume")) == {0}, log.read_text()
    assert "resuming at step 4" in log.read_text()
    assert losses(run) == pytest.approx(losses(reference), abs=TOLERANCE)
    assert not leftovers(run)


def test_a_base_under_zero_is_calibrated_evaluated_and_trained_as_one_on_disk(
    world: World, run: Path, reference: Path
) -> None:
    assert begin(world, run, (2, "zero3_offload_cpu.json"), base_home="zero") == [0, 0]
    assert losses(run) == pytest.approx(losses(reference), abs=TOLERANCE)
    assert snapshot(run)["scores.safetensors"] == snapshot(reference)["scores.safetensors"]
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, reference))
    assert found["base"]["loss"] == expected["base"]["loss"]
    assert found["compressed"]["loss"] == pytest.approx(expected["compressed"]["loss"], abs=TOLERANCE)
