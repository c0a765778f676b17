"""Composing in blocks against composing whole."""

import pytest
import torch

from pcscale.merging import blocks
from pcscale.merging.blocks import compose_into
from pcscale.projection.algebra import Projection, compose, out_side_first

O, I = 52, 37
BLOCK_TOLERANCE = 1e-5
"""Float32 products of at most 52 terms near 1, summed in another order."""
SIDES = [(True, True), (True, False), (False, True), (False, False)]
WIDTHS = [(45, 11), (13, 33), (13, 11)]
"""Compressed sizes o, i; only the second is cheaper out side first."""


def _projection(o: int, i: int, out: bool, in_: bool, dtype: torch.dtype = torch.float32) -> Projection:
    generator = torch.Generator().manual_seed(o * i)

    def random(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)

    return Projection(
        kept_out=torch.randperm(O, generator=generator)[:o].sort().values if out else None,
        delta_out=random(o, O) if out else None,
        kept_in=torch.randperm(I, generator=generator)[:i].sort().values if in_ else None,
        delta_in=random(I, i) if in_ else None,
        aux=random(o if out else O, i if in_ else I),
    )


def _base(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(O, I, generator=torch.Generator().manual_seed(5)).to(dtype)


def _in_float64(W_OI: torch.Tensor, p: Projection) -> torch.Tensor:
    """The weight as the method writes it, with whole projections."""
    p_out = torch.eye(O, dtype=torch.float64)
    p_in = torch.eye(I, dtype=torch.float64)
    if p.kept_out is not None and p.delta_out is not None:
        p_out = p_out[p.kept_out] + p.delta_out.double()
    if p.kept_in is not None and p.delta_in is not None:
        p_in = p_in[:, p.kept_in] + p.delta_in.double()
    return p_out @ W_OI.double() @ p_in + p.aux.double()


def test_the_widths_cover_both_orders() -> None:
    assert [out_side_first(O, I, o, i) for o, i in WIDTHS] == [False, True, False]


@pytest.mark.parametrize("block", [1, 8, 16, 37, 1024])
@pytest.mark.parametrize(("out", "in_"), SIDES)
@pytest.mark.parametrize(("o", "i"), WIDTHS)
def test_blocks_of_any_size_give_the_whole_products_weight(
    o: int, i: int, out: bool, in_: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    W_OI, projection = _base(), _projection(o, i, out, in_)
    found_oi = torch.full(projection.aux.shape, torch.nan)
    compose_into(found_oi, W_OI, projection)
    expected_oi = _in_float64(W_OI, projection).float()
    torch.testing.assert_close(found_oi, expected_oi, rtol=BLOCK_TOLERANCE, atol=BLOCK_TOLERANCE)
    if block >= max(O, I):
        assert torch.equal(found_oi, compose(W_OI, projection))


@pytest.mark.parametrize(("out", "in_"), SIDES)
@pytest.mark.parametrize("block", [8, 1024])
def test_without_a_change_the_kept_entries_come_out_to_the_last_bit(
    out: bool, in_: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    p = _projection(13, 11, out, in_)
    zeros = [None if delta is None else torch.zeros_like(delta) for delta in (p.delta_out, p.delta_in)]
    W_OI, found_oi = _base(), torch.empty(p.aux.shape)
    compose_into(found_oi, W_OI, Projection(p.kept_out, zeros[0], p.kept_in, zeros[1], torch.zeros_like(p.aux)))
    rows = slice(None) if p.kept_out is None else p.kept_out
    columns = slice(None) if p.kept_in is None else p.kept_in
    assert torch.equal(found_oi, W_OI[rows][:, columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 1024])
def test_half_precision_goes_in_and_out_but_products_are_float32(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", block)
    W_OI, projection = _base(dtype), _projection(13, 33, True, True, dtype)
    found_oi = torch.empty(13, 33)
    compose_into(found_oi, W_OI, projection)
    expected_oi = _in_float64(W_OI, projection).float()
    torch.testing.assert_close(found_oi, expected_oi, rtol=BLOCK_TOLERANCE, atol=BLOCK_TOLERANCE)
    rounded_oi = torch.empty(13, 33, dtype=dtype)
    compose_into(rounded_oi, W_OI, projection)
    assert torch.equal(rounded_oi, found_oi.to(dtype))


@pytest.mark.parametrize(("out", "in_"), SIDES)
def test_neither_the_base_weight_nor_the_projection_is_written_into(
    out: bool, in_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MERGE_BLOCK", 8)
    W_OI, projection = _base(), _projection(13, 11, out, in_)
    parts = [W_OI, *(part for part in vars(projection).values() if part is not None)]
    before = [part.clone() for part in parts]
    compose_into(torch.empty(projection.aux.shape), W_OI, projection)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before, strict=True))


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (1024, 1), (1025, 2), (5000, 5)])
def test_blocks_cover_a_side_once(size: int, count: int) -> None:
    slices = list(blocks.blocks(size))
    assert len(slices) == count
    assert [index for part in slices for index in range(part.start, part.stop)] == list(range(size))
