"""Proof 5: a run that was stopped, at whatever instant and however, is the run that was not."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pcscale.jobs.compress import compress
from tests import children
from tests.runs import (
    World,
    curve,
    invoke,
    leftovers,
    merged_weights,
    metrics,
    refusal,
    report_without_plots,
    run_config,
    run_values,
    saved_steps,
    snapshot,
    write_yaml,
)
from tests.tiny import write_text

pytestmark = pytest.mark.usefixtures("no_plots")

SPLIT_TOLERANCE = 1e-3
"""Sums over a micro batch in another order, carried through six steps."""


def _losses(run: Path) -> dict[str, float]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {name: evaluation[name]["loss"] for name in ("base", "start", "compressed")}


def _assert_equal(run: Path, reference: Path) -> None:
    """Losses, norms and merged weights, to the last bit; nothing temporary is left."""
    assert curve(run) == curve(reference)
    assert merged_weights(run) == merged_weights(reference)
    assert _losses(run) == _losses(reference)
    assert leftovers(run.parent) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_a_checkpoint_and_goes_on_as_it_says(
    number: signal.Signals, world: World, run: Path, reference: Path, tmp_path: Path
) -> None:
    yaml, log = write_yaml(tmp_path / "run.yaml", run_values(world, run)), tmp_path / "log"
    process = children.start(["compress", yaml], log, children.slow_steps)
    children.wait_for_step(run, 5, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert children.wait(process) == 130
    step = saved_steps(run)[-1]
    assert 5 <= step < 10
    assert len(metrics(run)) == step
    way = f"pcscale compress {run / 'run.yaml'} --resume"
    said = f"pcscale: interrupted after step {step}; checkpoint written. Go on with: {way}"
    assert log.read_text().splitlines()[-1] == said

    outcome = invoke(*way.split()[1:])
    assert outcome.exit_code == 0, outcome
    assert f"resuming at step {step}" in outcome.stderr.splitlines()
    _assert_equal(run, reference)


def test_an_interrupt_in_the_last_step_stops_the_run_as_well(
    world: World, run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcscale.training import loop

    take_step = loop._take_step

    def interrupted(training: loop.Training) -> dict[str, Any]:
        row = take_step(training)
        if row["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(loop, "_take_step", interrupted)
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run))
    assert "interrupted after step 10; checkpoint written" in refusal("compress", yaml, exit_code=130)
    assert not (run / "merged").exists()
    monkeypatch.undo()
    monkeypatch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
    assert invoke("compress", yaml, "--resume").exit_code == 0
    _assert_equal(run, reference)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_from_outside_at_a_random_instant_goes_on_bit_for_bit(
    seed: int, world: World, run: Path, reference: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    process = children.start(["compress", yaml], tmp_path / "log", children.slow_steps)
    children.wait_for_step(run, chance.randint(3, 7), process)
    time.sleep(0.07 * chance.random())
    process.kill()
    assert children.wait(process) == -signal.SIGKILL
    assert not (run / "merged").exists()
    compress(run_config(world, run), resume=True)
    _assert_equal(run, reference)


@pytest.mark.parametrize(
    ("target", "call", "steps_saved"),
    [
        pytest.param("pcscale.jobs.compress:write_scores", 1, [], id="before the scores are written"),
        pytest.param("pcscale.jobs.compress:evaluate_base", 1, [], id="before the base's evaluation"),
        pytest.param("pcscale.jobs.compress:evaluate_now", 1, [], id="before the start's evaluation"),
        pytest.param("pcscale.training.loop:training_step", 1, [], id="before the first step"),
        # 15 matrices: a step publishes one after the other, a checkpoint writes 15 records and then the rest.
        pytest.param("pcscale.projection.memory_residency:write_tensors", 9, [], id="in the first checkpoint"),
        pytest.param("pcscale.projection.engine:LocalEngine.publish", 85, [4], id="within a sweep"),
        pytest.param("pcscale.projection.memory_residency:write_tensors", 20, [4], id="in the second checkpoint"),
        pytest.param("pcscale.projection.checkpoint:write_tensors", 2, [4], id="after its records"),
        pytest.param("pcscale.run.manifest:write_json", 2, [4], id="before the manifest"),
        pytest.param("pcscale.training.loop:RunFolder.prune_checkpoints", 3, [4, 8, 10], id="before old ones go"),
        pytest.param("pcscale.jobs.compress:merge", 1, [8, 10], id="before the merge"),
        pytest.param("pcscale.merging.merge:_write_sidecars", 1, [8, 10], id="in the merge"),
        pytest.param("pcscale.jobs.compress:load_stock", 1, [8, 10], id="after the merge"),
    ],
)
def test_a_run_killed_at_a_chosen_instant_goes_on_bit_for_bit(
    target: str, call: int, steps_saved: list[int], world: World, run: Path, reference: Path
) -> None:
    children.run_killed(world, run, target, call)
    assert saved_steps(run) == steps_saved
    compress(run_config(world, run), resume=True)
    _assert_equal(run, reference)
    assert saved_steps(run)[-2:] == [8, 10]


COMPACT = {
    "base_precision": "int8",
    "record_dtype": "bfloat16",
    "moments": "8bit",
    "projection_rank": 5,
    "weight_decay": 0.1,
}
"""Settings of which each brings a state of its own into the checkpoint."""


def _numbers(run: Path) -> list[dict[str, Any]]:
    """The curve without the bytes moved, which tell where records live."""
    return [{key: value for key, value in row.items() if key != "moved_bytes"} for row in curve(run)]


@pytest.fixture(scope="module")
def compact(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps without a stop, every record in few bits and on the device."""
    run = tmp_path_factory.mktemp("compact") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
        compress(run_config(world, run, **COMPACT))
    return run


@pytest.mark.parametrize(
    ("target", "call", "steps_saved", "after"),
    [
        pytest.param("pcscale.projection.residency:DiskResidency.save", 9, [], "disk", id="in the first checkpoint"),
        pytest.param(
            "pcscale.projection.residency:DiskResidency.write", 80, [4], "disk", id="in the middle of a sweep"
        ),
        pytest.param("pcscale.projection.residency:DiskResidency.save", 20, [4], "cpu", id="in the second checkpoint"),
        pytest.param("pcscale.training.loop:training_step", 7, [4], "device", id="between two steps"),
    ],
)
def test_a_killed_run_with_records_on_disk_goes_on_bit_for_bit_wherever_they_live_then(
    target: str, call: int, steps_saved: list[int], after: str, world: World, run: Path, compact: Path
) -> None:
    children.run_killed(world, run, target, call, residency="disk", **COMPACT)
    assert saved_steps(run) == steps_saved
    compress(run_config(world, run, residency=after, **COMPACT), resume=True)
    assert _numbers(run) == _numbers(compact)
    assert merged_weights(run) == merged_weights(compact)
    assert _losses(run) == _losses(compact)
    assert leftovers(run.parent) == []
    assert not (run / "residency").exists()


def test_a_run_killed_twice_goes_on_bit_for_bit(stopped: Path, reference: Path, tmp_path: Path) -> None:
    kill = children.kill_itself("pcscale.training.loop:training_step", 3)
    process = children.start(["compress", stopped / "run.yaml", "--resume"], tmp_path / "log", kill)
    assert children.wait(process) == -signal.SIGKILL
    assert len(metrics(stopped)) == 6
    assert invoke("compress", stopped / "run.yaml", "--resume").exit_code == 0
    _assert_equal(stopped, reference)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_a_run_goes_on_with_its_steps_shared_out_otherwise(
    batch: int, accumulation: int, stopped: Path, reference: Path
) -> None:
    changes = (f"per_device_train_batch_size={batch}", f"gradient_accumulation_steps={accumulation}")
    assert invoke("compress", stopped / "run.yaml", *changes, "--resume").exit_code == 0
    found, expected = metrics(stopped), metrics(reference)
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=SPLIT_TOLERANCE)


def test_a_row_of_metrics_that_was_cut_short_is_made_again(stopped: Path, reference: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    assert invoke("compress", stopped / "run.yaml", "--resume").exit_code == 0
    _assert_equal(stopped, reference)


def test_what_a_kill_left_half_written_is_cleaned_away(stopped: Path, reference: Path) -> None:
    partial = stopped / "checkpoints" / ".partial-step-00000008"
    (partial / "records").mkdir(parents=True)
    (partial / "records" / ".partial-x.safetensors").write_bytes(b"half")
    (stopped / ".partial-plan.json").write_text("{")
    (stopped / ".partial-merged").mkdir()
    (stopped / ".partial-merged" / ".partial-model.safetensors").write_bytes(b"half")
    assert invoke("compress", stopped / "run.yaml", "--resume").exit_code == 0
    _assert_equal(stopped, reference)


def test_leftovers_go_also_below_a_folder_named_merged(world: World, tmp_path: Path) -> None:
    run = tmp_path / "merged" / "run"
    run.mkdir(parents=True)
    write_yaml(run / "run.yaml", run_values(world, run, max_steps=1))
    (run / ".partial-plan.json").write_text("{")
    compress(run_config(world, run, max_steps=1), resume=True)
    assert leftovers(run) == []


def test_resume_with_nothing_to_resume_starts_afresh(world: World, run: Path, reference: Path) -> None:
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run))
    outcome = invoke("compress", yaml, "--resume")
    assert outcome.exit_code == 0
    assert "resuming" not in outcome.stderr
    _assert_equal(run, reference)


def test_a_fresh_start_keeps_nothing_of_a_run_on_other_text(
    world: World, run: Path, reference: Path, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.txt", num_words=3000, seed=2)
    values = run_values(world, run, data={"train": [str(text)]})
    yaml = write_yaml(tmp_path / "run.yaml", values)
    kill = children.kill_itself("pcscale.training.loop:training_step", 3)
    assert children.wait(children.start(["compress", yaml], tmp_path / "log", kill)) == -signal.SIGKILL
    shutil.copyfile(world.text, text)
    assert invoke("compress", yaml, "--resume").exit_code == 0
    _assert_equal(run, reference)


def test_resume_of_a_finished_run_trains_nothing(
    world: World, run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(reference, run)
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run))
    before = snapshot(run)
    for part in ("train", "merge", "collect_scores", "evaluate_base", "open_training"):
        monkeypatch.setattr(f"pcscale.jobs.compress.{part}", None)
    outcome = invoke("compress", yaml, "--resume", "--json")
    assert outcome.exit_code == 0
    assert "training is complete at step 10" in outcome.stderr.splitlines()
    after = snapshot(run)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # The settings name the copy; the merged model is evaluated again, with its times.
    assert changed <= {"run.yaml", "usage.json", "memory.json", "evaluation.json"}
    assert _losses(run) == _losses(reference)


def test_a_finished_run_goes_on_with_more_steps(world: World, run: Path, reference: Path) -> None:
    shutil.copytree(reference, run)
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run, max_steps=13))
    outcome = invoke("compress", yaml, "--resume")
    assert outcome.exit_code == 0
    assert "resuming at step 10" in outcome.stderr.splitlines()
    rows = curve(run)
    assert rows[:10] == curve(reference)
    assert [row["step"] for row in rows[10:]] == [11, 12, 13]
    assert all(row["loss"] < rows[0]["loss"] for row in rows[10:])
    assert merged_weights(run) != merged_weights(reference)
    assert _losses(run)["compressed"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)
    assert json.loads((run / "merge.json").read_text())["checkpoint"] == "step-00000013"


def test_resume_on_a_base_that_was_only_moved_goes_on(
    world: World, stopped: Path, reference: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world.base, moved)
    assert invoke("compress", stopped / "run.yaml", f"base={moved}", "--resume").exit_code == 0
    _assert_equal(stopped, reference)


def test_resume_after_a_checkpoint_was_taken_away_goes_on_from_the_one_before(
    world: World, run: Path, reference: Path
) -> None:
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run))
    outcome = invoke("compress", yaml, "--resume")
    assert "resuming at step 8" in outcome.stderr.splitlines()
    _assert_equal(run, reference)
