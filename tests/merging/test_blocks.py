"""Composing in blocks against composing whole."""

import functools

import pytest
import torch

from pcscale.base.weight import FrozenWeight, encode_weight
from pcscale.merging import blocks
from pcscale.merging.blocks import Workspace, compose_into
from pcscale.projection.algebra import Projection, Side, compose
from pcscale.projection.costs import out_side_first

O, I = 52, 37
RANK = 3
BLOCK_TOLERANCE = 1e-5
"""Float32 products of at most 52 terms near 1, summed in another order."""
CODED_TOLERANCE = 1e-4
"""The same with at most 512 terms."""
SIDES = [(True, True), (True, False), (False, True), (False, False)]
WIDTHS = [(45, 11), (13, 33), (13, 11)]
"""Compressed sizes o, i; only the first is cheaper in side first."""
CODED_SHAPES = [(300, 512), (300, 300)]
"""Base shapes whose rows are whole blocks of codes, and whose rows are not."""
CODED_WIDTHS = [(260, 60), (60, 270)]
"""Compressed sizes, the second cheaper out side first; one of each is more than a block of 256."""


def _projection(
    o: int,
    i: int,
    out: bool,
    in_: bool,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    base_shape: tuple[int, int] = (O, I),
) -> Projection:
    generator = torch.Generator().manual_seed(o * i)
    O, I = base_shape

    def random(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)

    def kept(size: int, count: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    out_side = in_side = None
    if out:
        out_side = Side(kept(O, o), (random(o, O),) if rank is None else (random(rank, O), random(o, rank)))
    if in_:
        in_side = Side(kept(I, i), (random(I, i),) if rank is None else (random(I, rank), random(rank, i)))
    return Projection(out_side, in_side, random(o if out else O, i if in_ else I))


def _base(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (O, I)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@functools.cache
def _coded(shape: tuple[int, int] = (O, I)) -> FrozenWeight:
    """The same base weight as 8-bit codes; only to be read."""
    W_OI = _base(shape=shape)
    weight = FrozenWeight(torch.empty_like(W_OI, dtype=torch.uint8), torch.empty(-(-W_OI.numel() // 256)))
    assert weight.absmax is not None
    encode_weight(W_OI, weight.values, weight.absmax)
    return weight


def _parts(projection: Projection) -> list[torch.Tensor]:
    sides = [side for side in (projection.out, projection.in_) if side is not None]
    return [projection.aux, *(tensor for side in sides for tensor in (side.start, *side.factors))]


def _in_float64(W_OI: torch.Tensor, p: Projection) -> torch.Tensor:
    """The weight as the method writes it, with whole projections."""
    O, I = W_OI.shape
    p_out = torch.eye(O, dtype=torch.float64)
    p_in = torch.eye(I, dtype=torch.float64)
    if p.out is not None:
        p_out = p_out[p.out.start] + functools.reduce(torch.matmul, [part.double() for part in reversed(p.out.factors)])
    if p.in_ is not None:
        p_in = p_in[:, p.in_.start] + functools.reduce(torch.matmul, [part.double() for part in p.in_.factors])
    return p_out @ W_OI.double() @ p_in + p.aux.double()


@pytest.mark.parametrize("rank", [None, RANK])
def test_the_widths_cover_both_orders(rank: int | None) -> None:
    assert [out_side_first((O, I), shape, rank) for shape in WIDTHS] == [False, True, True]
    for base_shape in CODED_SHAPES:
        assert [out_side_first(base_shape, shape, rank) for shape in CODED_WIDTHS] == [False, True]


@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
@pytest.mark.parametrize("block", [1, 8, 16, 37, 1024])
@pytest.mark.parametrize(("out", "in_"), SIDES)
@pytest.mark.parametrize(("o", "i"), WIDTHS)
def test_blocks_of_any_size_give_the_whole_products_weight(
    o: int, i: int, out: bool, in_: bool, block: int, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    W_OI, projection = _base(), _projection(o, i, out, in_, rank=rank)
    found_oi = torch.full(projection.aux.shape, torch.nan)
    compose_into(found_oi, FrozenWeight(W_OI), projection)
    expected_oi = _in_float64(W_OI, projection).float()
    torch.testing.assert_close(found_oi, expected_oi, rtol=BLOCK_TOLERANCE, atol=BLOCK_TOLERANCE)
    if block >= max(O, I) and rank is None:
        assert torch.equal(found_oi, compose(W_OI, projection))


@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
@pytest.mark.parametrize("block", [256, 512])
@pytest.mark.parametrize(("out", "in_"), SIDES)
@pytest.mark.parametrize(("o", "i"), CODED_WIDTHS)
@pytest.mark.parametrize("base_shape", CODED_SHAPES, ids=["whole rows", "broken rows"])
def test_blocks_of_8_bit_codes_give_the_weight_of_their_values(
    base_shape: tuple[int, int],
    o: int,
    i: int,
    out: bool,
    in_: bool,
    block: int,
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    weight, projection = _coded(base_shape), _projection(o, i, out, in_, rank=rank, base_shape=base_shape)
    found_oi = torch.full(projection.aux.shape, torch.nan)
    compose_into(found_oi, weight, projection)
    values_OI = weight.rows(torch.float32)
    assert not torch.equal(values_OI, _base(shape=base_shape)), "there is something to decode"
    expected_oi = _in_float64(values_OI, projection).float()
    torch.testing.assert_close(found_oi, expected_oi, rtol=CODED_TOLERANCE, atol=CODED_TOLERANCE)


@pytest.mark.parametrize(("out", "in_"), SIDES)
@pytest.mark.parametrize("block", [8, 1024])
@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
def test_without_a_change_the_kept_entries_come_out_to_the_last_bit(
    out: bool, in_: bool, block: int, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    p = _projection(13, 11, out, in_, rank=rank)
    # Of a low rank V alone begins at zero.
    for side in (p.out, p.in_):
        if side is not None:
            side.factors[-1].zero_()
    p.aux.zero_()
    W_OI, found_oi = _base(), torch.empty(p.aux.shape)
    compose_into(found_oi, FrozenWeight(W_OI), p)
    rows = slice(None) if p.out is None else p.out.start
    columns = slice(None) if p.in_ is None else p.in_.start
    assert torch.equal(found_oi, W_OI[rows][:, columns])


@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 1024])
def test_half_precision_goes_in_and_out_but_products_are_float32(
    dtype: torch.dtype, block: int, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    W_OI, projection = _base(dtype), _projection(13, 33, True, True, dtype, rank)
    found_oi = torch.empty(13, 33)
    compose_into(found_oi, FrozenWeight(W_OI), projection)
    expected_oi = _in_float64(W_OI, projection).float()
    torch.testing.assert_close(found_oi, expected_oi, rtol=BLOCK_TOLERANCE, atol=BLOCK_TOLERANCE)
    rounded_oi = torch.empty(13, 33, dtype=dtype)
    compose_into(rounded_oi, FrozenWeight(W_OI), projection)
    assert torch.equal(rounded_oi, found_oi.to(dtype))


@pytest.mark.parametrize("coded", [False, True], ids=["stored", "coded"])
@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
@pytest.mark.parametrize(("out", "in_"), SIDES)
def test_neither_the_base_weight_nor_the_projection_is_written_into(
    out: bool, in_: bool, rank: int | None, coded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", 256 if coded else 8)
    weight = _coded() if coded else FrozenWeight(_base())
    projection = _projection(13, 11, out, in_, rank=rank)
    parts = [*weight.tensors, *_parts(projection)]
    before = [part.clone() for part in parts]
    compose_into(torch.empty(projection.aux.shape), weight, projection)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before, strict=True))


@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "low rank"])
def test_a_workspace_that_was_used_for_other_matrices_changes_no_bit(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", 16)
    workspace = Workspace()
    for out, in_ in SIDES:
        for o, i in WIDTHS:
            projection = _projection(o, i, out, in_, rank=rank)
            found_oi, expected_oi = (torch.full(projection.aux.shape, torch.nan) for _ in range(2))
            compose_into(found_oi, FrozenWeight(_base()), projection, workspace)
            compose_into(expected_oi, FrozenWeight(_base()), projection)
            assert torch.equal(found_oi, expected_oi)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (1024, 1), (1025, 2), (5000, 5)])
def test_blocks_cover_a_side_once(size: int, count: int) -> None:
    slices = list(blocks.blocks(size))
    assert len(slices) == count
    assert [index for part in slices for index in range(part.start, part.stop)] == list(range(size))
