"""What a DeepSpeed file makes of the compressed model's memory, and where it lies."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pcscale.common.ledger import ENGINE, GRADIENTS, WEIGHTS
from pcscale.distributed.zero_form import FILES_TO_CHOOSE, ZeroForm, forms_to_choose
from pcscale.memory.deployment import Parts, total

FOLDER = Path(__file__).parents[2] / "deepspeed_configs"
FORMS = {
    "zero1.json": ZeroForm(1, "device", "device", 50_000_000, 1_000_000_000),
    "zero2.json": ZeroForm(2, "device", "device", 100_000_000, 1_000_000_000),
    "zero2_offload.json": ZeroForm(2, "device", "cpu", 100_000_000, 1_000_000_000),
    "zero3.json": ZeroForm(3, "device", "device", 100_000_000, 300_000_000),
    "zero3_offload_cpu.json": ZeroForm(3, "cpu", "cpu", 100_000_000, 100_000_000),
    "zero3_offload_nvme.json": ZeroForm(3, "nvme", "nvme", 100_000_000, 100_000_000),
}
TABLE = {
    # Bytes a parameter: what does not depend on the ranks, and what is divided among them.
    "zero1.json": {"bf16": ((8, 4), (0, 0)), "float32": ((8, 4), (0, 0))},
    "zero2.json": {"bf16": ((2, 8), (0, 0)), "float32": ((4, 8), (0, 0))},
    "zero2_offload.json": {"bf16": ((2, 4), (0, 10)), "float32": ((4, 0), (0, 16))},
    "zero3.json": {"bf16": ((0, 10), (0, 0)), "float32": ((0, 12), (0, 0))},
    "zero3_offload_cpu.json": {"bf16": ((0, 0), (0, 14)), "float32": ((0, 0), (0, 16))},
    "zero3_offload_nvme.json": {"bf16": ((0, 0), (0, 4)), "float32": ((0, 0), (0, 4))},
}
"""deepspeed_configs/README.md: of the device and of the host."""
PARAMETERS = 8_000_000


def read(name: str) -> ZeroForm:
    return ZeroForm.read(json.loads((FOLDER / name).read_text())["zero_optimization"])


def sums(parts: Parts) -> tuple[int, int]:
    """Bytes of the device and of the host."""
    return total(parts.values(), "device"), total(parts.values(), "host", "pinned")


def test_every_file_of_the_folder_is_read() -> None:
    assert {path.name: read(path.name) for path in FOLDER.glob("*.json")} == FORMS


def test_an_empty_section_is_no_zero() -> None:
    assert ZeroForm.read({}) == ZeroForm() == ZeroForm(0, "device", "device", 500_000_000, 1_000_000_000)


def test_offloading_of_what_a_stage_does_not_part_is_not_read() -> None:
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    assert ZeroForm.read({"stage": 0, **offload}) == ZeroForm()
    assert ZeroForm.read({"stage": 2, **offload}) == ZeroForm(2, "device", "cpu")
    assert ZeroForm.read({"stage": 3, "offload_param": None}) == ZeroForm(3)
    assert ZeroForm.read({"stage": 3, "offload_param": {"device": "none"}}) == ZeroForm(3)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("name", TABLE)
def test_bytes_a_parameter_are_those_of_the_table(name: str, dtype: str, ranks: int) -> None:
    """The table leaves out what does not grow with the parameters: buckets and gathered values."""
    form = replace(read(name), bucket_values=0, live_values=0)
    found = sums(form.parts(PARAMETERS, 2 if dtype == "bf16" else 4, ranks, accumulates=True))
    of_device, of_host = TABLE[name][dtype]
    expected = [PARAMETERS * (whole + parted / ranks) for whole, parted in (of_device, of_host)]
    assert list(found) == expected


@pytest.mark.parametrize("name", TABLE)
def test_buckets_and_gathered_values_come_to_the_table_s_bytes(name: str) -> None:
    form = read(name)
    large = 10**9
    bare = sums(replace(form, bucket_values=0, live_values=0).parts(large, 4, 2, True))
    found = sums(form.parts(large, 4, 2, True))
    gathered = 4 * FORMS[name].live_values if form.stage == 3 else 0
    bucket = 4 * 50_000_000
    scattered = form.scattered_bytes(large, 2)
    assert scattered == (2 * bucket if form.stage == 3 else 0)
    assert found[0] - bare[0] - gathered - scattered in (bucket, 2 * bucket)
    assert found[1] == bare[1]


def test_buckets_are_no_larger_than_the_model() -> None:
    parts = ZeroForm(3).parts(1000, 4, 2, True)
    weights, copies, gathered, bucket, scattered = 4 * 500, 8 * 500, 4 * 1000, 4 * 1000, 4 * 1000
    assert sums(parts) == (weights + copies + gathered + bucket + scattered, 0)
    assert ZeroForm(3).scattered_bytes(1000, 1) == ZeroForm(2).scattered_bytes(1000, 2) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_zero_weights_and_gradients_are_whole(ranks: int) -> None:
    parts = replace(ZeroForm(), bucket_values=10).parts(PARAMETERS, 4, ranks, True)
    assert {name: part.num_bytes for name, part in parts.items()} == {
        WEIGHTS: 4 * PARAMETERS,
        GRADIENTS: 4 * PARAMETERS,
        ENGINE: 40 * (ranks > 1),
    }


def test_offloaded_gradients_are_kept_once_more_where_micro_batches_add_up() -> None:
    form = replace(read("zero2_offload.json"), bucket_values=0)
    once, adding = (sums(form.parts(PARAMETERS, 4, 2, accumulates)) for accumulates in (False, True))
    assert (adding[0] - once[0], adding[1] - once[1]) == (0, 4 * PARAMETERS // 2)
    once, adding = (sums(form.parts(PARAMETERS, 2, 2, accumulates)) for accumulates in (False, True))
    assert once == adding


def test_a_part_that_is_not_whole_is_rounded_up() -> None:
    parts = replace(ZeroForm(3), bucket_values=0, live_values=0).parts(10, 4, 3, True)
    assert parts[WEIGHTS].num_bytes == 4 * 4


@pytest.mark.parametrize("name", FILES_TO_CHOOSE)
def test_the_forms_to_choose_from_are_those_of_the_files(name: str) -> None:
    assert forms_to_choose()[name] == FORMS[f"{name}.json"]


def test_offloaded_weights_come_for_every_pass_and_gradients_go_for_every_micro_batch() -> None:
    part = PARAMETERS // 2
    offloaded = read("zero3_offload_cpu.json").moved_bytes(PARAMETERS, 2, ranks=2, micro_batches=3)
    assert offloaded == part * (2 * 3 * 2 + 3 * 4 + 2)
    assert read("zero2_offload.json").moved_bytes(PARAMETERS, 2, ranks=2, micro_batches=3) == part * (3 * 4 + 2)
    assert read("zero3.json").moved_bytes(PARAMETERS, 2, ranks=2, micro_batches=3) == 0


def test_the_forms_need_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from pcscale.distributed.zero_form import forms_to_choose; forms_to_choose(); "
        "sys.exit(bool({'torch', 'deepspeed'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
