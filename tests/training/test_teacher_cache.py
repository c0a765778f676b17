"""A teacher's folder as it is read: how many files are open at a time, and what memory it takes."""

import gc
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pcscale.common.allocator import release_freed
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES
from pcscale.config.schema import DistillConfig
from pcscale.memory.process import anonymous_bytes
from pcscale.training.teacher import CachedTeacher
from pcscale.training.teacher_cache import (
    OPEN_SHARDS,
    SequenceAddress,
    TeacherCache,
    TeacherManifest,
    shard_name,
    write_shard,
)
from tests.memory.touched import SIZE, SLACK


def build_cache(folder: Path, shards: list[torch.Tensor]) -> TeacherCache:
    """A folder with a shard for each of some sequences `[N, T]`; targets are their own ids and the next higher ones."""
    written = {}
    for number, ids_NT in enumerate(shards):
        top_NTk = ids_NT[:, :, None] + torch.arange(2)
        name = shard_name(number)
        written[name] = write_shard(folder / name, ids_NT, [(top_NTk, -top_NTk.float())], vocab_size=2**15)
    base = {"base_name": "-", "base_revision": None, "base_config": {}, "base_fingerprints": {}}
    made = {"sequence_length": shards[0].shape[1], "top_k": 2, "temperature": 1.0, "dtype": "float32"}
    return TeacherCache(folder, TeacherManifest(**base, **made, shards=written))


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open some half as many files more as there are shards in the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (is_open + 2 * OPEN_SHARDS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_a_folder_may_have_more_shards_than_a_process_may_have_files_open(tmp_path: Path) -> None:
    ids_NT = torch.arange(4 * OPEN_SHARDS)[:, None] + torch.arange(3)
    cache = build_cache(tmp_path, list(ids_NT.split(1)))
    teacher = CachedTeacher(cache, DistillConfig(top_k=2), ids_NT, more="", check=True)
    ((top_BTk, log_p_BTk),) = teacher.targets([ids_NT])
    expected = ids_NT[:, :, None] + torch.arange(2)
    assert torch.equal(top_BTk, expected.int())
    assert torch.equal(log_p_BTk, -expected.float())


@pytest.mark.parametrize("count", [2**12, 2**13 - 1, 10_000, 12_000])
def test_an_address_takes_what_is_predicted_also_while_it_is_looked_for(count: int, tmp_path: Path) -> None:
    ids_NT = torch.arange(count)[:, None]
    cache = build_cache(tmp_path, list(ids_NT.split(2**12)))
    gc.collect()
    tracemalloc.start()
    teacher = CachedTeacher(cache, DistillConfig(top_k=2), (ids_NT[row] for row in range(count)), more="", check=False)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del teacher
    assert (held / count, most / count) == pytest.approx((CACHED_SEQUENCE_BYTES, CACHED_SEQUENCE_BYTES), rel=0.15)


class Watched(TeacherCache):
    """Looks at memory when sequences are looked for."""

    held = 0

    def addresses(self) -> Iterator[tuple[bytes, SequenceAddress]]:
        self.held = anonymous_bytes()
        return super().addresses()


def test_the_text_is_not_copied_to_be_found(tmp_path: Path) -> None:
    train_NT = torch.ones(2**10, SIZE // 2**12, dtype=torch.int32)
    cache = Watched(tmp_path, build_cache(tmp_path, [train_NT[:1]]).manifest)
    distill = DistillConfig(top_k=2, cache=str(tmp_path))
    release_freed()
    before = anonymous_bytes()
    CachedTeacher(cache, distill, (train_NT[row] for row in range(len(train_NT))), more="", check=True)
    assert cache.held - before < SLACK
