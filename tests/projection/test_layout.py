"""What a record takes, how its tensors lie, and which ranks save something."""

import itertools
import math
import re
from typing import Any

import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.common.sizes import QUANTISED_BLOCK as BLOCK
from pcscale.families.axes import FFN, RESIDUAL
from pcscale.families.plan import PlannedWeight
from pcscale.families.spec import Kind, Weight
from pcscale.projection.costs import Shape
from pcscale.projection.layout import (
    ROW_BLOCK,
    RecordFormat,
    check_rank,
    record_bytes,
    record_layout,
    row_blocks,
    trainable_values,
    value_shapes,
)
from pcscale.projection.record import views_of

BASE_SHAPE, SHAPE = (200, 130), (90, 70)
SIDES = {"both": SHAPE, "out": (90, 130), "in": (200, 70), "none": BASE_SHAPE}
ITEM_BYTES = {"F32": 4, "BF16": 2, "U8": 1}
COMPACT = RecordFormat("bfloat16", "8bit")
FORMS = [
    RecordFormat(dtype, moments, rank, aux_start)
    for dtype, moments, rank, aux_start in itertools.product(
        ("float32", "bfloat16"), ("32bit", "8bit"), (None, 3), (False, True)
    )
]


def planned(shape: Shape, base_shape: Shape = BASE_SHAPE, name: str = "w") -> PlannedWeight:
    return PlannedWeight(Weight(name, Kind.LINEAR, (FFN, RESIDUAL), None), base_shape, shape)


@pytest.mark.parametrize("side", SIDES)
def test_whole_projections_have_a_value_for_every_pair_of_channels(side: str) -> None:
    expected: dict[str, Any] = {"delta_out": (90, 200), "delta_in": (130, 70), "aux": SIDES[side]}
    if side in ("in", "none"):
        del expected["delta_out"]
    if side in ("out", "none"):
        del expected["delta_in"]
    assert value_shapes(planned(SIDES[side])) == expected


@pytest.mark.parametrize("side", SIDES)
def test_a_low_rank_has_thin_factors_in_their_place(side: str) -> None:
    out = {"delta_out_u": (3, 200), "delta_out_v": (90, 3)} if side in ("both", "out") else {}
    in_ = {"delta_in_u": (130, 3), "delta_in_v": (3, 70)} if side in ("both", "in") else {}
    assert value_shapes(planned(SIDES[side]), 3) == {**out, **in_, "aux": SIDES[side]}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [None, 3])
def test_trainable_values_are_those_of_the_shapes(side: str, rank: int | None) -> None:
    weight = planned(SIDES[side])
    assert trainable_values(weight, rank) == sum(map(math.prod, value_shapes(weight, rank).values()))


def test_of_a_norm_its_entries_are_trained_whatever_the_rank() -> None:
    norm = PlannedWeight(Weight("n", Kind.NORM, (RESIDUAL,), None), (130,), (70,))
    assert trainable_values(norm) == trainable_values(norm, 3) == 70


def test_the_published_format_takes_twelve_bytes_a_value() -> None:
    weight = planned(SHAPE)
    values = 90 * 200 + 130 * 70 + 90 * 70
    assert record_bytes(weight, RecordFormat()) == 12 * values
    layout = record_layout(weight, RecordFormat())
    parts = {f"{name}{part}" for name in value_shapes(weight) for part in ("", ".exp_avg", ".exp_avg_sq")}
    assert layout.keys() == parts
    assert {spec.dtype for spec in layout.values()} == {"F32"}


def test_the_compact_format_takes_four_bytes_a_value_and_its_scales() -> None:
    weight = planned(SHAPE)
    sizes = [90 * 200, 130 * 70, 90 * 70]
    assert min(sizes) >= 4096
    scales = sum(-(-size // BLOCK) for size in sizes)
    assert record_bytes(weight, COMPACT) == 4 * sum(sizes) + 2 * 4 * scales
    assert record_bytes(weight, COMPACT) < 4.05 * sum(sizes)


def test_each_8_bit_moment_has_a_scale_for_every_256_values() -> None:
    layout = record_layout(planned(SHAPE), COMPACT)
    for name, shape in value_shapes(planned(SHAPE)).items():
        assert (layout[name].dtype, layout[name].shape) == ("BF16", shape)
        for moment in ("exp_avg", "exp_avg_sq"):
            codes, scales = layout[f"{name}.{moment}"], layout[f"{name}.{moment}.absmax"]
            assert (codes.dtype, codes.shape) == ("U8", shape)
            assert (scales.dtype, scales.shape) == ("F32", (-(-math.prod(shape) // BLOCK),))


@pytest.mark.parametrize(("shape", "dtype"), [((64, 64), "U8"), ((63, 65), "F32"), ((1, 4096), "U8"), ((5, 7), "F32")])
def test_below_4096_values_moments_stay_in_32_bits(shape: Shape, dtype: str) -> None:
    layout = record_layout(planned(shape, shape), COMPACT)
    assert {name: spec.dtype for name, spec in layout.items() if "absmax" not in name} == {
        "aux": "BF16",
        "aux.exp_avg": dtype,
        "aux.exp_avg_sq": dtype,
    }
    assert any("absmax" in name for name in layout) == (dtype == "U8")
    count = math.prod(shape)
    expected = 4 * count + 2 * 4 * (count // BLOCK) if dtype == "U8" else 10 * count
    assert record_bytes(planned(shape, shape), COMPACT) == expected


def test_a_small_factor_of_a_large_matrix_keeps_its_moments_in_32_bits() -> None:
    layout = record_layout(planned(SHAPE), RecordFormat(moments="8bit", rank=3))
    assert layout["aux.exp_avg"].dtype == "U8"
    assert {layout[f"{name}.exp_avg"].dtype for name in value_shapes(planned(SHAPE), 3) if name != "aux"} == {"F32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_of_aux_is_kept_where_it_is_asked_for(dtype: Any) -> None:
    without, with_start = (RecordFormat(dtype, aux_start=kept) for kept in (False, True))
    added = record_layout(planned(SHAPE), with_start).keys() - record_layout(planned(SHAPE), without).keys()
    assert added == {"aux_start"}
    assert record_layout(planned(SHAPE), with_start)["aux_start"].shape == SHAPE
    more = record_bytes(planned(SHAPE), with_start) - record_bytes(planned(SHAPE), without)
    assert more == math.prod(SHAPE) * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_tensor_begins_at_a_multiple_of_its_item_s_size(form: RecordFormat) -> None:
    """Sizes that are odd, so that tensors of other dtypes end anywhere."""
    for shape, base_shape in ((SHAPE, BASE_SHAPE), ((67, 63), (131, 77)), ((131, 63), (131, 77)), ((1, 1), (3, 3))):
        weight, start = planned(shape, base_shape), 0
        for name, spec in record_layout(weight, form).items():
            assert start % ITEM_BYTES[spec.dtype] == 0, name
            assert spec.num_bytes == ITEM_BYTES[spec.dtype] * math.prod(spec.shape)
            start += spec.num_bytes
        assert record_bytes(weight, form) == start


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_views_of_a_record_cover_its_bytes_once(form: RecordFormat) -> None:
    weight = planned((67, 63), (131, 77))
    layout = record_layout(weight, form)
    buffer = torch.zeros(record_bytes(weight, form), dtype=torch.uint8)
    for number, (name, view) in enumerate(views_of(buffer, layout).items()):
        assert tuple(view.shape) == layout[name].shape
        assert not view.any(), f"{name} overlaps with one before"
        view.view(-1).view(torch.uint8).fill_(number + 1)
    assert buffer.all()


@pytest.mark.parametrize("rows", [1, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK + 5])
def test_a_matrix_whose_out_side_stays_is_visited_in_blocks_of_rows(rows: int) -> None:
    slices = list(row_blocks(planned((rows, 4), (rows, 8))))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    assert all(part.start % BLOCK == 0 for part in slices)
    assert max(part.stop - part.start for part in slices) <= ROW_BLOCK


def test_a_matrix_whose_out_side_is_projected_is_visited_whole() -> None:
    assert list(row_blocks(planned((7, 4), (3 * ROW_BLOCK, 8)))) == [slice(0, 3 * ROW_BLOCK)]


MATRICES = [planned(SHAPE), planned((50, 130)), planned((200, 33)), planned(BASE_SHAPE)]


def saves(rank: int) -> bool:
    """Whether the factors of every D of `MATRICES` hold fewer values than D itself."""
    whole, factors = (
        [{name: math.prod(shape) for name, shape in value_shapes(weight, r).items()} for weight in MATRICES]
        for r in (None, rank)
    )
    return all(
        thin[f"{side}_u"] + thin[f"{side}_v"] < full[side]
        for full, thin in zip(whole, factors, strict=True)
        for side in ("delta_out", "delta_in")
        if side in full
    )


def test_a_rank_is_accepted_as_long_as_every_product_is_smaller_than_its_d() -> None:
    largest = max(rank for rank in range(1, 200) if saves(rank))
    assert largest == 26  # 130 · 33 / (130 + 33) = 26.3
    for rank in range(1, 200):
        if rank <= largest:
            check_rank(MATRICES, rank)
        else:
            with pytest.raises(RequestError, match="saves nothing"):
                check_rank(MATRICES, rank)


def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does() -> None:
    message = (
        "projection_rank 27 saves nothing: the factors of a D would hold more values than D. Give at most 26, or full."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_rank(MATRICES, 27)


def test_factors_of_exactly_as_many_values_save_nothing() -> None:
    """4 · (6 + 12) = 6 · 12."""
    even = [planned((6, 130), (12, 130))]
    check_rank(even, 3)
    with pytest.raises(RequestError, match=r"^projection_rank 4 saves nothing: .* Give at most 3, or full\.$"):
        check_rank(even, 4)


@pytest.mark.parametrize("rank", [None, 1, 10**6])
def test_where_nothing_is_projected_any_rank_will_do(rank: int | None) -> None:
    check_rank([planned(BASE_SHAPE)], rank)
    check_rank([], rank)


def test_whole_projections_are_never_refused() -> None:
    check_rank(MATRICES, None)
