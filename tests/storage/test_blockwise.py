"""8-bit values against bitsandbytes' own: its table, its codes, its decoding."""

import subprocess
import sys
from collections.abc import Callable

import bitsandbytes.functional
import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.common.sizes import QUANTISED_BLOCK as BLOCK
from pcscale.storage.blockwise import Blockwise, dynamic_code, require_bitsandbytes

ERROR_TOLERANCE = 1.001
"""Of bitsandbytes' own root mean square error. Ours is the code nearest to the rounded value; on a processor its own
search, too, is not quite the nearest."""
DIFFERING_CODES = 0.01
"""Share of values that lie so close to the middle of two codes that ours is not the nearest one."""
MIDDLE_OF_VALUE, MIDDLE_OF_SCALE = 2.0**-11, 2.0**-25
"""How close: what rounding to half precision moves a value by, of itself or, below the normal range, of the scale."""
COUNT = 40 * BLOCK

pytestmark = pytest.mark.filterwarnings("ignore:create_dynamic_map")  # Newer versions call it deprecated.


def normal(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def with_outliers(count: int = COUNT) -> torch.Tensor:
    """A value in a hundred is up to some thousand times the others."""
    values = normal(count)
    values[::100] *= 10 ** (3 * torch.rand(len(values[::100]), generator=torch.Generator().manual_seed(1)))
    return values


def squared(count: int = COUNT) -> torch.Tensor:
    """What second moments are like: over many decades, never negative."""
    return normal(count) ** 2 * 10 ** (-4 * torch.rand(count, generator=torch.Generator().manual_seed(2)))


DATA: dict[str, tuple[Callable[[], torch.Tensor], bool]] = {
    "normal": (normal, True),
    "outliers": (with_outliers, True),
    "squared, signed": (squared, True),
    "squared": (squared, False),
}
"""Values, and whether they are coded with a sign."""

all_data = pytest.mark.parametrize(("make", "signed"), DATA.values(), ids=DATA)
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def empty(count: int, signed: bool) -> Blockwise:
    scales = torch.full((-(-count // BLOCK),), torch.nan)
    return Blockwise(torch.full((count,), 77, dtype=torch.uint8), scales, signed)


def coded(values: torch.Tensor, signed: bool) -> Blockwise:
    """By the table."""
    assert values.device.type == "cpu"
    blockwise = empty(values.numel(), signed)
    blockwise.encode(values)
    return blockwise


def by_bitsandbytes(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Its codes and scales."""
    table = bitsandbytes.functional.create_dynamic_map(signed)
    codes, state = bitsandbytes.functional.quantize_blockwise(values, code=table, blocksize=BLOCK)
    return codes, state.absmax


def nearest(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """The code whose value is nearest, by comparing with all of them."""
    padded = torch.zeros(-(-len(values) // BLOCK) * BLOCK, dtype=torch.float64)
    padded[: len(values)] = values
    blocks = padded.view(-1, BLOCK)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: len(values)]
    codes = (scaled[:, None] - dynamic_code(signed).double()).abs().argmin(1)
    return codes if signed else codes.clamp(min=1)


def decoded_by_bitsandbytes(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    table = bitsandbytes.functional.create_dynamic_map(signed)
    return bitsandbytes.functional.dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=BLOCK)


def error(found: torch.Tensor, values: torch.Tensor) -> float:
    return (found - values).pow(2).mean().sqrt().item()


@both_signs
def test_the_table_of_codes_is_that_of_bitsandbytes(signed: bool) -> None:
    table = dynamic_code(signed)
    assert torch.equal(table, bitsandbytes.functional.create_dynamic_map(signed))
    assert torch.equal(table, table.sort().values)
    assert len(table.unique()) == 256


@all_data
def test_the_error_is_that_of_bitsandbytes(make: Callable[[], torch.Tensor], signed: bool) -> None:
    values = make()
    theirs = error(decoded_by_bitsandbytes(*by_bitsandbytes(values, signed), signed), values)
    assert theirs > 0
    assert error(coded(values, signed).decode(), values) <= ERROR_TOLERANCE * theirs


@all_data
def test_scales_are_those_of_bitsandbytes_to_the_last_bit(make: Callable[[], torch.Tensor], signed: bool) -> None:
    values = make()
    ours = coded(values, signed)
    assert torch.equal(ours.absmax, by_bitsandbytes(values, signed)[1])
    assert torch.equal(ours.absmax, values.view(-1, BLOCK).abs().amax(1))


@all_data
def test_a_code_is_the_nearest_one_but_in_the_middle_of_two(make: Callable[[], torch.Tensor], signed: bool) -> None:
    values = make().double()
    ours, expected = coded(values.float(), signed), nearest(values, signed)
    differ = ours.codes != expected
    assert differ.float().mean() <= DIFFERING_CODES
    assert (ours.codes - expected).abs().max() <= 1
    table, scales = dynamic_code(signed).double(), ours.absmax.double().repeat_interleave(BLOCK)
    middle = (table[ours.codes.int()] + table[expected]) / 2 * scales
    allowed = values.abs() * MIDDLE_OF_VALUE + scales * MIDDLE_OF_SCALE
    assert bool(((values - middle).abs() <= allowed)[differ].all())


@all_data
def test_bitsandbytes_decodes_what_was_coded_here(make: Callable[[], torch.Tensor], signed: bool) -> None:
    ours = coded(make(), signed)
    assert torch.equal(ours.decode(), decoded_by_bitsandbytes(ours.codes, ours.absmax, signed))


@all_data
def test_the_search_gives_the_codes_of_bitsandbytes(make: Callable[[], torch.Tensor], signed: bool) -> None:
    values = make()
    ours = empty(len(values), signed)
    ours.encode_by_search(values)
    codes, absmax = by_bitsandbytes(values, signed)
    assert torch.equal(ours.codes, codes if signed else codes.clamp(min=1))
    assert torch.equal(ours.absmax, absmax)


@both_signs
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 512, 700])
def test_a_last_block_that_is_not_full_has_a_scale_of_its_own(count: int, signed: bool) -> None:
    values = normal(count) if signed else normal(count) ** 2
    values[-1] = 100.0
    ours = coded(values, signed)
    assert torch.equal(ours.absmax, by_bitsandbytes(values, signed)[1])
    assert ours.absmax[-1] == 100.0
    assert (ours.codes - nearest(values, signed)).abs().max() <= 1
    assert ours.decode()[-1] == 100.0
    assert torch.equal(ours.decode(), decoded_by_bitsandbytes(ours.codes, ours.absmax, signed))


@both_signs
@pytest.mark.parametrize("count", [3 * BLOCK, 2 * BLOCK + 9])
def test_a_block_of_zeros_is_zeros_beside_others_that_are_not(count: int, signed: bool) -> None:
    values = normal(count).abs()
    values[BLOCK : 2 * BLOCK] = 0.0
    ours = coded(values, signed)
    assert ours.absmax[1] == 0.0
    found = ours.decode()
    assert not found[BLOCK : 2 * BLOCK].any()
    assert bool((found[:BLOCK] != 0).all())
    assert bool((found[2 * BLOCK :] != 0).all())


@both_signs
def test_nothing_but_zeros_comes_back_as_it_was(signed: bool) -> None:
    assert not coded(torch.zeros(BLOCK + 3), signed).decode().any()
    fresh = Blockwise(torch.zeros(BLOCK + 3, dtype=torch.uint8), torch.zeros(2), signed)
    assert not fresh.decode().any(), "bytes that are zero are values that are zero"


@pytest.mark.parametrize("encode", [Blockwise.encode, Blockwise.encode_by_search], ids=["table", "search"])
def test_without_a_sign_no_value_of_a_block_with_a_scale_is_zero(
    encode: Callable[[Blockwise, torch.Tensor], None],
) -> None:
    values = torch.zeros(2 * BLOCK)
    values[:4] = torch.tensor([1.0, 1e-9, 1e-30, 0.0])
    ours = empty(len(values), False)
    encode(ours, values)
    assert bool((ours.decode()[:BLOCK] > 0).all())
    assert not ours.decode()[BLOCK:].any()


def test_with_a_sign_zero_is_zero_and_signs_stay() -> None:
    values = normal()
    values[::7] = 0.0
    found = coded(values, True).decode()
    assert not found[::7].any()
    assert torch.equal(found.sign(), values.sign())
    assert torch.equal(coded(-values, True).absmax, coded(values, True).absmax)


@both_signs
def test_the_largest_value_of_a_block_comes_back_to_the_last_bit(signed: bool) -> None:
    values = squared()
    found = coded(values, signed).decode().view(-1, BLOCK)
    places = values.view(-1, BLOCK).argmax(1, keepdim=True)
    assert torch.equal(found.gather(1, places), values.view(-1, BLOCK).gather(1, places))


@both_signs
@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-40, 1e-44])
def test_a_scale_that_cannot_be_divided_by_gives_finite_values_no_larger_than_it(scale: float, signed: bool) -> None:
    values = scale * torch.linspace(-1 if signed else 0, 1, BLOCK)
    found = coded(values, signed).decode()
    assert bool(torch.isfinite(found).all())
    assert found.abs().max() <= values.abs().max()
    assert bool((found * values >= 0).all())


@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_large_values_do_not_overflow(scale: float) -> None:
    values = scale * torch.linspace(-1, 1, BLOCK)
    found = coded(values, True).decode()
    assert error(found / scale, values / scale) < 0.01


@both_signs
def test_values_may_have_any_shape(signed: bool) -> None:
    values = normal(30 * 70).abs().view(30, 70)
    shaped = Blockwise(torch.empty(30, 70, dtype=torch.uint8), torch.empty(9), signed)
    shaped.encode(values)
    assert shaped.decode().shape == (30, 70)
    assert torch.equal(shaped.decode().flatten(), coded(values.flatten(), signed).decode())


@both_signs
def test_parts_are_coded_and_decoded_in_the_place_of_the_whole(signed: bool) -> None:
    values = normal(5 * BLOCK + 31).abs()
    whole, parts = coded(values, signed), empty(len(values), signed)
    for start, stop in ((2 * BLOCK, 5 * BLOCK), (0, 2 * BLOCK), (5 * BLOCK, 5 * BLOCK + 31)):
        part = parts.part(start, stop)
        assert part.signed == signed
        part.encode(values[start:stop])
        assert torch.equal(part.decode(), whole.decode()[start:stop])
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.absmax, whole.absmax)


@both_signs
def test_coding_leaves_the_values_alone_and_decoding_the_codes(signed: bool) -> None:
    values = normal().abs()
    before = values.clone()
    ours = coded(values, signed)
    codes, scales = ours.codes.clone(), ours.absmax.clone()
    ours.decode().fill_(7)
    assert torch.equal(values, before)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, scales)


@both_signs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_value(dtype: torch.dtype, signed: bool) -> None:
    ours = coded(normal().abs(), signed)
    assert ours.decode(dtype).dtype == dtype
    assert torch.equal(ours.decode(dtype), ours.decode().to(dtype))


@both_signs
def test_coding_what_was_decoded_changes_nothing(signed: bool) -> None:
    ours = coded(squared(), signed)
    assert torch.equal(coded(ours.decode(), signed).decode(), ours.decode())


def test_without_bitsandbytes_a_setting_that_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_bitsandbytes("moments 8bit")
    monkeypatch.setattr("pcscale.storage.blockwise.find_spec", lambda name: None)
    message = r"^moments 8bit needs the package bitsandbytes\. Run `pip install bitsandbytes`\.$"
    with pytest.raises(RequestError, match=message):
        require_bitsandbytes("moments 8bit")


def test_loading_the_kernels_says_nothing() -> None:
    code = "import torch; from pcscale.storage.blockwise import Blockwise as B\n"
    code += "B(torch.zeros(256, dtype=torch.uint8), torch.ones(1)).decode(); print('decoded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("decoded\n", "")
