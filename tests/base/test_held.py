"""A base that is held in memory: the same weights, and no file afterwards."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from pcscale.base.held import HeldBase
from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.model.loss import NextTokenLoss
from pcscale.run.folder import BASE_CACHE_NAME
from pcscale.storage.reader import TensorReader
from tests.projection.parts import CPU, Compression, copies, open_base, token_batches
from tests.reference import Weights
from tests.tiny import build_base

PRECISIONS = ("stored", "int8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that a test may take away."""
    return build_base(tmp_path / "base", "llama", False, dtype=torch.bfloat16)


@pytest.fixture(params=PRECISIONS)
def base(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> MappedBase | Int8Base:
    mapped = open_base(folder)
    return mapped if request.param == "stored" else Int8Base(mapped, tmp_path / BASE_CACHE_NAME)


def as_kept(base: MappedBase | Int8Base | HeldBase, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """Copies of the matrices in the precision that they are kept in."""
    return {name: [tensor.clone() for tensor in base.weight(name).tensors] for name in names}


def assert_same(found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert [tensor.dtype for tensor in found[name]] == [tensor.dtype for tensor in tensors]
        assert all(torch.equal(one, other) for one, other in zip(found[name], tensors, strict=True)), name


def take_files_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are mapped stay readable when they are deleted, so reading is made to fail as well."""
    shutil.rmtree(folder)
    for method in ("tensor", "data", "prefetch"):
        monkeypatch.setattr(TensorReader, method, None)


def test_a_held_base_gives_the_weights_of_its_base(base: MappedBase | Int8Base) -> None:
    held = HeldBase(base, CPU)
    assert_same(as_kept(held, base.matrix_names), as_kept(base, base.matrix_names))
    for name in base.matrix_names:
        assert torch.equal(held.weight(name).rows(torch.float32), base.weight(name).rows(torch.float32))
        assert held.weight(name).num_bytes == base.weight(name).num_bytes


def test_only_those_that_were_named_are_held(base: MappedBase | Int8Base) -> None:
    names = base.matrix_names[1::2]
    held = HeldBase(base, CPU, names)
    assert_same(as_kept(held, names), as_kept(base, names))
    with pytest.raises(KeyError, match=base.matrix_names[0]):
        held.weight(base.matrix_names[0])


def test_it_needs_no_file_afterwards(
    base: MappedBase | Int8Base, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = base.matrix_names
    expected, held = as_kept(base, names), HeldBase(base, CPU)
    take_files_away(folder.parent, monkeypatch)
    held.prefetch(names)
    assert_same(as_kept(held, names), expected)


def test_its_weights_share_one_block_and_none_with_the_files(base: MappedBase | Int8Base) -> None:
    held, size = HeldBase(base, CPU), sum(base.weight(name).num_bytes for name in base.matrix_names)
    tensors = [tensor for name in base.matrix_names for tensor in held.weight(name).tensors]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "none lies over another"
    assert sum(tensor.nbytes for tensor in tensors) == size
    mapped = {base.weight(name).values.untyped_storage().data_ptr() for name in base.matrix_names}
    assert tensors[0].untyped_storage().data_ptr() not in mapped


def test_losses_and_fingerprints_are_those_of_its_base(base: MappedBase | Int8Base) -> None:
    held, name = HeldBase(base, CPU), base.matrix_names[0]
    assert held.coded_fingerprints == base.coded_fingerprints
    found, expected = held.lost(name, slice(0, 256)), base.lost(name, slice(0, 256))
    assert found is expected is None if isinstance(base, MappedBase) else torch.equal(found, expected)


def test_another_device_holds_them_there(base: MappedBase | Int8Base) -> None:
    """`meta` stands for one that this machine may not have."""
    held = HeldBase(base, torch.device("meta"))
    for name in base.matrix_names:
        expected = [(tensor.shape, tensor.dtype) for tensor in base.weight(name).tensors]
        found = held.weight(name).tensors
        assert [(tensor.shape, tensor.dtype) for tensor in found] == expected
        assert {tensor.device.type for tensor in found} == {"meta"}


def test_codes_of_any_number_of_values_can_be_held(tmp_path: Path) -> None:
    """Scales begin at multiples of four bytes, wherever the codes before them end."""
    sizes = {"hidden_size": 30, "intermediate_size": 45, "vocab_size": 301}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    coded = Int8Base(open_base(build_base(tmp_path / "base", **sizes)), tmp_path / BASE_CACHE_NAME)
    assert any(coded.weight(name).values.numel() % 4 for name in coded.matrix_names)
    held = HeldBase(coded, CPU)
    assert_same(as_kept(held, coded.matrix_names), as_kept(coded, coded.matrix_names))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_the_same_to_the_last_bit(
    precision: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Weights] = []
    mapped = open_base(folder)
    base = mapped if precision == "stored" else Int8Base(mapped, tmp_path / BASE_CACHE_NAME)
    compression = Compression.of(folder)
    for held in (False, True):
        model = compression.model()
        optimizer = compression.optimizer(model, base=HeldBase(base, CPU) if held else base)
        if held:
            take_files_away(folder.parent, monkeypatch)
        for ids_BT in token_batches(3):
            NextTokenLoss(model)(ids_BT).backward()
            optimizer.step()
            optimizer.zero_grad()
        records = {
            f"{name}: {part}": tensor
            for name in optimizer.records
            for part, tensor in optimizer.records[name].tensors().items()
        }
        ends.append(records | copies(model))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
