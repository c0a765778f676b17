"""What run.yaml and key=value arguments are refused for, and in which words."""

import re
from pathlib import Path

import pytest
import yaml

from pcscale.common.errors import RequestError
from pcscale.config.load import read_values
from tests.config.files import NEEDED, load, refusal


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
    assert refusal(tmp_path, line + "\n") == message


@pytest.mark.parametrize("key", ["teach", "optimizer", "learn_start"])
def test_a_setting_of_no_part_that_is_there_is_unknown(key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, f"{key}: 1\n").startswith(f"{key} is not a setting. Did you mean ")


def test_an_unknown_key_in_a_group_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "data.trian=x") == "data.trian is not a setting. Did you mean 'data.train'?"
    assert refusal(tmp_path, "", "distill.cach=x") == "distill.cach is not a setting. Did you mean 'distill.cache'?"


def test_an_unknown_argument_is_refused_like_an_unknown_key(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "sed=1") == "sed is not a setting. Did you mean 'seed'?"


def test_an_unknown_key_is_named_before_the_missing_one_it_was_meant_for(tmp_path: Path) -> None:
    message = refusal(tmp_path, needed="bass: b\noutput: o\ndata: {train: [t]}\n")
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
        (
            "start: random",
            "start is 'random': this version takes only 'selection', 'rescaled', 'least_squares', 'pca' or "
            "'pca_least_squares'.",
        ),
        ("base_home: gpu", "base_home is 'gpu': this version takes only 'disk', 'cpu', 'device' or 'zero'."),
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
        ("deepspeed: 3", "deepspeed is 3: input should be a valid string."),
        ("deepspeed: {stage: 3}", "deepspeed is {'stage': 3}: input should be a valid string."),
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
    assert refusal(tmp_path, line + "\n", needed=needed).startswith(message)


def test_a_wrong_type_in_a_list_names_the_list(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "data.train=[3]") == "data.train is 3: input should be a valid string."
    assert refusal(tmp_path, "", "data.train=[]").startswith("data.train is []: list should have at least 1 item")


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
        ("deepspeed: ''", "deepspeed is '': string should have at least 1 character."),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(line: str, message: str, tmp_path: Path) -> None:
    needed = yaml.safe_dump({"base": "b", "output": "o", "data": {"train": ["t"]}} | yaml.safe_load(line))
    assert refusal(tmp_path, needed=needed).startswith(message)


@pytest.mark.parametrize("key", ["keep", "target_params", "learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: str, tmp_path: Path) -> None:
    assert re.match(
        rf"{key} is \S+: input should be (a finite number|greater|less)", refusal(tmp_path, f"{key}: {value}")
    )


def test_nan_is_refused_as_not_finite(tmp_path: Path) -> None:
    assert refusal(tmp_path, "learning_rate: .nan\n") == "learning_rate is nan: input should be a finite number."


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: 1\nseed: 2\n")
    assert "is not valid YAML: the key 'seed' stands twice" in message
    assert "line 6, column 1" in message


def test_a_key_that_stands_twice_in_a_group_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, needed="base: b\noutput: o\ndata:\n  train: [a]\n  train: [b]\n")
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
        pytest.param(f"keep: {'[' * 9000}\n", id="nested"),
    ],
)
def test_broken_yaml_is_refused(more: str, tmp_path: Path) -> None:
    assert "is not valid YAML: " in refusal(tmp_path, more)


def test_a_broken_argument_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^the value of keep is not valid YAML: "):
        load(tmp_path, "", "keep=[0.5")


@pytest.mark.parametrize("argument", ["keep", "=3", ""])
def test_an_argument_without_key_and_value_is_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^'{argument}' is not of the form key=value"):
        load(tmp_path, "", argument)


def test_an_argument_into_a_setting_that_is_no_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^base holds no settings of its own, so base\.train cannot be set"):
        load(tmp_path, "", "base.train=x")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n", "# nothing but a comment\n"])
def test_a_file_without_settings_is_refused(content: str, tmp_path: Path) -> None:
    assert "holds no settings. Write one `key: value` a line." in refusal(tmp_path, needed=content)


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
