"""The base in 8 bits: coded once per base, never taken for another, and what it loses is known to the last bit."""

import errno
import multiprocessing
import os
import re
import shutil
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch

from pcscale.base import int8
from pcscale.base.int8 import CACHE_NAME, Int8Base
from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.importance.select import KeptIndices
from pcscale.projection.layout import RecordFormat
from tests.projection.parts import Compression, copies, open_base, random_kept
from tests.reference import Weights, hard_pruned
from tests.tiny import build_base
from tests.training import children

WIDE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24, "vocab_size": 1300}
"""A vocabulary above 1024 and no multiple of 256, which is what rows are coded, decoded and compared in."""
NARROW = {"hidden_size": 72, "intermediate_size": 120}
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
RELATIVE_ERROR = (0.009, 0.013)
"""Root mean square, of normal values: seven steps a decade on average, in blocks of 256."""
FLOAT32_START_TOLERANCE = 2**-23
"""Of a matrix's largest entry. Q + (W - Q) rounds to 2^-24 of itself, and W - Q, which is far smaller, likewise."""
BFLOAT16_START_TOLERANCE = 2**-14
"""Likewise. aux is at most some 2^-6 of the largest entry, and rounds to 2^-9 of itself."""
WAIT_SECONDS = 60

pytestmark = pytest.mark.filterwarnings("ignore:create_dynamic_map")  # bitsandbytes calls its own deprecated function.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, read only."""
    return build_base(tmp_path_factory.mktemp("wide") / "base", "llama", True, **WIDE)


@pytest.fixture(scope="module")
def compression(folder: Path) -> Compression:
    return Compression.of(folder, **NARROW)


@pytest.fixture(scope="module")
def coded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Int8Base:
    """Read only; copy its cache to change it."""
    return Int8Base(open_base(folder), tmp_path_factory.mktemp("coded") / CACHE_NAME)


@pytest.fixture
def cache(coded: Int8Base, tmp_path: Path) -> Path:
    """A whole cache of its own."""
    return Path(shutil.copyfile(coded.cache, tmp_path / CACHE_NAME))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a user is warned of."""
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    return said


def seen_by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """A matrix after bitsandbytes' own way there and back."""
    return bitsandbytes.functional.dequantize_blockwise(
        *bitsandbytes.functional.quantize_blockwise(weight.float(), blocksize=256)
    )


def whole(base: Int8Base, name: str) -> torch.Tensor:
    return base.weight(name).rows(torch.float32)


def state_of(path: Path) -> tuple[int, int, bytes]:
    """What changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


# What the codes are.


def test_weights_are_those_that_bitsandbytes_codes_and_decodes(coded: Int8Base, compression: Compression) -> None:
    assert coded.matrix_names == [planned.name for planned in compression.plan.matrices]
    for name in coded.matrix_names:
        assert torch.equal(whole(coded, name), seen_by_bitsandbytes(compression.weights[name])), name


def test_a_base_in_half_precision_is_coded_from_what_is_stored(tmp_path: Path) -> None:
    base = open_base(build_base(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB"))
    coded = Int8Base(base, tmp_path / CACHE_NAME)
    for name in coded.matrix_names:
        assert torch.equal(whole(coded, name), seen_by_bitsandbytes(base.tensor(name)))


def test_a_value_takes_a_byte_and_256_of_them_a_scale(coded: Int8Base, compression: Compression) -> None:
    for planned in compression.plan.matrices:
        weight, count = coded.weight(planned.name), compression.weights[planned.name].numel()
        assert weight.shape == planned.base_shape
        assert weight.num_bytes == count + 4 * -(-count // 256)


def test_eight_bits_lose_about_a_hundredth(coded: Int8Base, compression: Compression) -> None:
    for name in coded.matrix_names:
        stored = compression.weights[name]
        error = (whole(coded, name) - stored).norm() / stored.norm()
        assert RELATIVE_ERROR[0] < error < RELATIVE_ERROR[1], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_blocks_are_those_of_the_whole(dtype: torch.dtype, coded: Int8Base) -> None:
    weight = coded.weight(EMBEDDING)
    expected = weight.rows(dtype)
    assert expected.dtype == dtype
    parts = [weight.rows(dtype, start, start + 512) for start in range(0, WIDE["vocab_size"], 512)]
    assert torch.equal(torch.cat(parts), expected)


# What the codes lose.


def sides(kept: KeptIndices, name: str, shuffled: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The kept indices of an embedding, or of an up projection."""
    generator = torch.Generator().manual_seed(4)

    def order(indices: torch.Tensor) -> torch.Tensor:
        return indices[torch.randperm(len(indices), generator=generator)] if shuffled else indices

    return None if name == EMBEDDING else order(kept["ffn.1"]), order(kept["residual"])


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("name", [EMBEDDING, UP])
def test_the_loss_is_what_is_missing_of_the_kept_entries(
    name: str, shuffled: bool, coded: Int8Base, compression: Compression
) -> None:
    kept_out, kept_in = sides(compression.kept, name, shuffled)
    expected = compression.weights[name] - seen_by_bitsandbytes(compression.weights[name])
    if kept_out is not None:
        expected = expected[kept_out]
    if kept_in is not None:
        expected = expected[:, kept_in]
    found = coded.loss(name, kept_out, kept_in)
    assert found.dtype == torch.float32
    assert found.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [EMBEDDING, UP])
def test_the_loss_of_rows_in_any_order(name: str, coded: Int8Base, compression: Compression) -> None:
    """Rows from several of the blocks that it is computed in, and columns that keep their size."""
    stored = compression.weights[name]
    rows = torch.randperm(len(stored), generator=torch.Generator().manual_seed(2))[: len(stored) * 2 // 3]
    expected = (stored - seen_by_bitsandbytes(stored))[rows]
    assert torch.equal(coded.loss(name, rows, None), expected)
    assert torch.equal(coded.loss(name, None, None), stored - seen_by_bitsandbytes(stored))


# The start.


@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        (RecordFormat(), FLOAT32_START_TOLERANCE),
        (RecordFormat(rank=8), FLOAT32_START_TOLERANCE),
        (RecordFormat("bfloat16", "8bit"), BFLOAT16_START_TOLERANCE),
    ],
    ids=["float32", "low rank", "bfloat16"],
)
def test_the_start_is_the_hard_pruned_model(
    form: RecordFormat, tolerance: float, coded: Int8Base, compression: Compression
) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model, base=coded, form=form)
    expected = hard_pruned(compression.weights, compression.kept)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in optimizer.records:
                parameter.zero_()
    optimizer.compose_all()
    for name, weight in copies(model).items():
        assert (weight - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name
    coarse = whole(coded, EMBEDDING)[:, compression.kept["residual"]]
    difference = (coarse - expected[EMBEDDING]).abs().max()
    assert difference > 10 * tolerance * expected[EMBEDDING].abs().max(), "aux has something to make up for"


def test_the_sweep_reads_codes_alone(
    coded: Int8Base, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model, base=coded)
    monkeypatch.setattr(coded.stored, "tensor", None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.records.traffic.base_read == sum(coded.weight(name).num_bytes for name in coded.matrix_names)


def auxes(optimizer: Any) -> Weights:
    return {name: optimizer.records[name].parts["aux"].value.float() for name in optimizer.records}


@pytest.mark.parametrize(
    ("form", "tolerance"),
    # What a step of bfloat16 is of the largest entry; of float32 the rounding of a dozen steps.
    [(RecordFormat(), 2**-18), (RecordFormat("bfloat16", "8bit"), 2**-7)],
    ids=["float32", "bfloat16"],
)
def test_weight_decay_pulls_aux_towards_its_start(
    form: RecordFormat, tolerance: float, coded: Int8Base, compression: Compression
) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model, base=coded, form=form, lr=0.1, aux_lr=0.1, weight_decay=2.0)
    start = auxes(optimizer)
    away = "model.layers.0.mlp.down_proj.weight"
    record = optimizer.records[away].tensors()
    optimizer.records.home.create(away, record | {"aux": record["aux"].float() + 1.0})
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, aux in auxes(optimizer).items():
        assert start[name].any()
        if name != away:
            assert (aux - start[name]).abs().max() <= tolerance * start[name].abs().max(), name
    # A fifth of the way is made in each step.
    left = (auxes(optimizer)[away] - start[away]).mean().item()
    assert left == pytest.approx(0.8**12, rel=0.05)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_record_keeps_the_start_of_aux_only_where_decay_needs_it(
    weight_decay: float, coded: Int8Base, compression: Compression
) -> None:
    for base, wanted in ((coded, weight_decay > 0), (compression.base, False)):
        optimizer = compression.optimizer(compression.model(), base=base, weight_decay=weight_decay)
        assert {("aux_start" in layout) for layout in optimizer.records.layouts.values()} == {wanted}
        if wanted:
            record = optimizer.records[UP]
            assert torch.equal(
                record.aux_start, coded.loss(UP, compression.kept["ffn.1"], compression.kept["residual"])
            )


# The cache.


def test_the_cache_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / CACHE_NAME
    first = Int8Base(open_base(folder), cache)
    before = state_of(cache)
    monkeypatch.setattr(int8, "ShardWriter", None)
    second = Int8Base(open_base(folder), cache)
    assert state_of(cache) == before
    assert second.coded_fingerprints == first.coded_fingerprints
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {CACHE_NAME}
    for name in first.matrix_names:
        assert torch.equal(whole(first, name), whole(second, name))


def test_two_caches_of_one_base_are_equal_to_the_last_byte(coded: Int8Base, folder: Path, tmp_path: Path) -> None:
    again = Int8Base(open_base(folder), tmp_path / CACHE_NAME)
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
    cache = tmp_path / CACHE_NAME
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
    with pytest.raises(RunError, match=rf"{CACHE_NAME}: the disk is full\. Nothing was replaced"):
        Int8Base(open_base(folder), tmp_path / CACHE_NAME)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_failure_while_coding_leaves_no_cache_and_lets_the_next_one_try(
    coded: Int8Base, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "encode_weight", None)
    with pytest.raises(TypeError):
        Int8Base(open_base(folder), tmp_path / CACHE_NAME)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.undo()
    assert Int8Base(open_base(folder), tmp_path / CACHE_NAME).coded_fingerprints == coded.coded_fingerprints


def test_what_a_disk_gives_back_otherwise_than_written_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = int8._write_cache

    def damaged(cache: Path, base: Any) -> None:
        write(cache, base)
        flip(cache, -1)

    monkeypatch.setattr(int8, "_write_cache", damaged)
    monkeypatch.setattr(console, "warn", lambda text: None)
    cache = tmp_path / CACHE_NAME
    message = f"{cache} is not what was written to it just now. Check the disk."
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        Int8Base(open_base(folder), cache)


def test_kept_indices_are_scattered(compression: Compression) -> None:
    """Or the tests of what is lost would pass on a prefix."""
    kept = random_kept(compression.plan)
    assert all(not torch.equal(indices, torch.arange(len(indices))) for indices in kept.values())
