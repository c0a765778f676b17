"""A frozen base weight, stored or in 8 bits: its rows, its blocks, its copies."""

import bitsandbytes.functional
import pytest
import torch

from pcscale.base import weight as module
from pcscale.base.weight import FrozenWeight, encode_weight

CPU = torch.device("cpu")
STORED = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(520, 512), (520, 300), (3, 256), (1, 7)]
"""Rows that are whole blocks of codes, and rows over whose ends they run."""

all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:create_dynamic_map")  # Newer versions of bitsandbytes deprecate it.


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values; each row on a scale of its own, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** (4 * torch.rand(shape[0], 1, generator=generator) - 2)
    return (torch.randn(shape, generator=generator) * scales).to(dtype)


def coded(values: torch.Tensor) -> FrozenWeight:
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    absmax = torch.zeros(-(-values.numel() // 256))
    encode_weight(values, codes, absmax)
    return FrozenWeight(codes, absmax)


def seen(values: torch.Tensor) -> torch.Tensor:
    """The values after bitsandbytes' own way there and back."""
    codes, state = bitsandbytes.functional.quantize_blockwise(values.float(), blocksize=256)
    return bitsandbytes.functional.dequantize_blockwise(codes, state)


@all_shapes
@pytest.mark.parametrize("dtype", STORED)
def test_coding_is_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = random_weight(shape, dtype)
    before = values.clone()
    found = coded(values)
    codes, state = bitsandbytes.functional.quantize_blockwise(values.float(), blocksize=256)
    assert torch.equal(found.values, codes)
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(values, before)


@pytest.mark.parametrize("chunk", [256, 1024, 2560])
def test_chunks_change_no_code_and_no_value(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_weight((21, 300))
    whole = coded(values)
    expected = whole.rows(torch.float32)
    monkeypatch.setattr(module, "_CHUNK_VALUES", chunk)
    parts = coded(values)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.absmax, whole.absmax)
    assert torch.equal(parts.rows(torch.float32), expected)
    block = torch.full((21, 44), torch.nan)
    assert torch.equal(parts.copy_block(block, slice(0, 21), slice(256, 300)), expected[:, 256:])
    wide = coded(random_weight((21, 512)))
    block = torch.full((21, 256), torch.nan)
    assert torch.equal(wide.copy_block(block, slice(0, 21), slice(256, 512)), seen(random_weight((21, 512)))[:, 256:])


@all_shapes
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_stored_weight_are_its_own_in_another_dtype(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype
) -> None:
    values = random_weight(shape, stored)
    weight = FrozenWeight(values)
    assert torch.equal(weight.rows(dtype), values.to(dtype))
    for start, stop in ((0, 1), (256, 300), (256, None), (512, 10_000)):
        found = weight.rows(dtype, start, stop)
        assert torch.equal(found, values[start:stop].to(dtype))
        # Nothing is copied that is kept in the dtype of the products.
        assert not found.numel() or (found.data_ptr() == values[start:].data_ptr()) == (stored == dtype)


@all_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_codes_are_their_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = random_weight(shape)
    weight, expected = coded(values), seen(values).to(dtype)
    assert torch.equal(weight.rows(dtype), expected)
    for start, stop in ((0, 1), (0, 256), (256, 300), (256, None), (512, 10_000)):
        found = weight.rows(dtype, start, stop)
        assert found.dtype == dtype
        if start < shape[0]:
            assert torch.equal(found, expected[start:stop])


def test_codes_are_asked_for_from_a_multiple_of_256_rows_or_whole_blocks() -> None:
    with pytest.raises(AssertionError):
        coded(random_weight((520, 300))).rows(torch.float32, 100)


_BLOCKS = [
    (slice(0, 520), slice(0, 256)),
    (slice(0, 520), slice(256, 512)),
    (slice(0, 256), slice(0, 512)),
    (slice(256, 520), slice(256, None)),
    (slice(512, 520), slice(0, 256)),
    (slice(256, 512), slice(None)),
    (slice(None), slice(None)),
    (slice(0, 1), slice(256, None)),
]
"""Rows and columns, whose starts are multiples of 256, and the columns' ends as well; each is cut to the weight's
size."""
BLOCKS = [
    (shape, rows, columns)
    for shape in SHAPES
    for rows, columns in _BLOCKS
    if range(*rows.indices(shape[0])) and range(*columns.indices(shape[1]))
]


@pytest.mark.parametrize("is_coded", [False, True], ids=["stored", "coded"])
@pytest.mark.parametrize(("shape", "rows", "columns"), BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_written_where_it_is_asked_for(
    shape: tuple[int, int], is_coded: bool, rows: slice, columns: slice, dtype: torch.dtype
) -> None:
    values = random_weight(shape)
    expected = (seen(values) if is_coded else values)[rows, columns].to(dtype)
    weight = coded(values) if is_coded else FrozenWeight(values)
    around = torch.full((expected.shape[0] + 2, expected.shape[1] + 2), 7.0, dtype=dtype)
    out = around[1:-1, 1:-1]
    assert weight.copy_block(out, rows, columns) is out
    assert torch.equal(out, expected)
    around[1:-1, 1:-1] = 7.0
    assert bool((around == 7.0).all()), "nothing around it is touched"


@pytest.mark.parametrize("width", [256, 512, 768, 1280])
@pytest.mark.parametrize("start", [0, 256, 512, 1024])
def test_columns_of_codes_have_their_own_scales(start: int, width: int) -> None:
    """One scale of each row, or several: as the merge's blocks take them, whose last is narrower than the others."""
    values = random_weight((300, 2304))
    weight, expected = coded(values), seen(values)[:, start : start + width]
    found = weight.copy_block(torch.full(expected.shape, torch.nan), slice(0, 300), slice(start, start + width))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("is_coded", [False, True], ids=["stored", "coded"])
def test_on_its_device_a_weight_is_itself(is_coded: bool) -> None:
    weight = coded(random_weight((20, 300))) if is_coded else FrozenWeight(random_weight((20, 300)))
    moved = weight.to(CPU)
    assert [tensor.data_ptr() for tensor in moved.tensors] == [tensor.data_ptr() for tensor in weight.tensors]
    assert (moved.absmax is None) == (not is_coded)
    weight.keep_for(CPU)  # Memory of the host is not used again by a stream.


def test_on_another_device_a_weight_is_all_of_its_tensors() -> None:
    weight = coded(random_weight((20, 300))).to(torch.device("meta"))
    assert [(tensor.device.type, tuple(tensor.shape)) for tensor in weight.tensors] == [
        ("meta", (20, 300)),
        ("meta", (24,)),
    ]


@pytest.mark.parametrize(("dtype", "item_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_values_or_of_codes_and_scales(dtype: torch.dtype, item_bytes: int) -> None:
    values = random_weight((20, 300), dtype)
    assert FrozenWeight(values).num_bytes == 6000 * item_bytes
    assert coded(values).num_bytes == 6000 + 4 * 24
    assert FrozenWeight(values).shape == coded(values).shape == (20, 300)
