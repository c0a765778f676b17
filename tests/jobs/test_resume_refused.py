"""A run that must not go on: with other settings, text or base, or from a checkpoint that was changed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import (
    World,
    build_world,
    invoke,
    metrics,
    refusal,
    run_values,
    snapshot,
    write_yaml,
)
from tests.tiny import build_base, write_text

pytestmark = pytest.mark.usefixtures("no_plots")


def test_a_run_that_is_there_is_not_touched_without_resume(stopped: Path) -> None:
    before = snapshot(stopped)
    assert refusal("compress", stopped / "run.yaml") == (
        f"{stopped} already holds a run. Add --resume to go on with it, or name a new folder as output."
    )
    assert snapshot(stopped) == before


@pytest.mark.parametrize(
    ("setting", "found", "before"),
    [
        ("learning_rate=0.02", "learning_rate is 0.02", "0.01"),
        ("seed=1", "seed is 1", "0"),
        ("aux_learning_rate=0.02", "aux_learning_rate is 0.02", "0.03"),
        ("keep=0.6", "keep is 0.6", "None"),
        ("bf16=true", "bf16 is True", "False"),
    ],
)
def test_resume_with_a_changed_setting_names_it_and_both_values(
    setting: str, found: str, before: str, stopped: Path
) -> None:
    was = snapshot(stopped)
    said = refusal("compress", stopped / "run.yaml", setting, "--resume")
    assert said == f"{found}, the run in {stopped} began with {before}. Put it back, or name a new folder as output."
    assert snapshot(stopped) == was


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 1), (3, 1)])
def test_resume_with_another_number_of_sequences_in_a_step_is_refused_with_both(
    batch: int, accumulation: int, stopped: Path
) -> None:
    was = snapshot(stopped)
    changes = (f"per_device_train_batch_size={batch}", f"gradient_accumulation_steps={accumulation}")
    assert refusal("compress", stopped / "run.yaml", *changes, "--resume") == (
        f"a step would see {batch * accumulation} sequences ({batch} × {accumulation} on 1 processes), the run began "
        "with 4. Set gradient_accumulation_steps so that the product is the same."
    )
    assert snapshot(stopped) == was


TEXT_REFUSED = (
    "the training or held-out text is not what this run began with (its fingerprint differs). "
    "Put the files back, or start a new run."
)


@pytest.mark.parametrize("finished", [False, True])
def test_resume_after_the_text_changed_is_refused(finished: bool, run: Path, tmp_path: Path) -> None:
    world = build_world(tmp_path)
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run, max_steps=2))
    assert invoke("compress", yaml).exit_code == 0
    more = [] if finished else ["max_steps=4"]
    original = world.text.read_text()
    write_text(world.text, num_words=3000, seed=9)
    before = snapshot(run / "checkpoints") | snapshot(run / "merged")
    assert refusal("compress", yaml, "--resume", *more) == TEXT_REFUSED
    assert snapshot(run / "checkpoints") | snapshot(run / "merged") == before
    world.text.write_text(original)
    assert invoke("compress", yaml, "--resume", *more).exit_code == 0
    assert len(metrics(run)) == (2 if finished else 4)


def test_resume_on_a_swapped_base_is_refused_with_the_first_weight_that_differs(stopped: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, seed=5)
    before = snapshot(stopped / "checkpoints")
    said = refusal("compress", stopped / "run.yaml", f"base={other}", "--resume")
    assert said.startswith(f"{other / 'model.safetensors'}: model.embed_tokens.weight is not the weight this ")
    assert said.endswith("Use the same base and revision.")
    assert snapshot(stopped / "checkpoints") == before


def test_resume_on_a_base_with_another_config_is_refused(world: World, stopped: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    before = snapshot(stopped)
    assert refusal("compress", stopped / "run.yaml", f"base={other}", "--resume") == (
        f"the checkpoint was trained on {world.base}, whose config.json is not that of {other}. "
        "Use the same base and revision."
    )
    assert snapshot(stopped) == before


def _checkpoint_file(run: Path, name: str) -> Path:
    return run / "checkpoints" / "step-00000004" / name


RECORD = "records/model.layers.0.mlp.up_proj.weight.safetensors"


@pytest.mark.parametrize("name", [RECORD, "outer.safetensors"])
def test_a_checkpoint_file_with_a_flipped_bit_is_refused(name: str, stopped: Path) -> None:
    path = _checkpoint_file(stopped, name)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert refusal("compress", stopped / "run.yaml", "--resume") == (
        f"{path} is not what was written (its fingerprint differs). Use another checkpoint."
    )


@pytest.mark.parametrize("name", [RECORD, "outer.safetensors"])
def test_a_checkpoint_file_that_is_missing_is_refused(name: str, stopped: Path) -> None:
    path = _checkpoint_file(stopped, name)
    path.unlink()
    said = refusal("compress", stopped / "run.yaml", "--resume")
    assert said == f"{path} is missing from the checkpoint. Use another checkpoint."


@pytest.mark.parametrize("name", ["trainer.json", "manifest.json"])
def test_a_checkpoint_whose_json_was_cut_short_is_refused(name: str, stopped: Path) -> None:
    path = _checkpoint_file(stopped, name)
    path.write_text(path.read_text()[:50])
    said = refusal("compress", stopped / "run.yaml", "--resume")
    assert said.startswith(f"{path} is not JSON (")
    assert said.endswith("Restore the file.")


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("trainer.json", "step", "{path} lacks 'step': the file was changed."),
        ("trainer.json", "rng", "{path} lacks 'rng': the file was changed."),
        ("manifest.json", "files", "{path} has no 'files'. The file was changed."),
        ("manifest.json", "format_version", "{path.parent} has checkpoint format None, this version reads 3."),
    ],
)
def test_a_checkpoint_whose_json_lacks_an_entry_is_refused(name: str, key: str, message: str, stopped: Path) -> None:
    path = _checkpoint_file(stopped, name)
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    assert refusal("compress", stopped / "run.yaml", "--resume") == message.format(path=path)
