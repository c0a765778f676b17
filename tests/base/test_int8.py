"""The base in 8 bits: coded once per base, never taken for another, and what it loses is known to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.base.int8 import Int8Base
from pcscale.projection.layout import RecordFormat
from pcscale.run.folder import BASE_CACHE_NAME
from tests.base.coded import EMBEDDING, UP, WIDE, coded, compression, folder, seen_by_bitsandbytes, whole
from tests.projection.parts import Compression, copies, open_base, random_kept
from tests.reference import Weights, hard_pruned
from tests.tiny import build_base

__all__ = ["coded", "compression", "folder"]

RELATIVE_ERROR = (0.009, 0.013)
"""Root mean square, of normal values: seven steps a decade on average, in blocks of 256."""
FLOAT32_START_TOLERANCE = 2**-23
"""Of a matrix's largest entry. Q + (W - Q) rounds to 2^-24 of itself, and W - Q, which is far smaller, likewise."""
BFLOAT16_START_TOLERANCE = 2**-14
"""Likewise. aux is at most some 2^-6 of the largest entry, and rounds to 2^-9 of itself."""

pytestmark = pytest.mark.filterwarnings("ignore:create_dynamic_map")  # bitsandbytes calls its own deprecated function.


# What the codes are.


def test_weights_are_those_that_bitsandbytes_codes_and_decodes(coded: Int8Base, compression: Compression) -> None:
    assert coded.matrix_names == [planned.name for planned in compression.plan.matrices]
    for name in coded.matrix_names:
        assert torch.equal(whole(coded, name), seen_by_bitsandbytes(compression.weights[name])), name


def test_a_base_in_half_precision_is_coded_from_what_is_stored(tmp_path: Path) -> None:
    base = open_base(build_base(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB"))
    coded = Int8Base(base, tmp_path / BASE_CACHE_NAME)
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


@pytest.mark.parametrize("name", [EMBEDDING, UP])
def test_what_the_codes_lose_is_what_is_missing_of_the_rows(
    name: str, coded: Int8Base, compression: Compression
) -> None:
    stored = compression.weights[name]
    expected = stored - seen_by_bitsandbytes(stored)
    assert expected.abs().max() > 0
    for rows in (slice(0, len(stored)), slice(256, 512), slice(256, len(stored))):
        found = coded.lost(name, rows)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[rows])


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
    optimizer.records.residency.create(away, record | {"aux": record["aux"].float() + 1.0})
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
            lost = coded.lost(UP, slice(0, len(compression.weights[UP])))
            assert torch.equal(record.aux_start, lost[compression.kept["ffn.1"]][:, compression.kept["residual"]])


def test_kept_indices_are_scattered(compression: Compression) -> None:
    """Or the tests of what is lost would pass on a prefix."""
    kept = random_kept(compression.plan)
    assert all(not torch.equal(indices, torch.arange(len(indices))) for indices in kept.values())
