"""run.yaml and key=value arguments: what wins, what is refused, and in which words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcscale.common.errors import RequestError
from pcscale.config.load import apply_overrides, check_values, dump_run_config, load_run_config, read_values
from pcscale.config.schema import RunConfig

NEEDED = "base: some/base\noutput: runs/one\ndata:\n  train: [text.txt]\n"

DOCUMENTED_DEFAULTS = {
    "keep": None,  # and means 0.5 where no other size is given
    "method": "projected",
    "start": "selection",
    "importance": "activation",
    "calibration_tokens": 262144,
    "sequence_length": 512,
    "max_steps": 1000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.5e-4,
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


def _yaml(folder: Path, more: str = "", needed: str = NEEDED) -> Path:
    path = folder / "run.yaml"
    path.write_text(needed + more, encoding="utf-8")
    return path


def _load(folder: Path, more: str = "", *overrides: str) -> RunConfig:
    return load_run_config(_yaml(folder, more), overrides)


def _refusal(folder: Path, more: str = "", *overrides: str, needed: str = NEEDED) -> str:
    """The message, without the file's name in front."""
    path = _yaml(folder, more, needed)
    with pytest.raises(RequestError, match=re.escape(str(path))) as error:
        load_run_config(path, overrides)
    return str(error.value).removeprefix(f"{path}: ")


def test_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = _load(tmp_path)
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
    assert _refusal(tmp_path, needed=needed) == message


def test_an_argument_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    config = _load(tmp_path, "max_steps: 7\nsave_steps: 3\n", "save_steps=5")
    assert (config.max_steps, config.save_steps, config.eval_steps) == (7, 5, 100)


def test_the_last_of_two_arguments_wins(tmp_path: Path) -> None:
    assert _load(tmp_path, "", "seed=1", "seed=2").seed == 2


def test_an_argument_reaches_into_a_group(tmp_path: Path) -> None:
    config = _load(tmp_path, "", "data.train=other.txt", "data.validation=[a.txt, b.txt]")
    assert config.data.train == ["other.txt"]
    assert config.data.validation == ["a.txt", "b.txt"]


def test_an_argument_makes_a_group_that_the_file_lacks(tmp_path: Path) -> None:
    path = _yaml(tmp_path, needed="base: b\noutput: o\n")
    assert load_run_config(path, ["data.train=x.txt"]).data.train == ["x.txt"]


def test_arguments_leave_the_values_they_are_put_into_alone() -> None:
    values = {"data": {"train": ["a"]}, "seed": 1}
    assert apply_overrides(values, ["data.train=b", "seed=2"]) == {"data": {"train": "b"}, "seed": 2}
    assert values == {"data": {"train": ["a"]}, "seed": 1}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-04", "'1e-4'"])
def test_a_rate_may_be_written_without_a_dot(text: str, tmp_path: Path) -> None:
    assert _load(tmp_path, f"learning_rate: {text}\n").learning_rate == 1e-4
    assert _load(tmp_path, "", f"learning_rate={text}").learning_rate == 1e-4


def test_target_params_take_scientific_notation(tmp_path: Path) -> None:
    assert _load(tmp_path, "", "target_params=4.5e9").target_params == 4_500_000_000


def test_an_argument_without_a_value_takes_the_setting_back(tmp_path: Path) -> None:
    assert _load(tmp_path, "keep: 0.3\n", "keep=").keep is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1e-4", "learning_rat is not a setting. Did you mean 'learning_rate'?"),
        ("lr_max_steps: 3", "lr_max_steps is not a setting. Did you mean 'max_steps'?"),
        ("intermediate_sise: 3", "intermediate_sise is not a setting. Did you mean 'intermediate_size'?"),
        ("validation: x.txt", "validation is not a setting. Did you mean 'data.validation'?"),
        ("dat: x.txt", "dat is not a setting. Did you mean 'data'?"),
        ("projection_ran: 16", "projection_ran is not a setting. Did you mean 'projection_rank'?"),
        ("pinned: 1GB", "pinned is not a setting. Did you mean 'pinned_memory'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(line: str, message: str, tmp_path: Path) -> None:
    assert _refusal(tmp_path, line + "\n") == message


@pytest.mark.parametrize("key", ["distill", "optimizer", "learn_start"])
def test_a_setting_of_no_part_that_is_there_is_unknown(key: str, tmp_path: Path) -> None:
    assert _refusal(tmp_path, f"{key}: 1\n").startswith(f"{key} is not a setting. Did you mean ")


def test_an_unknown_key_in_a_group_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert _refusal(tmp_path, "", "data.trian=x") == "data.trian is not a setting. Did you mean 'data.train'?"


def test_an_unknown_argument_is_refused_like_an_unknown_key(tmp_path: Path) -> None:
    assert _refusal(tmp_path, "", "sed=1") == "sed is not a setting. Did you mean 'seed'?"


def test_an_unknown_key_is_named_before_the_missing_one_it_was_meant_for(tmp_path: Path) -> None:
    message = _refusal(tmp_path, needed="bass: b\noutput: o\ndata: {train: [t]}\n")
    assert message == "bass is not a setting. Did you mean 'base'?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "max_steps: ten",
            "max_steps is 'ten': input should be a valid integer, unable to parse string as an integer.",
        ),
        ("max_steps: 2.5", "max_steps is 2.5: input should be a valid integer, got a number with a fractional part."),
        ("max_steps: true", "max_steps is True: expected a number, found true or false."),
        ("max_steps: [3]", "max_steps is [3]: input should be a valid integer."),
        ("max_steps: ", "max_steps is None: input should be a valid integer."),
        ("learning_rate: fast", "learning_rate is 'fast': input should be a valid number, unable to parse"),
        ("learning_rate: false", "learning_rate is False: expected a number, found true or false."),
        ("bf16: maybe", "bf16 is 'maybe': input should be a valid boolean, unable to interpret input."),
        ("base: 7", "base is 7: input should be a valid string."),
        ("data: text.txt", "data is 'text.txt': input should be a valid dictionary"),
        ("method: prune", "method is 'prune': this version takes only 'projected' or 'hard_prune'."),
        ("start: random", "start is 'random': this version takes only 'selection'."),
        ("base_home: gpu", "base_home is 'gpu': this version takes only 'disk', 'cpu' or 'device'."),
        ("base_precision: int4", "base_precision is 'int4': this version takes only 'stored' or 'int8'."),
        ("residency: nvme", "residency is 'nvme': this version takes only 'device', 'cpu' or 'disk'."),
        ("record_dtype: float16", "record_dtype is 'float16': this version takes only 'float32' or 'bfloat16'."),
        ("moments: 8", "moments is 8: this version takes only '32bit' or '8bit'."),
        ("gradient_dtype: float16", "gradient_dtype is 'float16': this version takes only 'float32' or 'bfloat16'."),
        ("gradient_home: disk", "gradient_home is 'disk': this version takes only 'device' or 'cpu'."),
        ("projection_rank: half", "projection_rank is 'half': expected full, or a number of at least 1."),
        ("projection_rank: 0", "projection_rank is 0: expected full, or a number of at least 1."),
        ("projection_rank: 2.5", "projection_rank is 2.5: expected full, or a number of at least 1."),
        ("projection_rank: true", "projection_rank is True: expected full, or a number of at least 1."),
        ("pinned_memory: lots", "pinned_memory: 'lots' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("deepspeed: zero.json", "deepspeed is 'zero.json': this version takes only None."),
        ("max_memory: lots", "max_memory: 'lots' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("max_shard_size: -1", "max_shard_size: '-1' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("max_memory: true", "max_memory: 'True' is not a size."),
        ("report_to: [mlflow]", "report_to is 'mlflow': this version takes only 'tensorboard' or 'wandb'."),
        ("report_to: mlflow", "report_to is 'mlflow': this version takes only 'tensorboard' or 'wandb'."),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_found(line: str, message: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    values = yaml.safe_load(NEEDED)
    needed = yaml.safe_dump({name: value for name, value in values.items() if name != key})
    assert _refusal(tmp_path, line + "\n", needed=needed).startswith(message)


def test_a_wrong_type_in_a_list_names_the_list(tmp_path: Path) -> None:
    assert _refusal(tmp_path, "", "data.train=[3]") == "data.train is 3: input should be a valid string."
    assert _refusal(tmp_path, "", "data.train=[]").startswith("data.train is []: list should have at least 1 item")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("keep: 0", "keep is 0: input should be greater than 0."),
        ("keep: 1", "keep is 1: input should be less than 1."),
        ("keep: 50", "keep is 50: input should be less than 1."),
        ("target_params: 0", "target_params is 0: input should be greater than 0."),
        ("max_steps: 0", "max_steps is 0: input should be greater than 0."),
        ("hidden_size: -32", "hidden_size is -32: input should be greater than 0."),
        ("sequence_length: 1", "sequence_length is 1: input should be greater than 1."),
        ("warmup_steps: -1", "warmup_steps is -1: input should be greater than or equal to 0."),
        ("learning_rate: 0", "learning_rate is 0: input should be greater than 0."),
        ("weight_decay: -0.1", "weight_decay is -0.1: input should be greater than or equal to 0."),
        ("adam_beta1: 1", "adam_beta1 is 1: input should be less than 1."),
        ("adam_beta2: -0.1", "adam_beta2 is -0.1: input should be greater than or equal to 0."),
        ("seed: -1", "seed is -1: input should be greater than or equal to 0."),
        (f"seed: {2**63}", f"seed is {2**63}: input should be less than 922337203685477"),
        ("base: ''", "base is '': string should have at least 1 character."),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(line: str, message: str, tmp_path: Path) -> None:
    needed = yaml.safe_dump({"base": "b", "output": "o", "data": {"train": ["t"]}} | yaml.safe_load(line))
    assert _refusal(tmp_path, needed=needed).startswith(message)


@pytest.mark.parametrize("key", ["keep", "target_params", "learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: str, tmp_path: Path) -> None:
    assert re.match(
        rf"{key} is \S+: input should be (a finite number|greater|less)", _refusal(tmp_path, f"{key}: {value}")
    )


def test_nan_is_refused_as_not_finite(tmp_path: Path) -> None:
    assert _refusal(tmp_path, "learning_rate: .nan\n") == "learning_rate is nan: input should be a finite number."


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    message = _refusal(tmp_path, "seed: 1\nseed: 2\n")
    assert "is not valid YAML: the key 'seed' stands twice" in message
    assert "line 6, column 1" in message


def test_a_key_that_stands_twice_in_a_group_is_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, needed="base: b\noutput: o\ndata:\n  train: [a]\n  train: [b]\n")
    assert "the key 'train' stands twice" in message


@pytest.mark.parametrize(
    "more",
    [
        "keep: [0.5\n",
        "keep: 'a\n",
        "\tkeep: 1\n",
        "? [a, b]\n: c\n",
        "keep: !!python/object:os.x 1\n",
        "base: 2026-13-45\n",
    ],
)
def test_broken_yaml_is_refused(more: str, tmp_path: Path) -> None:
    assert "is not valid YAML: " in _refusal(tmp_path, more)


def test_a_broken_argument_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^the value of keep is not valid YAML: "):
        _load(tmp_path, "", "keep=[0.5")


@pytest.mark.parametrize("argument", ["keep", "=3", ""])
def test_an_argument_without_key_and_value_is_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^'{argument}' is not of the form key=value"):
        _load(tmp_path, "", argument)


def test_an_argument_into_a_setting_that_is_no_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^base holds no settings of its own, so base\.train cannot be set"):
        _load(tmp_path, "", "base.train=x")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n", "# nothing but a comment\n"])
def test_a_file_without_settings_is_refused(content: str, tmp_path: Path) -> None:
    assert "holds no settings. Write one `key: value` a line." in _refusal(tmp_path, needed=content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.yaml does not exist\. Name a run\.yaml"):
        read_values(tmp_path / "absent.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x81")
    for path in (tmp_path, tmp_path / "weights.bin"):
        with pytest.raises(
            RequestError, match=rf"{re.escape(str(path))} cannot be read as text \(.*\)\. Name a run\.yaml"
        ):
            read_values(path)


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
NO_RECORDS = "has no meaning with method hard_prune, which has no records: remove it."


@pytest.mark.parametrize("line", [*OF_RECORDS, "gradient_home: cpu", "pinned_memory: 2GiB"])
def test_where_and_how_things_are_kept_is_a_choice(line: str, tmp_path: Path) -> None:
    config = _load(tmp_path, line + "\n")
    [(key, value)] = yaml.safe_load(line).items()
    assert getattr(config, key) == value != RunConfig.model_fields[key].default
    assert _load(tmp_path, "", line.replace(": ", "=")) == config


@pytest.mark.parametrize("line", ["gradient_home: cpu", "gradient_dtype: bfloat16\nbf16: true"])
def test_the_control_arm_has_gradients_to_choose_a_place_for(line: str, tmp_path: Path) -> None:
    config = _load(tmp_path, f"method: hard_prune\n{line}\n")
    assert (config.gradient_home, config.gradient_dtype) in (("cpu", "float32"), ("device", "bfloat16"))


@pytest.mark.parametrize(("rank", "number"), [("full", None), ("1", 1), ("16", 16)])
def test_a_rank_is_full_or_a_number(rank: str, number: int | None, tmp_path: Path) -> None:
    config = _load(tmp_path, f"projection_rank: {rank}\n")
    assert config.rank == number
    assert check_values(yaml.safe_load(dump_run_config(config)), "dumped").rank == number


@pytest.mark.parametrize(
    ("lines", "message"),
    [
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
        *((f"method: hard_prune\n{line}", f"{line.partition(':')[0]} {NO_RECORDS}") for line in OF_RECORDS),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lines: str, message: str, tmp_path: Path) -> None:
    assert _refusal(tmp_path, lines + "\n") == message


@pytest.mark.parametrize(
    ("text", "trackers"), [("wandb", ["wandb"]), ("none", []), ("[tensorboard, wandb]", ["tensorboard", "wandb"])]
)
def test_trackers_may_be_one_none_or_several(text: str, trackers: list[str], tmp_path: Path) -> None:
    assert _load(tmp_path, f"report_to: {text}\n").report_to == trackers


def test_one_text_file_may_be_written_without_brackets(tmp_path: Path) -> None:
    config = _load(tmp_path, "", "data.train=a.txt", "data.validation=b.txt")
    assert (config.data.train, config.data.validation) == (["a.txt"], ["b.txt"])


@pytest.mark.parametrize("size", ["5GB", "5GiB", "5000000000", "24g"])
def test_sizes_are_kept_as_they_were_written(size: str, tmp_path: Path) -> None:
    assert _load(tmp_path, f"max_shard_size: {size}\n").max_shard_size == size


def test_a_dumped_run_loads_as_the_same_run(tmp_path: Path) -> None:
    config = _load(tmp_path, "keep: 0.4\nlearning_rate: 1e-5\nreport_to: wandb\n", "data.validation=höher.txt")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(path) == config
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(RunConfig.model_fields)


def test_settings_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        _load(tmp_path).seed = 3  # type: ignore[misc]


def test_derived_figures_follow_from_the_settings(tmp_path: Path) -> None:
    config = _load(tmp_path, "per_device_train_batch_size: 3\ngradient_accumulation_steps: 5\nsequence_length: 7\n")
    assert (config.sequences_per_step, config.tokens_per_step) == (15, 105)
    assert config.aux_rate == config.learning_rate
    assert _load(tmp_path, "aux_learning_rate: 1e-3\n").aux_rate == 1e-3


def test_errors_name_where_the_values_came_from() -> None:
    values: dict[str, Any] = {"base": "b", "output": "o", "data": {"train": ["t"]}, "sed": 1}
    with pytest.raises(RequestError, match=r"^arguments: sed is not a setting"):
        check_values(values, "arguments")


def test_every_setting_has_a_description_and_a_theme() -> None:
    for key, field in RunConfig.model_fields.items():
        assert field.description, key
        assert isinstance(field.json_schema_extra, dict), key
        assert field.json_schema_extra["theme"] in ("model", "data", "training", "memory", "output"), key
