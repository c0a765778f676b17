"""Which tensor goes into which file, and that neither cap nor shard size changes a tensor."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pcscale.merging.layout import lay_out
from tests.merging.trained import TrainedRun, assert_same_tensors, file_bytes, merge_run, merged_tensors

ONE, THREE, MANY = 10**9, 40_000, 2_000
"""Shard sizes for the 102 KB of the tiny model: one file, three, and one for every larger matrix."""
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged into a single file."""
    folder = tmp_path_factory.mktemp("whole") / "merged"
    merge_run(run, folder, max_shard_bytes=ONE)
    return folder


def _tensor_bytes(folder: Path) -> dict[str, dict[str, int]]:
    """By file and tensor, from the library."""
    shards = sorted(folder.glob("*.safetensors"))
    return {shard.name: {name: tensor.nbytes for name, tensor in load_file(shard).items()} for shard in shards}


def test_a_model_that_fits_one_file_has_no_index(whole: Path) -> None:
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(ONE, 1), (THREE, 3), (MANY, 21)])
def test_every_shard_size_gives_the_same_tensors(
    max_shard_bytes: int, shards: int, run: TrainedRun, whole: Path, tmp_path: Path
) -> None:
    result = merge_run(run, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert result.shards == len(files) == shards
    if shards > 1:
        assert files == [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    assert_same_tensors(merged_tensors(tmp_path / "merged"), merged_tensors(whole))


@pytest.mark.parametrize("max_shard_bytes", [ONE, THREE])
def test_every_cap_gives_the_same_bytes_in_every_file(max_shard_bytes: int, run: TrainedRun, tmp_path: Path) -> None:
    for name, max_memory_bytes in (("small", 64 * 2**20), ("large", 8 * 2**30)):
        merge_run(run, tmp_path / name, max_shard_bytes=max_shard_bytes, max_memory_bytes=max_memory_bytes)
    assert file_bytes(tmp_path / "small") == file_bytes(tmp_path / "large")


@pytest.mark.parametrize("max_shard_bytes", [THREE, MANY])
def test_the_index_names_every_tensor_where_it_lies_and_counts_their_bytes(
    max_shard_bytes: int, run: TrainedRun, tmp_path: Path
) -> None:
    merge_run(run, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    found = _tensor_bytes(tmp_path / "merged")
    assert index["weight_map"] == {name: shard for shard, sizes in found.items() for name in sizes}
    assert index["metadata"]["total_size"] == sum(sum(sizes.values()) for sizes in found.values())
    assert index["weight_map"].keys() == run.weights.keys()


@pytest.mark.parametrize("max_shard_bytes", [THREE, MANY])
def test_no_file_is_larger_than_asked_for_unless_one_tensor_is(
    max_shard_bytes: int, run: TrainedRun, tmp_path: Path
) -> None:
    merge_run(run, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    alone = []
    for sizes in _tensor_bytes(tmp_path / "merged").values():
        assert sum(sizes.values()) <= max_shard_bytes or len(sizes) == 1
        alone += [name for name, size in sizes.items() if size > max_shard_bytes]
    larger = {name for name, weight in run.weights.items() if weight.nbytes > max_shard_bytes}
    assert set(alone) == larger
    assert bool(larger) == (max_shard_bytes == MANY)


@pytest.mark.parametrize("max_shard_bytes", [1, MANY, 10_000, THREE, ONE])
def test_files_are_as_full_as_the_limit_allows_and_in_the_order_of_the_model(
    max_shard_bytes: int, run: TrainedRun
) -> None:
    dtypes = dict.fromkeys((planned.name for planned in run.plan.weights), torch.bfloat16)
    shards = lay_out(run.plan, dtypes, max_shard_bytes)
    assert [planned for shard in shards for planned in shard.weights] == list(run.plan.weights)
    for shard, following in itertools.pairwise(shards):
        filled = sum(2 * math.prod(planned.shape) for planned in shard.weights)
        assert filled + 2 * math.prod(following.weights[0].shape) > max_shard_bytes


def test_files_say_that_they_hold_torch_tensors(whole: Path) -> None:
    with safe_open(whole / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_result_counts_what_was_written(run: TrainedRun, tmp_path: Path) -> None:
    result = merge_run(run, tmp_path / "merged", max_shard_bytes=THREE, max_memory_bytes=2**30)
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert result.output == str(tmp_path / "merged")
    assert result.tensors == len(run.weights)
    assert result.bytes_written == sum(path.stat().st_size for path in files)
    assert result.max_memory_bytes == 2**30
    assert result.seconds > 0
    assert result.peak_anonymous_bytes > 0
