"""Stochastic rounding to bfloat16 with noise that is a pure function of a key and a position.

A value between two bfloat16 neighbours goes to either with the probability that keeps its mean, so that updates far
below one bfloat16 step add up over many steps. The noise is a hash of a counter: it needs no state, is the same on
every device, and does not depend on how a tensor is cut into chunks, so a resumed run rounds bit for bit as before.

Source of the hash's constants: Wellons' search for low-bias 32-bit integer hashes ("lowbias32", improved variant).
"""

import torch

_ROUNDS = ((16, 0xFFFF, 0x21F0AAAD), (15, 0x1FFFF, 0xD35A2D97 - 2**32))
_LAST_SHIFT, _LAST_MASK = 15, 0x1FFFF
_GOLDEN = 0x9E3779B9
_MASK = 2**32 - 1


def noise_key(seed: int, step: int, matrix: int, part: int) -> int:
    """A key of 32 bits from what tells two roundings apart."""
    key = 0
    for number in (seed, step, matrix, part):
        key = _mix((key + _GOLDEN + number) & _MASK)
    return key


def round_stochastically(values: torch.Tensor, key: int, first: int, out: torch.Tensor) -> None:
    """Write finite float32 `values` into the bfloat16 `out`, each to one of its two neighbours.

    Args:
        values: flat, contiguous; used as scratch.
        first: position of the first value in its tensor; even.
        out: flat, of the same length.
    """
    bits = values.view(torch.int32)
    # Uniform over 2^16 and added below the 16 bits that stay, it carries into them as often as it should.
    bits.add_(_noise(key, first, len(values), values.device)).add_(2**15)
    out.view(torch.int16).copy_(bits.view(torch.int16)[1::2])  # Little-endian: the upper half is the bfloat16.


def _noise(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """`[count]` int16, uniform over all 16 bits: the halves of one hash for every two positions."""
    assert first % 2 == 0
    start = first // 2
    # The counter times an odd constant, so that neighbours differ in many bits before the first round.
    hashed = torch.arange(start, start + (count + 1) // 2, dtype=torch.int32, device=device)
    hashed.mul_(_signed(_GOLDEN)).add_(_signed(key))
    shifted = torch.empty_like(hashed)
    for shift, mask, factor in _ROUNDS:
        _xor_shifted(hashed, shifted, shift, mask)
        hashed.mul_(factor)
    _xor_shifted(hashed, shifted, _LAST_SHIFT, _LAST_MASK)
    return hashed.view(torch.int16)[:count]


def _xor_shifted(hashed: torch.Tensor, scratch: torch.Tensor, shift: int, mask: int) -> None:
    # The mask takes away the copies of the sign bit that an arithmetic shift brings in.
    torch.bitwise_right_shift(hashed, shift, out=scratch)
    hashed.bitwise_xor_(scratch.bitwise_and_(mask))


def _mix(number: int) -> int:
    """The hash of one number."""
    for shift, _, factor in _ROUNDS:
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> _LAST_SHIFT)


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
