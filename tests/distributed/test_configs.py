"""The DeepSpeed files that come with pcscale, and what is refused of a user's."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.config.schema import RunConfig
from pcscale.distributed.settings import read_engine_settings
from tests.runs import World, run_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deepspeed_configs"
FILES = sorted(FOLDER.glob("*.json"))

# Prints what DeepSpeed's own class has made of each of the settings, a JSON list, on standard input.
_PROGRAM = """
import json, logging, sys
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger

class Deaf(logging.Handler):
    def emit(self, record):
        assert record.levelno < logging.WARNING, record.getMessage()

logger.addHandler(Deaf())
found = []
for settings in json.load(sys.stdin):
    zero = DeepSpeedConfig(settings).zero_config
    offloads = (zero.offload_param, zero.offload_optimizer)
    found.append([int(zero.stage), *(offload and offload.device for offload in offloads)])
print("FOUND", json.dumps(found))
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda **changes: run_config(World(tmp_path / "base", tmp_path / "text"), tmp_path / "run", **changes)


@pytest.fixture
def refused(tmp_path: Path, config: Callable[..., RunConfig]) -> Callable[..., str]:
    """`refused(values, bf16=True)`: the text of the refusal of a file with these values, less the file's path."""

    def text(values: Any, **changes: Any) -> str:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        with pytest.raises(RequestError) as caught:
            read_engine_settings(str(path), config(**changes), world_size=2)
        assert str(path) in str(caught.value)
        return str(caught.value).replace(str(path), "FILE")

    return text


def _table() -> dict[str, list[Any]]:
    """File → stage and the devices of offload_param and offload_optimizer, as the README's table has them."""
    rows = re.findall(
        r"^\| `(\S+\.json)` \| (\d) \| (-|cpu|nvme) \| (-|cpu|nvme) \|",
        (FOLDER / "README.md").read_text(),
        re.MULTILINE,
    )
    return {
        name: [int(stage), *(None if device == "-" else device for device in devices)] for name, stage, *devices in rows
    }


def test_deepspeed_reads_every_file_as_the_table_says(config: Callable[..., RunConfig]) -> None:
    filled = [
        read_engine_settings(str(path), config(bf16=bf16), world_size=1).values
        for bf16 in (False, True)
        for path in FILES
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        input=json.dumps(filled),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("FOUND")[1])
    table = _table()
    assert sorted(table) == [path.name for path in FILES]
    assert found == [table[path.name] for path in FILES] * 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_leaves_to_run_yaml_what_is_decided_there(path: Path, config: Callable[..., RunConfig]) -> None:
    assert json.loads(path.read_text(encoding="utf-8")).keys() == {"zero_optimization"}
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "bf16": True, "max_grad_norm": 0.5}
    filled = read_engine_settings(path.stem, config(**changes), world_size=4).values
    assert filled["train_micro_batch_size_per_gpu"] == 3
    assert filled["gradient_accumulation_steps"] == 5
    assert filled["train_batch_size"] == 3 * 5 * 4
    assert filled["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert filled["data_types"] == {"grad_accum_dtype": "fp32"}
    assert filled["gradient_clipping"] == 0.0  # pcscale clips.
    assert filled["zero_optimization"] == json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]


@pytest.mark.parametrize(
    ("values", "changes", "text"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            "FILE: train_micro_batch_size_per_gpu is 8, run.yaml has per_device_train_batch_size 2. "
            'Remove it from the file, or set it to "auto".',
        ),
        (
            {"gradient_accumulation_steps": 3},
            {},
            "gradient_accumulation_steps is 3, run.yaml has gradient_accumulation_steps 2",
        ),
        ({"train_batch_size": 4}, {}, "train_batch_size is 4, run.yaml has the batch of a step, over all ranks, 8"),
        ({"gradient_clipping": 0.25}, {}, "gradient_clipping is 0.25, run.yaml has max_grad_norm 1.0"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is True, run.yaml has bf16 False"),
        ({"bf16": {"enabled": False}}, {"bf16": True}, "bf16.enabled is False, run.yaml has bf16 True"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            {"bf16": True},
            "data_types.grad_accum_dtype is 'bf16', run.yaml has gradient_dtype 'fp32'",
        ),
    ],
)
def test_a_contradiction_is_refused_with_both_values(
    values: Any, changes: dict[str, Any], text: str, refused: Callable[..., str]
) -> None:
    assert text in refused(values, **changes)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("optimizer", {"type": "AdamW"}, "pcscale is the optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "pcscale sets the rates"),
        ("fp16", {"enabled": True}, "pcscale runs in float32 or bfloat16"),
        ("fp16", {"enabled": "auto"}, "pcscale runs in float32 or bfloat16"),
        ("bfloat16", {"enabled": True}, "it is called bf16"),
    ],
)
def test_what_pcscale_brings_itself_is_refused(key: str, value: Any, reason: str, refused: Callable[..., str]) -> None:
    assert refused({key: value}) == f"FILE: {key} has no place here: {reason}. Remove it."


@pytest.mark.parametrize("key", ["zero_optimization", "bf16", "data_types"])
@pytest.mark.parametrize("value", [True, None, [1], "auto"])
def test_a_section_that_is_no_object_is_refused(key: str, value: Any, refused: Callable[..., str]) -> None:
    assert refused({key: value}) == f"FILE: {key} is {value!r}: expected an object of settings."


@pytest.mark.parametrize("stage", [4, -1, "2", None])
def test_a_stage_that_is_none_is_refused(stage: Any, refused: Callable[..., str]) -> None:
    text = refused({"zero_optimization": {"stage": stage}})
    assert text == f"FILE: zero_optimization.stage is {stage!r}: expected 0, 1, 2 or 3."


def test_a_list_is_refused(refused: Callable[..., str]) -> None:
    assert refused([]) == "FILE holds no settings: expected one JSON object."


def test_a_file_that_is_no_json_is_refused(refused: Callable[..., str]) -> None:
    assert "JSON" in refused("stage: 2")


def test_a_missing_file_is_refused(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    path = tmp_path / "absent.json"
    with pytest.raises(RequestError, match=re.escape(f"{path} does not exist. Name a file, or one that comes with")):
        read_engine_settings(str(path), config(), world_size=1)


def test_auto_takes_the_value_of_run_yaml_and_keys_of_other_matters_stay(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    path = tmp_path / "ds.json"
    values = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 1},
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    filled = read_engine_settings(str(path), config(bf16=True), world_size=2).values
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (2, 2)
    assert (filled["train_batch_size"], filled["gradient_clipping"]) == (8, 0.0)
    assert filled["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert filled["fp16"] == {"enabled": False}
    assert filled["wall_clock_breakdown"] is False
    assert "auto" not in json.dumps(filled)
