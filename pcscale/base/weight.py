"""One frozen base weight: its stored values, or 8-bit codes of them."""

from dataclasses import dataclass

import torch

from pcscale.common.sizes import QUANTISED_BLOCK
from pcscale.storage.blockwise import Blockwise

_CHUNK_VALUES = 2**18
"""Values that are coded or decoded at a time on a processor: as many as its cache holds."""


@dataclass(frozen=True)
class FrozenWeight:
    """A base weight `[O, I]`, most often mapped from a file."""

    values: torch.Tensor  # in the stored dtype, or uint8 codes
    absmax: torch.Tensor | None = None  # the scales of the codes; None: `values` are stored ones

    @property
    def shape(self) -> tuple[int, int]:
        O, I = self.values.shape
        return O, I

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.values] if self.absmax is None else [self.values, self.absmax]

    def to(self, device: torch.device) -> "FrozenWeight":
        """This weight on a device, without a copy where it is there already."""
        return FrozenWeight(*(tensor.to(device, non_blocking=True) for tensor in self.tensors))

    def keep_for(self, device: torch.device) -> None:
        """Keep its memory on a GPU from being used again before the current stream's queued work is done."""
        if device.type != "cpu":
            for tensor in self.tensors:
                tensor.record_stream(torch.cuda.current_stream(device))

    def rows(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows from `start`, a multiple of 256, in the dtype of the products; a view where they are stored in it."""
        stop = len(self.values) if stop is None else min(stop, len(self.values))
        if self.absmax is None:
            return self.values[start:stop].to(dtype)
        width = self.values.shape[1]
        coded = Blockwise(self.values, self.absmax).part(start * width, stop * width)
        if coded.codes.device.type != "cpu":
            return coded.decode(dtype).view(-1, width)
        flat = torch.empty(len(coded.codes), dtype=dtype)
        for first in range(0, len(flat), _CHUNK_VALUES):
            last = min(first + _CHUNK_VALUES, len(flat))
            flat[first:last] = coded.part(first, last).decode(dtype)
        return flat.view(-1, width)

    def copy_block(self, out: torch.Tensor, rows: slice, columns: slice = slice(None)) -> torch.Tensor:
        """Write a block into `out` and return it; it begins, and ends before the end, at multiples of 256.

        Memory: small chunks.
        """
        if self.absmax is None:
            return out.copy_(self.values[rows, columns])
        O, I = self.shape
        row_start, row_stop, _ = rows.indices(O)
        start, stop, _ = columns.indices(I)
        if I % QUANTISED_BLOCK:  # Blocks of codes run over the ends of rows.
            for first in range(row_start, row_stop, QUANTISED_BLOCK):
                last = min(first + QUANTISED_BLOCK, row_stop)
                out[first - row_start : last - row_start] = self.rows(out.dtype, first, last)[:, start:stop]
            return out
        codes = self.values[rows, columns]
        scales = self.absmax.view(O, -1)[rows, start // QUANTISED_BLOCK : -(-stop // QUANTISED_BLOCK)]
        lines = max(1, _CHUNK_VALUES // (stop - start))
        for first in range(0, len(out), lines):
            part = Blockwise(codes[first : first + lines].contiguous(), scales[first : first + lines].reshape(-1))
            out[first : first + lines] = part.decode(out.dtype)
        return out


def encode_weight(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Code a stored weight into `codes` and `absmax`, on the host. Memory: a chunk of float32 at a time."""
    flat, coded = weight.reshape(-1), Blockwise(codes.view(-1), absmax)
    for first in range(0, len(flat), _CHUNK_VALUES):
        last = min(first + _CHUNK_VALUES, len(flat))
        coded.part(first, last).encode_by_search(flat[first:last].float())
