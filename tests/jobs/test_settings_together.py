"""Everything that saves memory at once: a run on it ends, goes on after an interrupt, merges, and is what it claims."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.common.errors import Interrupted
from pcscale.families.widths import make_plan
from pcscale.jobs.compress import compress
from pcscale.jobs.verify import verify
from pcscale.memory.predict import Prediction
from pcscale.merging.merge import MergeResult, merge
from pcscale.run.folder import BASE_CACHE_NAME
from pcscale.run.manifest import Manifest
from pcscale.training import loop
from tests.jobs.together import TOGETHER, DiskUsage, wide, yaml
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
    saved_steps,
    snapshot,
)

__all__ = ["wide", "yaml"]

pytestmark = [
    pytest.mark.usefixtures("no_plots"),
    pytest.mark.filterwarnings("ignore:create_dynamic_map"),  # bitsandbytes calls its own deprecated function.
]

STOPPED_AT = 4
"""An interrupt in this step, after the checkpoint of step 3."""
LIVE_TOLERANCE = 2e-2
"""Training holds weights in bfloat16; the merged model has float32."""
RECORD = "records/model.layers.0.mlp.up_proj.weight.safetensors"


def compress_quietly(*arguments: Any, **named: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
        compress(*arguments, **named)


@pytest.fixture(scope="module")
def finished(wide: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    compress_quietly(run_config(wide, run, **TOGETHER))
    return run


@pytest.fixture(scope="module")
def interrupted(wide: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped by Ctrl-C. Copy it to go on with it."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    take_step = loop._take_step

    def interrupt(training: loop.Training) -> dict[str, Any]:
        row = take_step(training)
        if row["step"] == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_take_step", interrupt)
        with pytest.raises(Interrupted, match=f"interrupted after step {STOPPED_AT}; checkpoint written"):
            compress_quietly(run_config(wide, run, **TOGETHER))
    return run


def copied(source: Path, run: Path) -> Path:
    """A run folder at another place, whose run.yaml names it."""
    shutil.copytree(source, run)
    settings = run / "run.yaml"
    settings.write_text(settings.read_text().replace(str(source), str(run)))
    return run


@pytest.fixture
def stopped(interrupted: Path, run: Path) -> Path:
    return copied(interrupted, run)


def without_traffic(run: Path) -> list[dict[str, Any]]:
    """What no two homes may have otherwise: everything but the bytes that they move."""
    return [{key: value for key, value in row.items() if key != "moved_bytes"} for row in curve(run)]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


# A whole run.


def test_a_run_leaves_its_results_and_no_records_folder(finished: Path) -> None:
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        "run.yaml",
        "plan.json",
        "tokens.safetensors",
        "scores.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "merge.json",
        "usage.json",
        "memory.json",
        "checkpoints",
        "merged",
        BASE_CACHE_NAME,
    }
    assert leftovers(finished) == []
    assert saved_steps(finished) == [3, 6]


def test_training_lowers_the_loss_from_the_hard_pruned_start(wide: World, finished: Path, run: Path) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["compressed"]["loss"] < evaluation["start"]["loss"] - 0.1
    assert evaluation["compressed"]["loss"] == pytest.approx(metrics(finished)[-1]["eval_loss"], rel=LIVE_TOLERANCE)
    compress(run_config(wide, run, max_steps=TOGETHER["max_steps"], bf16=True))
    plain = json.loads((run / "evaluation.json").read_text())
    assert evaluation["start"]["loss"] == plain["start"]["loss"], "the model is cut from stored weights"
    assert metrics(finished)[0]["loss"] == metrics(run)[0]["loss"], "and trained before anything is composed"


def test_a_checkpoint_holds_everything_in_the_form_that_was_asked_for(finished: Path) -> None:
    with safe_open(last_checkpoint(finished) / RECORD, framework="pt") as record:
        dtypes = {name: record.get_slice(name).get_dtype() for name in record.keys()}  # noqa: SIM118
    values = {name: dtype for name, dtype in dtypes.items() if "." not in name}
    assert values == dict.fromkeys(("delta_out", "delta_in", "aux", "aux_start"), "BF16")
    moments = {name: dtype for name, dtype in dtypes.items() if name.endswith(("exp_avg", "exp_avg_sq"))}
    assert moments == dict.fromkeys(
        (f"{name}.{moment}" for name in ("delta_out", "delta_in", "aux") for moment in ("exp_avg", "exp_avg_sq")), "U8"
    )
    assert {dtype for name, dtype in dtypes.items() if name.endswith("absmax")} == {"F32"}
    tensors = load_file(last_checkpoint(finished) / RECORD)
    assert all(tensors[name].any() for name in values)
    manifest = Manifest.read(last_checkpoint(finished))
    matrices = {name.removeprefix("records/").removesuffix(".safetensors") for name in manifest.files} - {"outer"}
    assert manifest.coded_fingerprints.keys() == matrices


def test_a_step_moves_what_the_plan_says(wide: World, finished: Path) -> None:
    config = run_config(wide, finished, **TOGETHER)
    base = MappedBase(resolve_base(config.base))
    expected = Prediction(make_plan(base.family, base.config, config), config).moved
    assert expected["records_read"] == expected["records_written"] > 0
    assert {row["moved_bytes"] for row in metrics(finished)} == {sum(expected.values())}
    assert json.loads((finished / "plan.json").read_text())["moved"] == expected


def test_a_run_is_what_it_claims_to_be(finished: Path) -> None:
    before = snapshot(finished)
    result = verify(finished)
    assert result["passed"], result["checks"]
    assert len(result["checks"]) == 4
    assert snapshot(finished) == before


def test_two_such_runs_are_equal_to_the_last_bit(wide: World, finished: Path, run: Path) -> None:
    compress(run_config(wide, run, **TOGETHER))
    assert curve(run) == curve(finished)
    assert merged_weights(run) == merged_weights(finished)


# Going on.


def test_an_interrupted_run_leaves_no_records_folder(interrupted: Path) -> None:
    assert not (interrupted / "residency").exists()
    assert saved_steps(interrupted)[-1] == STOPPED_AT
    assert leftovers(interrupted) == []


def test_a_run_goes_on_bit_for_bit(stopped: Path, finished: Path) -> None:
    outcome = invoke("compress", stopped / "run.yaml", "--resume")
    assert f"resuming at step {STOPPED_AT}" in outcome.stderr.splitlines()
    assert curve(stopped) == curve(finished)
    assert merged_weights(stopped) == merged_weights(finished)
    assert not (stopped / "residency").exists()


def test_going_on_leaves_the_checkpoint_that_it_began_from(stopped: Path) -> None:
    before = snapshot(last_checkpoint(stopped))
    assert invoke("compress", stopped / "run.yaml", "--resume", "keep_checkpoints=9").exit_code == 0
    assert saved_steps(stopped)[-2:] == [STOPPED_AT, 6]
    assert snapshot(stopped / "checkpoints" / f"step-{STOPPED_AT:08d}") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"residency": "cpu", "base_home": "cpu"},
        {"residency": "device", "base_home": "device"},
        {"pinned_memory": "220KB"},
        {"gradient_home": "cpu"},
    ],
    ids=lambda changes: " ".join(f"{key} {value}" for key, value in changes.items()),
)
def test_a_run_goes_on_bit_for_bit_wherever_things_live_then(
    changes: dict[str, str], stopped: Path, finished: Path
) -> None:
    arguments = [f"{key}={value}" for key, value in changes.items()]
    outcome = invoke("compress", stopped / "run.yaml", "--resume", *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert without_traffic(stopped) == without_traffic(finished)
    assert merged_weights(stopped) == merged_weights(finished)


def test_a_run_whose_codes_were_deleted_makes_the_same_ones_again(stopped: Path, finished: Path) -> None:
    (stopped / BASE_CACHE_NAME).unlink()
    assert invoke("compress", stopped / "run.yaml", "--resume").exit_code == 0
    assert curve(stopped) == curve(finished)
    assert snapshot(stopped)[BASE_CACHE_NAME] == snapshot(finished)[BASE_CACHE_NAME]


@pytest.mark.parametrize(
    ("setting", "found", "before"),
    [
        ("record_dtype=float32", "record_dtype is 'float32'", "'bfloat16'"),
        ("moments=32bit", "moments is '32bit'", "'8bit'"),
        ("base_precision=stored", "base_precision is 'stored'", "'int8'"),
        ("projection_rank=4", "projection_rank is 4", "'full'"),
        ("gradient_dtype=float32", "gradient_dtype is 'float32'", "'bfloat16'"),
    ],
)
def test_a_run_does_not_go_on_in_another_form(setting: str, found: str, before: str, stopped: Path) -> None:
    was = snapshot(stopped)
    said = refusal("compress", stopped / "run.yaml", "--resume", setting)
    assert said == f"{found}, the run in {stopped} began with {before}. Put it back, or name a new folder as output."
    assert snapshot(stopped) == was


def test_codes_of_another_bitsandbytes_are_refused(stopped: Path) -> None:
    """The manifest says what the run was trained on."""
    path = last_checkpoint(stopped) / "manifest.json"
    manifest = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    found = manifest["coded_fingerprints"][name]
    manifest["coded_fingerprints"][name] = "0" * 32
    path.write_text(json.dumps(manifest))
    assert refusal("compress", stopped / "run.yaml", "--resume") == (
        f"{name} has 8-bit codes with fingerprint {found[:12]}…, the checkpoint was trained on 000000000000…. "
        "Use the bitsandbytes version that it was trained with."
    )


# Merging.


def merge_again(wide: World, checkpoint: Path, output: Path) -> MergeResult:
    return merge(checkpoint, MappedBase(resolve_base(str(wide.base))), output, 10**9, 2**31)


@pytest.fixture
def ended(finished: Path, run: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return copied(finished, run)


@pytest.mark.parametrize("deleted", [False, True], ids=["with the codes", "without the codes"])
def test_a_merge_gives_the_same_bytes_with_and_without_the_runs_codes(
    deleted: bool, wide: World, finished: Path, ended: Path, tmp_path: Path
) -> None:
    if deleted:
        (ended / BASE_CACHE_NAME).unlink()
    before = snapshot(ended)
    (tmp_path / "elsewhere").mkdir()
    merge_again(wide, last_checkpoint(ended), tmp_path / "elsewhere" / "merged")
    assert snapshot(tmp_path / "elsewhere" / "merged") == snapshot(finished / "merged")
    assert snapshot(ended) == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"merged"}, "nothing else is left"


def test_a_run_is_verified_without_its_codes_and_nothing_is_left(ended: Path) -> None:
    (ended / BASE_CACHE_NAME).unlink()
    before = snapshot(ended)
    assert verify(ended)["passed"]
    assert snapshot(ended) == before


def test_a_checkpoint_that_was_moved_out_of_its_run_is_merged(wide: World, finished: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(last_checkpoint(finished), tmp_path / "moved" / "checkpoint"))
    merge_again(wide, moved, tmp_path / "moved" / "merged")
    assert snapshot(tmp_path / "moved" / "merged") == snapshot(finished / "merged")


def test_codes_that_were_damaged_are_made_again_for_the_merge(
    wide: World, finished: Path, ended: Path, tmp_path: Path
) -> None:
    data = bytearray((ended / BASE_CACHE_NAME).read_bytes())
    data[-1] ^= 1
    (ended / BASE_CACHE_NAME).write_bytes(data)
    merge_again(wide, last_checkpoint(ended), tmp_path / "merged")
    assert snapshot(tmp_path / "merged") == snapshot(finished / "merged")


def test_what_a_killed_run_left_takes_no_room_from_the_one_that_goes_on(
    stopped: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = stopped / "residency" / "rank-0" / "model.norm.weight.safetensors"
    filler.parent.mkdir(parents=True)
    filler.write_bytes(b"what filled the disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 1000 if filler.exists() else 10**11))
    outcome = invoke("compress", stopped / "run.yaml", "--resume")
    assert outcome.exit_code == 0, outcome.stderr
    assert curve(stopped) == curve(finished)
