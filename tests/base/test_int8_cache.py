"""The cache of codes: made once per base, never taken for another's, whole or not there."""

import errno
import multiprocessing
import os
import re
import shutil
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.base import int8
from pcscale.base.int8 import Int8Base
from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.run.folder import BASE_CACHE_NAME
from tests import children
from tests.base.coded import UP, WIDE, coded, compression, folder, seen_by_bitsandbytes, whole
from tests.projection.parts import open_base
from tests.tiny import build_base

__all__ = ["coded", "compression", "folder"]

WAIT_SECONDS = 60

pytestmark = pytest.mark.filterwarnings("ignore:create_dynamic_map")  # bitsandbytes calls its own deprecated function.


@pytest.fixture
def cache(coded: Int8Base, tmp_path: Path) -> Path:
    """A whole cache of its own."""
    return Path(shutil.copyfile(coded.cache, tmp_path / BASE_CACHE_NAME))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a user is warned of."""
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    return said


def state_of(path: Path) -> tuple[int, int, bytes]:
    """What changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


def test_the_cache_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / BASE_CACHE_NAME
    first = Int8Base(open_base(folder), cache)
    before = state_of(cache)
    monkeypatch.setattr(int8, "ShardWriter", None)
    second = Int8Base(open_base(folder), cache)
    assert state_of(cache) == before
    assert second.coded_fingerprints == first.coded_fingerprints
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {BASE_CACHE_NAME}
    for name in first.matrix_names:
        assert torch.equal(whole(first, name), whole(second, name))


def test_two_caches_of_one_base_are_equal_to_the_last_byte(coded: Int8Base, folder: Path, tmp_path: Path) -> None:
    again = Int8Base(open_base(folder), tmp_path / BASE_CACHE_NAME)
    assert again.cache.read_bytes() == coded.cache.read_bytes()
    assert again.coded_fingerprints == coded.coded_fingerprints


def test_every_matrix_has_a_fingerprint_of_its_own(coded: Int8Base) -> None:
    assert list(coded.coded_fingerprints) == coded.matrix_names
    assert len(set(coded.coded_fingerprints.values())) == len(coded.matrix_names)


def test_a_cache_of_another_base_is_made_again(cache: Path, tmp_path: Path, warnings: list[str]) -> None:
    other = open_base(build_base(tmp_path / "other", "llama", True, seed=5, **WIDE))
    coded = Int8Base(other, cache)
    assert warnings == [f"{cache} is of another base: it is made again"]
    for name in coded.matrix_names:
        assert torch.equal(whole(coded, name), seen_by_bitsandbytes(other.tensor(name)))
    Int8Base(other, cache)
    assert len(warnings) == 1


def test_a_norm_that_changed_makes_it_another_base(
    cache: Path, folder: Path, tmp_path: Path, warnings: list[str]
) -> None:
    """Though no matrix has changed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "other" / "config.json")
    Int8Base(open_base(tmp_path / "other"), cache)
    assert warnings == [f"{cache} is of another base: it is made again"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["codes", "a scale", "the fingerprints", "the header"])
def test_a_cache_with_a_flipped_bit_is_made_again(
    where: str, cache: Path, coded: Int8Base, folder: Path, warnings: list[str]
) -> None:
    from pcscale.storage.index import read_header

    entries = read_header(cache)[0]
    scale = entries[f"{UP}.absmax"]
    positions = {
        "codes": entries[UP].start + 1000,
        "a scale": scale.start + 4,
        "the fingerprints": cache.stat().st_size - 1,
        "the header": cache.read_bytes().index(b'"dtype":"U8"') + 9,
    }
    flip(cache, positions[where])
    again = Int8Base(open_base(folder), cache)
    assert warnings == [f"{cache} was changed or cut short: it is made again"]
    assert cache.read_bytes() == coded.cache.read_bytes()
    assert torch.equal(whole(again, UP), whole(coded, UP))


@pytest.mark.parametrize("size", [0, 5, 100, -1, -20_000])
def test_a_cache_that_was_cut_short_is_made_again(
    size: int, cache: Path, coded: Int8Base, folder: Path, warnings: list[str]
) -> None:
    os.truncate(cache, size if size >= 0 else cache.stat().st_size + size)
    Int8Base(open_base(folder), cache)
    assert warnings == [f"{cache} was changed or cut short: it is made again"]
    assert cache.read_bytes() == coded.cache.read_bytes()


def test_who_reads_a_cache_is_not_disturbed_when_it_is_made_again(
    cache: Path, coded: Int8Base, folder: Path, tmp_path: Path, warnings: list[str]
) -> None:
    """Another run folder's process may have it mapped."""
    reading = Int8Base(open_base(folder), cache)
    Int8Base(open_base(build_base(tmp_path / "other", "llama", True, seed=5, **WIDE)), cache)
    assert len(warnings) == 1
    for name in coded.matrix_names:
        assert torch.equal(whole(reading, name), whole(coded, name))


def _open_at_once(folder: Path, cache: Path, barrier: Barrier, results: Any) -> None:
    """A process: opens the base as the other does, and says how often it made a cache and what it found."""
    torch.set_num_threads(1)
    made, write = 0, int8._write_cache

    def slowly(*arguments: Any) -> None:
        nonlocal made
        made += 1
        time.sleep(0.2)  # The other one is at the lock by now.
        write(*arguments)

    int8._write_cache = slowly
    base = open_base(folder)
    base.check_all()
    barrier.wait(WAIT_SECONDS)
    fingerprints = Int8Base(base, cache).coded_fingerprints
    results.put((made, fingerprints))


def test_two_processes_at_once_make_one_cache(coded: Int8Base, folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([children.__name__])  # The server that other tests use.
    barrier, results = context.Barrier(2), context.Queue()
    cache = tmp_path / BASE_CACHE_NAME
    processes = [context.Process(target=_open_at_once, args=(folder, cache, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=WAIT_SECONDS) for _ in processes]
    for process in processes:
        process.join(WAIT_SECONDS)
        assert process.exitcode == 0
    assert sorted(made for made, _ in found) == [0, 1]
    assert [fingerprints for _, fingerprints in found] == [coded.coded_fingerprints] * 2
    assert cache.read_bytes() == coded.cache.read_bytes()
    assert not list(tmp_path.glob(".partial-*"))


# Refusals.


def test_codes_that_a_checkpoint_was_trained_on_are_accepted(coded: Int8Base, cache: Path, folder: Path) -> None:
    again = Int8Base(open_base(folder), cache, coded.coded_fingerprints)
    assert again.coded_fingerprints == coded.coded_fingerprints


def test_other_codes_than_a_checkpoint_was_trained_on_are_refused(coded: Int8Base, cache: Path, folder: Path) -> None:
    found = coded.coded_fingerprints[UP]
    message = (
        f"{UP} has 8-bit codes with fingerprint {found[:12]}…, the checkpoint was trained on 000000000000…. "
        "Use the bitsandbytes version that it was trained with."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        Int8Base(open_base(folder), cache, coded.coded_fingerprints | {UP: "0" * 32})


def test_without_bitsandbytes_8_bits_are_refused(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcscale.storage.blockwise.find_spec", lambda name: None)
    message = "base_precision int8 needs the package bitsandbytes. Run `pip install bitsandbytes`."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        Int8Base(open_base(folder), cache)


def test_a_full_disk_leaves_no_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=rf"{BASE_CACHE_NAME}: the disk is full\. Nothing was replaced"):
        Int8Base(open_base(folder), tmp_path / BASE_CACHE_NAME)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_failure_while_coding_leaves_no_cache_and_lets_the_next_one_try(
    coded: Int8Base, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "encode_weight", None)
    with pytest.raises(TypeError):
        Int8Base(open_base(folder), tmp_path / BASE_CACHE_NAME)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.undo()
    assert Int8Base(open_base(folder), tmp_path / BASE_CACHE_NAME).coded_fingerprints == coded.coded_fingerprints


def test_what_a_disk_gives_back_otherwise_than_written_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = int8._write_cache

    def damaged(cache: Path, base: Any) -> None:
        write(cache, base)
        flip(cache, -1)

    monkeypatch.setattr(int8, "_write_cache", damaged)
    monkeypatch.setattr(console, "warn", lambda text: None)
    cache = tmp_path / BASE_CACHE_NAME
    message = f"{cache} is not what was written to it just now. Check the disk."
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        Int8Base(open_base(folder), cache)
