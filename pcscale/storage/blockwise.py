"""Block-wise 8-bit values in bitsandbytes' format: one code a value, one scale (the largest magnitude) a block of 256.

Decoding, and coding on a GPU, is bitsandbytes' own. Coding on a processor is ours: a table indexed by the value's half
precision, four times as fast as searching the codes for each value. The code is the nearest one to the rounded value,
so it may be its neighbour where a value lies within 2^-11 of itself, or 2^-25 of the scale, from the middle of two.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861 (2022); the codes: Dettmers,
8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
"""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from pcscale.common.errors import RequestError
from pcscale.common.sizes import QUANTISED_BLOCK

_HALVES = 2**16
_DECADES = 7
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Blockwise:
    """8-bit values."""

    codes: torch.Tensor  # uint8, contiguous
    absmax: torch.Tensor  # float32, one for each 256 values of the flat codes
    signed: bool = True
    """False: values are never negative, and none but those of an all-zero block is coded as zero. A second moment of
    zero beside a first moment that is not would make AdamW's step as large as 1 / epsilon."""

    def part(self, start: int, stop: int) -> "Blockwise":
        """The values from `start`, a multiple of 256, to `stop` of the flat codes."""
        assert start % QUANTISED_BLOCK == 0
        return Blockwise(
            self.codes.view(-1)[start:stop],
            self.absmax[start // QUANTISED_BLOCK : -(-stop // QUANTISED_BLOCK)],
            self.signed,
        )

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, in the shape of the codes, newly allocated."""
        code = dynamic_code(self.signed, self.codes.device)
        # bitsandbytes reads the scales by address, whatever their strides are.
        return _operations().dequantize_blockwise(self.codes, self.absmax.contiguous(), code, QUANTISED_BLOCK, dtype)

    def encode(self, values: torch.Tensor) -> None:
        """Code float32 values of the same shape in place of the old ones."""
        if values.device.type == "cpu":
            self._encode_by_table(values)
        else:
            self.encode_by_search(values)

    def encode_by_search(self, values: torch.Tensor) -> None:
        """Code float32 values by bitsandbytes' own search: slow on a processor, for values that are coded once."""
        code = dynamic_code(self.signed, values.device)
        codes, absmax = _operations().quantize_blockwise(values, code, QUANTISED_BLOCK)
        self.codes.copy_(codes if self.signed else codes.clamp_(min=1))
        self.absmax.copy_(absmax)

    def _encode_by_table(self, values: torch.Tensor) -> None:
        flat, codes = values.reshape(-1), self.codes.view(-1)
        whole = flat.numel() // QUANTISED_BLOCK * QUANTISED_BLOCK
        for part in (slice(0, whole), slice(whole, None)):
            blocks = flat[part].view(-1, QUANTISED_BLOCK if part.stop == whole else max(flat.numel() - whole, 1))
            if not blocks.numel():
                continue
            scaled = blocks.abs()
            absmax = self.absmax[part.start // QUANTISED_BLOCK :][: len(blocks)]
            torch.amax(scaled, 1, out=absmax)
            # A denormal scale could not be divided by; values that small are zero.
            torch.div(blocks, absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None], out=scaled)
            index = scaled.half().view(torch.int16).view(-1).to(torch.int32).add_(_HALVES // 2)
            torch.index_select(_table(self.signed), 0, index, out=codes[part])


def require_bitsandbytes(setting: str) -> None:
    """Refuse a setting that needs bitsandbytes where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise RequestError(f"{setting} needs the package bitsandbytes. Run `pip install bitsandbytes`.")


@cache
def _operations() -> Any:
    # On some processors it asks for a package with 4-bit products, which nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401 # pyright: ignore[reportUnusedImport]

    return torch.ops.bitsandbytes


@cache
def dynamic_code(signed: bool, device: torch.device = _HOST) -> torch.Tensor:
    """The 256 values that a code stands for, ascending: seven decades, each with twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        steps = 10 ** (decade + 1.0 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += steps.tolist() + (-steps).tolist() * signed
    return torch.tensor(sorted(values)).to(device)


@cache
def _table(signed: bool) -> torch.Tensor:
    """The code of every half-precision value, in the order of their bits read as signed 16-bit integers."""
    code = dynamic_code(signed)
    halves = torch.arange(-_HALVES // 2, _HALVES // 2).to(torch.int16).view(torch.float16).float().nan_to_num()
    table = torch.bucketize(halves, (code[:-1] + code[1:]) / 2)
    return (table if signed else table.clamp_min(1)).to(torch.uint8)
