"""Text, bases and settings that `pcscale compress` refuses: in a line or two, and nothing is harmed."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.runs import (
    World,
    invoke,
    refusal,
)
from tests.tiny import build_base

pytestmark = pytest.mark.usefixtures("no_plots")

SHARD = "model.safetensors"
NORM = "model.norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def _split(base: Path) -> dict[str, str]:
    """The base in shards; returns which tensor is in which."""
    build_base(base, tokenizer=True, max_shard_size="30KB")
    (base / SHARD).unlink(missing_ok=True)
    return json.loads((base / f"{SHARD}.index.json").read_text())["weight_map"]


def _change_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Data


def test_a_missing_data_file(refuse: Callable[..., str], run: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert refuse(data={"train": [str(missing)]}) == (
        f"{missing} does not exist. Name a file, a glob or a Hub data set (owner/name)."
    )
    assert not run.exists()


def test_a_missing_validation_file(refuse: Callable[..., str], world: World, run: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    data = {"train": [str(world.text)], "validation": [str(missing)]}
    assert refuse(data=data).startswith(f"{missing} does not exist. ")
    assert not run.exists()


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_an_empty_data_file(text: str, refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(text)
    path = str(tmp_path / "empty.txt")
    assert refuse(data={"train": [path]}) == f"data.train: {path} holds no text. Name files that do."


def test_text_shorter_than_a_sequence(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    said = refuse(data={"train": [str(tmp_path / "short.txt")]})
    assert said.startswith("data.train holds ")
    assert said.endswith(
        "expected 48 at least: 2 × sequence_length, one of them held out. Give more text or set a smaller "
        "sequence_length."
    )


def test_a_data_file_of_an_unknown_kind(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.pdf").write_bytes(b"%PDF")
    said = refuse(data={"train": [str(tmp_path / "text.pdf")]})
    assert said.startswith(f"{tmp_path / 'text.pdf'} is of an unknown kind. Known are .txt, ")


# The base


def test_a_base_that_is_not_there(refuse: Callable[..., str], run: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no base"
    assert refuse(f"base={missing}") == f"{missing} is neither a checkpoint folder nor a Hub id. Check the path."
    assert not run.exists()


def test_a_base_without_its_config(refuse: Callable[..., str], base: Path, run: Path) -> None:
    (base / "config.json").unlink()
    assert refuse() == f"{base} has no config.json. Name a folder with a Hugging Face checkpoint."
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "message"), [("{", " is not JSON ("), ("[]", " holds no JSON object. Restore the file.")]
)
def test_a_config_that_is_broken(text: str, message: str, refuse: Callable[..., str], base: Path) -> None:
    (base / "config.json").write_text(text)
    assert refuse().startswith(f"{base / 'config.json'}{message}")


def test_a_truncated_shard(refuse: Callable[..., str], base: Path, run: Path) -> None:
    path = base / SHARD
    size = path.stat().st_size
    os.truncate(path, size - 100)
    assert refuse() == (f"{path} is truncated: {size - 100} bytes, its header says {size}. Fetch or copy it again.")
    assert not run.exists()


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_shard_truncated_inside_its_header(size: int, refuse: Callable[..., str], base: Path) -> None:
    os.truncate(base / SHARD, size)
    said = refuse()
    assert said == f"{base / SHARD} is truncated inside its header ({size} bytes). Fetch or copy it again."


@pytest.mark.parametrize(
    "header", [struct.pack("<Q", 16) + b"x" * 64, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_a_corrupt_header(header: bytes, refuse: Callable[..., str], base: Path) -> None:
    (base / SHARD).write_bytes(header)
    assert refuse() == f"{base / SHARD} is not a safetensors file: its header cannot be read."


def test_a_missing_shard(refuse: Callable[..., str], base: Path, run: Path) -> None:
    shard = base / _split(base)[NORM]
    shard.unlink()
    assert refuse() == f"{shard} is missing. Fetch or copy it again."
    assert not run.exists()


def test_an_index_that_names_absent_tensors(refuse: Callable[..., str], base: Path) -> None:
    shard = base / _split(base)[NORM]
    weights = load_file(shard)
    del weights[NORM]
    save_file(weights, shard, {"format": "pt"})
    assert refuse() == (
        f"{base / f'{SHARD}.index.json'} says that {NORM} is in {shard.name}, and it is not. Fetch both files again."
    )


def test_no_weights_at_all(refuse: Callable[..., str], base: Path) -> None:
    (base / SHARD).rename(base / "pytorch_model.bin")
    assert refuse() == (
        f"{base} holds neither {SHARD} nor {SHARD}.index.json; found pytorch_model.bin, which pcscale does not read. "
        "Save the model as safetensors."
    )


def test_shapes_that_contradict_the_config(refuse: Callable[..., str], base: Path, run: Path) -> None:
    _change_config(base, intermediate_size=56)
    assert refuse() == (
        f"{base / SHARD}: {GATE} has shape [48, 32], family 'llama' expects [ffn=56, residual=32]. "
        "Check config.json beside the weights."
    )
    assert not run.exists()


def test_fewer_layers_than_the_config_says(refuse: Callable[..., str], base: Path) -> None:
    _change_config(base, num_hidden_layers=3)
    assert refuse() == (
        f"{base}: model.layers.2.input_layernorm.weight is not in the weights, family 'llama' needs it. "
        "Check config.json beside the weights."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", ["activation", "magnitude", "random"])
def test_a_base_weight_that_is_not_finite(
    value: float, importance: str, refuse: Callable[..., str], base: Path
) -> None:
    weights = load_file(base / SHARD)
    weights[GATE][3, 4] = value
    save_file(weights, base / SHARD, {"format": "pt"})
    said = refuse(importance=importance)
    assert said == f"{base / SHARD}: {GATE} holds NaN or infinity. Fetch or copy the file again."


def test_an_unsupported_family(refuse: Callable[..., str], base: Path, run: Path) -> None:
    _change_config(base, model_type="gpt2")
    said = refuse()
    assert said.startswith(f"{base / 'config.json'}: model_type 'gpt2' is not supported. Supported: llama (")
    assert all(family in said for family in ("mistral (", "qwen2 (", "qwen3 ("))
    assert not run.exists()


def test_a_missing_tokenizer(refuse: Callable[..., str], base: Path, run: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    said = refuse()
    assert said.startswith(f"{base}: the tokenizer files are missing or unreadable (")
    assert said.endswith("Copy tokenizer.json and tokenizer_config.json of the base there.")
    assert not run.exists()


# The settings


def test_widths_that_are_not_legal(refuse: Callable[..., str], run: Path) -> None:
    assert refuse(hidden_size=18, intermediate_size=24) == (
        "hidden_size 18 is not legal: family 'llama' needs a multiple of num_attention_heads = 4. "
        "Nearest legal: 16 and 20."
    )
    assert not run.exists()


def test_widths_larger_than_the_base(refuse: Callable[..., str]) -> None:
    assert refuse(hidden_size=32, intermediate_size=64) == (
        "intermediate_size 64 is not between 1 and the base's 48. Choose a smaller width."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1e-4", "learning_rat is not a setting. Did you mean 'learning_rate'?"),
        ("data.trian=x", "data.trian is not a setting. Did you mean 'data.train'?"),
        ("max_steps=many", "max_steps is 'many': input should be a valid integer"),
        ("max_steps=0", "max_steps is 0: input should be greater than 0."),
        ("max_steps=2.5", "max_steps is 2.5: input should be a valid integer"),
        ("learning_rate=-1", "learning_rate is -1: input should be greater than 0."),
        ("learning_rate=.nan", "learning_rate is nan: input should be a finite number."),
        ("keep=1", "keep is 1: input should be less than 1."),
        ("bf16=maybe", "bf16 is 'maybe': input should be a valid boolean"),
        (
            "importance=magic",
            "importance is 'magic': this version takes only 'activation', 'energy', 'magnitude' or 'random'.",
        ),
        ("max_memory=lots", "max_memory: 'lots' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("deepspeed=3", "deepspeed is 3: input should be a valid string."),
        ("seed=[1]", "seed is [1]: "),
    ],
)
def test_a_setting_that_is_wrong(
    override: str, message: str, refuse: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    assert refuse(override).startswith(f"{tmp_path / 'run.yaml'}: {message}")
    assert not run.exists()


def test_an_override_that_is_no_pair(refuse: Callable[..., str]) -> None:
    assert refuse("max_steps") == "'max_steps' is not of the form key=value."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- base\n- output\n", " holds no settings. Write one `key: value` a line."),
        ("", " holds no settings. Write one `key: value` a line."),
        ("base: [unclosed\n", " is not valid YAML: "),
        (None, " does not exist. Name a run.yaml."),
    ],
)
def test_a_run_yaml_that_is_none(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    assert refusal("compress", path).startswith(f"{path}{message}")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_whose_package_is_absent(
    name: str, refuse: Callable[..., str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.training.trackers.find_spec", lambda package: None)
    assert refuse(f"report_to={name}") == (
        f"report_to names {name}, which is not installed. Run `pip install {name}` or remove it."
    )
    assert not run.exists()


@pytest.mark.parametrize("settings", [[], ["projection_rank=5"]], ids=["full", "low rank"])
def test_a_cap_that_the_merge_cannot_keep_is_refused_before_training(
    settings: list[str], refuse: Callable[..., str], run: Path
) -> None:
    said = refuse("max_memory=1kB", *settings, exit_code=3)
    least = int(said.removeprefix("max_memory 1kB is too small for the merge: give at least ").split()[0])
    assert said.endswith(" bytes.")
    assert not run.exists()
    assert "at least" in refuse(f"max_memory={least - 1}", *settings, exit_code=3)
    yaml = run.parent / "run.yaml"
    assert invoke("compress", yaml, f"max_memory={least}", "max_steps=1", *settings).exit_code == 0
