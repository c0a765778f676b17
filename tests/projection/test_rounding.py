"""Stochastic rounding: the mean is kept, neighbours are the only results, and the noise depends on key and place."""

import itertools
import math

import pytest
import torch

from pcscale.projection.rounding import noise_key, round_stochastically

SIGMAS = 5
"""Of a binomial count. The keys are fixed, so that a test passes always or never."""
CHI_SQUARE_SIGMAS = 6
"""Of a chi-square with so many degrees of freedom that it is nearly normal: its mean is their number, its variance
twice that."""
KEYS = 1000
KEY = noise_key(seed=3, step=1, matrix=4, part=2)


def rounded(values: torch.Tensor, key: int = KEY, first: int = 0) -> torch.Tensor:
    out = torch.full((len(values),), torch.nan, dtype=torch.bfloat16)
    round_stochastically(values.clone(), key, first, out)
    return out


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 values next to each value, the one nearer to zero first; both itself where it is one."""
    bits = values.view(torch.int32)
    low = bits & ~0xFFFF
    high = torch.where(bits == low, low, low + 0x10000)
    return low.view(torch.float32), high.view(torch.float32)


def random_values(count: int, seed: int = 0) -> torch.Tensor:
    """Of both signs, over many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 2 ** (40 * torch.rand(count, generator=generator) - 20)


def noise_of(key: int, count: int, bits: int = 16) -> torch.Tensor:
    """The upper bits of the noise at each place, found by a search for the fraction at which the value above is taken.

    A search of fewer than 16 steps leaves the lower bits unknown: zeros.
    """
    low, high = torch.zeros(count, dtype=torch.int32), torch.full((count,), 2**16, dtype=torch.int32)
    one = torch.tensor(1.0).view(torch.int32)
    for _ in range(bits):
        middle = (low + high) // 2
        up = rounded((one + middle).view(torch.float32), key).float() > 1
        high, low = torch.where(up, middle, high), torch.where(up, low, middle)
    return 2**16 - high


def assert_uniform(counts: torch.Tensor) -> None:
    """Counts of equally likely outcomes."""
    expected = counts.sum() / counts.numel()
    assert expected >= 5, "enough for a chi-square"
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    assert abs(chi_square - freedom) <= CHI_SQUARE_SIGMAS * math.sqrt(2 * freedom)


def test_a_value_goes_to_one_of_its_two_neighbours() -> None:
    values = random_values(20_000)
    low, high = neighbours(values)
    found = rounded(values).float()
    assert bool(((found == low) | (found == high)).all())
    inexact = low != high
    assert bool(inexact.any())
    share = (found == high)[inexact].float().mean()
    assert 0.45 < share < 0.55, "both are taken"


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("fraction", [1, 100, 2**15, 2**16 - 1])
def test_the_mean_of_many_roundings_is_the_value(fraction: int, sign: int) -> None:
    """Of 1 + fraction / 2^23, whose neighbours are 1 and 1 + 2^-7, at 64 places under 1,000 keys."""
    value = sign * (1 + fraction / 2**23)
    values = torch.full((64,), value)
    assert values[0].item() == value
    results = torch.stack([rounded(values, noise_key(0, step, 0, 0)).float() for step in range(KEYS)])
    share = fraction / 2**16
    sigma = 2**-7 * math.sqrt(share * (1 - share) / results.numel())
    assert abs(results.double().mean().item() - value) <= SIGMAS * sigma


def test_values_over_many_powers_of_two_keep_their_means() -> None:
    values = random_values(256, seed=5)
    low, high = neighbours(values)
    assert bool((low != high).all())
    up = sum((rounded(values, noise_key(1, step, 0, 0)).float() == high).double() for step in range(KEYS))
    share = ((values - low) / (high - low)).double()
    sigma = (share * (1 - share) * KEYS).sqrt()
    assert bool(((up - share * KEYS).abs() <= SIGMAS * sigma + 1).all())


def test_what_is_a_bfloat16_stays_whatever_the_noise() -> None:
    values = random_values(5000).bfloat16()
    values[:4] = torch.tensor([0.0, -0.0, 1.0, -(2.0**-130)])
    for step in range(20):
        found = rounded(values.float(), noise_key(0, step, 0, 0))
        assert torch.equal(found.view(torch.int16), values.view(torch.int16)), "zeros keep their signs as well"


def test_a_negative_value_goes_where_its_opposite_goes() -> None:
    values = random_values(5000)
    assert torch.equal(rounded(-values), -rounded(values))


@pytest.mark.parametrize("chunk", [2, 6, 250, 256, 1000])
def test_the_result_does_not_depend_on_chunks(chunk: int) -> None:
    values = random_values(2001)
    parts = [rounded(values[first : first + chunk], first=first) for first in range(0, len(values), chunk)]
    assert torch.equal(torch.cat(parts), rounded(values))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 257])
def test_a_tensor_of_any_length_is_the_beginning_of_a_longer_one(count: int) -> None:
    values = random_values(300)
    assert torch.equal(rounded(values[:count]), rounded(values)[:count])


def test_a_chunk_begins_at_an_even_place() -> None:
    with pytest.raises(AssertionError):
        rounded(random_values(10), first=3)


def test_the_same_key_gives_the_same_bits_and_any_other_key_others() -> None:
    values = torch.full((512,), 1 + 2.0**-8)  # In the middle of two.
    expected = rounded(values, noise_key(1, 2, 3, 4))
    assert torch.equal(rounded(values, noise_key(1, 2, 3, 4)), expected)
    for other in itertools.product((1, 5), (2, 6), (3, 7), (4, 8)):
        if other != (1, 2, 3, 4):
            agreeing = (rounded(values, noise_key(*other)) == expected).float().mean()
            assert 0.35 < agreeing < 0.65, other


def test_keys_have_32_bits_and_tell_every_rounding_apart() -> None:
    parts = list(itertools.product(range(3), range(40), range(30), range(5)))
    keys = {noise_key(*part) for part in parts}
    assert len(keys) > len(parts) - 20, "some 18,000 of four thousand million: hardly two alike"
    assert min(keys) >= 0
    assert max(keys) < 2**32
    assert noise_key(1, 2, 3, 4) != noise_key(1, 3, 2, 4) != noise_key(2, 1, 3, 4)


def test_all_16_bits_of_the_noise_are_uniform_over_places() -> None:
    noise = noise_of(KEY, 2**16)
    assert noise.min() >= 0
    assert noise.max() < 2**16
    assert_uniform(torch.bincount(noise >> 8, minlength=256))
    assert_uniform(torch.bincount(noise & 0xFF, minlength=256))
    assert_uniform(torch.bincount(noise >> 4 & 0xFF, minlength=256))


def test_the_noise_is_uniform_over_steps_at_one_place() -> None:
    noise = torch.stack([noise_of(noise_key(0, step, 0, 0), 64, bits=4) >> 12 for step in range(KEYS)])
    for place in range(64):
        assert_uniform(torch.bincount(noise[:, place], minlength=16))
    following = noise[:-1] * 16 + noise[1:]
    assert_uniform(torch.bincount(following.flatten(), minlength=256))


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 256])
def test_the_noise_of_one_place_says_nothing_of_another(distance: int) -> None:
    noise = noise_of(KEY, 2**15)
    for one, other in (
        (noise[:-distance] >> 12, noise[distance:] >> 12),
        (noise[:-distance] & 15, noise[distance:] & 15),
    ):
        assert_uniform(torch.bincount(one * 16 + other, minlength=256))


def test_the_noise_of_one_key_says_nothing_of_the_next() -> None:
    for names in (((0, 1, 0, 0), (0, 2, 0, 0)), ((0, 1, 0, 0), (0, 1, 1, 0)), ((0, 1, 0, 0), (0, 1, 0, 1))):
        one, other = (noise_of(noise_key(*name), 2**14) >> 12 for name in names)
        assert_uniform(torch.bincount(one * 16 + other, minlength=256))
