"""run.yaml and key=value arguments: what wins, what is refused, and in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pcscale.common.errors import RequestError
from pcscale.config.load import apply_overrides, check_values, dump_run_config, load_run_config
from pcscale.config.schema import RunConfig
from tests.config.files import load, refusal, yaml_file

DOCUMENTED_DEFAULTS = {
    "keep": None,  # and means 0.5 where no other size is given
    "method": "projected",
    "start": "pca_least_squares",
    "importance": "energy",
    "calibration_tokens": 262144,
    "sequence_length": 512,
    "max_steps": 1000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "projection_rates": "per_matrix",
    "weight_decay": 0.0,
    "warmup_steps": 40,
    "max_grad_norm": 1.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_steps": 100,
    "save_steps": 100,
    "keep_checkpoints": 2,
    "seed": 0,
    "base_home": "disk",
    "base_precision": "stored",
    "residency": "device",
    "record_dtype": "float32",
    "moments": "32bit",
    "projection_rank": "full",
    "deepspeed": None,
    "max_memory": "2GiB",
    "max_shard_size": "5GB",
    "trust_remote_code": False,
}
"""The run.yaml block of the command line's contract, copied by hand."""


def test_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert {key: getattr(config, key) for key in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS
    assert config.data.validation is None


def test_base_output_and_training_text_have_no_default() -> None:
    without_default = {key for key, field in RunConfig.model_fields.items() if field.is_required()}
    assert without_default == {"base", "output", "data"}


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        ("output: o\ndata: {train: [t]}\n", "base is not set and has no default. Add it."),
        ("base: b\ndata: {train: [t]}\n", "output is not set and has no default. Add it."),
        ("base: b\noutput: o\n", "data is not set and has no default. Add it."),
        ("base: b\noutput: o\ndata: {validation: [t]}\n", "data.train is not set and has no default. Add it."),
    ],
)
def test_a_missing_setting_is_named(needed: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, needed=needed) == message


def test_an_argument_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    config = load(tmp_path, "max_steps: 7\nsave_steps: 3\n", "save_steps=5")
    assert (config.max_steps, config.save_steps, config.eval_steps) == (7, 5, 100)


def test_the_last_of_two_arguments_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "", "seed=1", "seed=2").seed == 2


def test_an_argument_reaches_into_a_group(tmp_path: Path) -> None:
    config = load(tmp_path, "", "data.train=other.txt", "data.validation=[a.txt, b.txt]")
    assert config.data.train == ["other.txt"]
    assert config.data.validation == ["a.txt", "b.txt"]


def test_an_argument_makes_a_group_that_the_file_lacks(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, needed="base: b\noutput: o\n")
    assert load_run_config(path, ["data.train=x.txt"]).data.train == ["x.txt"]
    # A dumped run says null where there is none.
    distill = load(tmp_path, "distill: null\n", "distill.weight=0.25").distill
    assert distill is not None
    assert distill.weight == 0.25


def test_arguments_leave_the_values_they_are_put_into_alone() -> None:
    values = {"data": {"train": ["a"]}, "seed": 1}
    assert apply_overrides(values, ["data.train=b", "seed=2"]) == {"data": {"train": "b"}, "seed": 2}
    assert values == {"data": {"train": ["a"]}, "seed": 1}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-04", "'1e-4'"])
def test_a_rate_may_be_written_without_a_dot(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"learning_rate: {text}\n").learning_rate == 1e-4
    assert load(tmp_path, "", f"learning_rate={text}").learning_rate == 1e-4


def test_target_params_take_scientific_notation(tmp_path: Path) -> None:
    assert load(tmp_path, "", "target_params=4.5e9").target_params == 4_500_000_000


def test_an_argument_without_a_value_takes_the_setting_back(tmp_path: Path) -> None:
    assert load(tmp_path, "keep: 0.3\n", "keep=").keep is None


OF_RECORDS = [
    "base_home: cpu",
    "base_home: device",
    "base_precision: int8",
    "residency: cpu",
    "residency: disk",
    "record_dtype: bfloat16",
    "moments: 8bit",
    "projection_rank: 16",
]
"""What the projected method alone may have otherwise than by default."""
BASE_IN_PARTS = "base_home zero keeps the base as it is stored: set deepspeed, and no base_precision."
NO_RECORDS = "has no meaning with method hard_prune, which has no records: remove it."


@pytest.mark.parametrize("line", [*OF_RECORDS, "gradient_home: cpu", "pinned_memory: 2GiB", "deepspeed: zero3.json"])
def test_where_and_how_things_are_kept_is_a_choice(line: str, tmp_path: Path) -> None:
    config = load(tmp_path, line + "\n")
    [(key, value)] = yaml.safe_load(line).items()
    assert getattr(config, key) == value != RunConfig.model_fields[key].default
    assert load(tmp_path, "", line.replace(": ", "=")) == config


def test_a_base_in_parts_is_a_choice_with_deepspeed(tmp_path: Path) -> None:
    config = load(tmp_path, "base_home: zero\ndeepspeed: zero3.json\n")
    assert (config.base_home, config.deepspeed) == ("zero", "zero3.json")


@pytest.mark.parametrize("line", ["gradient_home: cpu", "gradient_dtype: bfloat16\nbf16: true"])
def test_the_control_arm_has_gradients_to_choose_a_place_for(line: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"method: hard_prune\n{line}\n")
    assert (config.gradient_home, config.gradient_dtype) in (("cpu", "float32"), ("device", "bfloat16"))


@pytest.mark.parametrize(("rank", "number"), [("full", None), ("1", 1), ("16", 16)])
def test_a_rank_is_full_or_a_number(rank: str, number: int | None, tmp_path: Path) -> None:
    config = load(tmp_path, f"projection_rank: {rank}\n")
    assert config.rank == number
    assert check_values(yaml.safe_load(dump_run_config(config)), "dumped").rank == number


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "start: pca\nimportance: random",
            "start pca is made of activations: set importance energy or activation, or start selection.",
        ),
        ("hidden_size: 32", "hidden_size and intermediate_size go together: set both or neither."),
        ("intermediate_size: 32", "hidden_size and intermediate_size go together: set both or neither."),
        ("keep: 0.5\ntarget_params: 3e9", "keep and target_params both say the size: keep one of them."),
        (
            "keep: 0.5\nhidden_size: 32\nintermediate_size: 64",
            "keep and hidden_size both say the size: keep one of them.",
        ),
        (
            "method: hard_prune\naux_learning_rate: 1e-4",
            "aux_learning_rate has no meaning with method hard_prune: set learning_rate.",
        ),
        (
            "gradient_dtype: bfloat16",
            "gradient_dtype bfloat16 needs bf16: true: gradients of a float32 model are float32.",
        ),
        ("base_home: zero", BASE_IN_PARTS),
        ("base_home: zero\ndeepspeed: zero3.json\nbase_precision: int8", BASE_IN_PARTS),
        (
            "deepspeed: zero3.json\ngradient_home: cpu",
            "gradient_home cpu is for one process: with deepspeed, ZeRO's offload moves gradients.",
        ),
        *((f"method: hard_prune\n{line}", f"{line.partition(':')[0]} {NO_RECORDS}") for line in OF_RECORDS),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lines: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, lines + "\n") == message


@pytest.mark.parametrize(
    ("text", "trackers"), [("wandb", ["wandb"]), ("none", []), ("[tensorboard, wandb]", ["tensorboard", "wandb"])]
)
def test_trackers_may_be_one_none_or_several(text: str, trackers: list[str], tmp_path: Path) -> None:
    assert load(tmp_path, f"report_to: {text}\n").report_to == trackers


def test_one_text_file_may_be_written_without_brackets(tmp_path: Path) -> None:
    config = load(tmp_path, "", "data.train=a.txt", "data.validation=b.txt")
    assert (config.data.train, config.data.validation) == (["a.txt"], ["b.txt"])


@pytest.mark.parametrize("size", ["5GB", "5GiB", "5000000000", "24g"])
def test_sizes_are_kept_as_they_were_written(size: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"max_shard_size: {size}\n").max_shard_size == size


def test_a_dumped_run_loads_as_the_same_run(tmp_path: Path) -> None:
    config = load(tmp_path, "keep: 0.4\nlearning_rate: 1e-5\nreport_to: wandb\n", "data.validation=höher.txt")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(path) == config
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(RunConfig.model_fields)


def test_settings_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).seed = 3  # type: ignore[misc]


def test_derived_figures_follow_from_the_settings(tmp_path: Path) -> None:
    config = load(tmp_path, "per_device_train_batch_size: 3\ngradient_accumulation_steps: 5\nsequence_length: 7\n")
    assert (config.sequences_per_step, config.tokens_per_step) == (15, 105)
    assert (config.learning_rate, config.aux_rate) == (1e-4, 3e-4)
    assert load(tmp_path, "aux_learning_rate: 1e-3\n").aux_rate == 1e-3


def test_errors_name_where_the_values_came_from() -> None:
    values: dict[str, Any] = {"base": "b", "output": "o", "data": {"train": ["t"]}, "sed": 1}
    with pytest.raises(RequestError, match=r"^arguments: sed is not a setting"):
        check_values(values, "arguments")


def test_every_setting_has_a_description_and_a_theme() -> None:
    for key, field in RunConfig.model_fields.items():
        assert field.description, key
        assert isinstance(field.json_schema_extra, dict), key
        assert field.json_schema_extra["theme"] in ("model", "data", "training", "memory", "output"), key


def test_rates_that_follow_from_others_are_put_in(tmp_path: Path) -> None:
    """So that a run goes on with them when defaults have changed."""
    config = load(tmp_path, "learning_rate: 2.0e-4")
    assert (config.aux_learning_rate, config.resolved().aux_learning_rate) == (None, 6e-4)
    said = load(tmp_path, "learning_rate: 2.0e-4\naux_learning_rate: 5.0e-4")
    assert said.resolved() == said
    alone = load(tmp_path, "method: hard_prune")
    assert alone.resolved() == alone


def test_hard_pruning_trains_at_the_rate_of_aux(tmp_path: Path) -> None:
    config = load(tmp_path, "method: hard_prune")
    assert (config.learning_rate, config.aux_learning_rate) == (load(tmp_path).aux_rate, None)
    assert config.aux_rate == config.learning_rate
    assert load(tmp_path, "method: hard_prune", "learning_rate=1e-3").aux_rate == 1e-3
