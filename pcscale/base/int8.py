"""The frozen base in 8 bits: its matrices coded once per host into one file beside the run, mapped by every process."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock

from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight, encode_weight
from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.common.files import readable_os_errors
from pcscale.common.sizes import QUANTISED_BLOCK
from pcscale.storage.blockwise import require_bitsandbytes
from pcscale.storage.hashing import fingerprint
from pcscale.storage.host_memory import bytes_of
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import ShardWriter, TensorShape

_FORMAT = "bitsandbytes dynamic signed 8-bit, blocks of 256"
_ABSMAX = ".absmax"
_FINGERPRINTS = "fingerprints"


class Int8Base:
    """The matrices of a base as 8-bit codes.

    The cache is bound to the base by its fingerprints and checked when it is opened: one of another base, or one that
    was cut short or changed, is made again.

    Args:
        cache: the file of the codes, which is written where it is absent; its folder must exist.
        expected: fingerprints that the codes must have, by tensor name, from a manifest.

    Raises:
        RequestError: bitsandbytes is absent, or the codes are not those that a checkpoint was trained on.
        RunError: the disk is full.

    Memory: file-backed only; a few MiB while the cache is written.
    """

    placement = "disk"
    collective = False

    def __init__(self, base: MappedBase, cache: Path, expected: Mapping[str, str] | None = None) -> None:
        require_bitsandbytes("base_precision int8")
        self.stored, self.cache, self.matrix_names = base, cache, base.matrix_names
        coded = _read_cache(cache, base)
        if isinstance(coded, str):
            with readable_os_errors(cache), FileLock(cache.with_name(f".{cache.name}.lock")):
                coded = _read_cache(cache, base)
                if isinstance(coded, str):  # Nobody else has made it meanwhile.
                    if cache.exists():
                        console.warn(f"{cache} {coded}: it is made again")
                    _write_cache(cache, base)
                    coded = _read_cache(cache, base)
        if isinstance(coded, str):
            raise RunError(f"{cache} is not what was written to it just now. Check the disk.")
        self._reader, self.coded_fingerprints = coded
        for name, found in self.coded_fingerprints.items():
            wanted = (expected or {}).get(name, found)
            if wanted != found:
                raise RequestError(
                    f"{name} has 8-bit codes with fingerprint {found[:12]}…, the checkpoint was trained on "
                    f"{wanted[:12]}…. Use the bitsandbytes version that it was trained with."
                )

    def weight(self, name: str) -> FrozenWeight:
        """One base weight, on the host."""
        return FrozenWeight(self._reader.tensor(name), self._reader.tensor(name + _ABSMAX))

    def lost(self, name: str, rows: slice) -> torch.Tensor:
        """The rows less their decoded codes, `(W - Q)[rows]`, float32 (docs/method.md, The base in 8 bits)."""
        coded_bI = self.weight(name).rows(torch.float32, rows.start, rows.stop)
        return self.stored.tensor(name)[rows].float() - coded_bI

    def prefetch(self, names: list[str]) -> None:
        """Have the operating system read these tensors ahead; returns at once."""
        self._reader.prefetch([part for name in names for part in (name, name + _ABSMAX)])


def _read_cache(cache: Path, base: MappedBase) -> tuple[TensorReader, dict[str, str]] | str:
    """The cache and its fingerprints, or the end of a sentence about what is wrong with it."""
    if not cache.exists():
        return "is absent"
    try:
        entries, metadata = read_header(cache)
        reader = TensorReader(entries)
        if metadata != _metadata(base):
            return "is of another base"
        found = {name: _fingerprint(reader.data(name), reader.data(name + _ABSMAX)) for name in base.matrix_names}
        if bytes.fromhex("".join(found.values())) == bytes(reader.data(_FINGERPRINTS)):
            return reader, found
    except (RequestError, KeyError):
        pass
    return "was changed or cut short"


def _metadata(base: MappedBase) -> dict[str, str]:
    return {"bound_to": json.dumps([_FORMAT, base.check_all()], sort_keys=True)}


def _fingerprint(codes: memoryview, absmax: memoryview) -> str:
    return fingerprint((fingerprint(codes) + fingerprint(absmax)).encode())


def _write_cache(cache: Path, base: MappedBase) -> None:
    shapes: dict[str, TensorShape] = {}
    names = base.matrix_names
    for name in names:
        O, I = base.tensor(name).shape
        shapes[name] = (torch.uint8, (O, I))
        shapes[name + _ABSMAX] = (torch.float32, (-(-O * I // QUANTISED_BLOCK),))
    shapes[_FINGERPRINTS] = (torch.uint8, (len(names), 16))
    values = sum(math.prod(shape) for dtype, shape in shapes.values())
    with (
        ShardWriter(cache, shapes, _metadata(base)) as writer,
        console.progress("code the base in 8 bits", values / 1e6, "M values") as progress,
    ):
        for position, name in enumerate(names):
            encode_weight(base.tensor(name), writer[name], writer[name + _ABSMAX])
            found = _fingerprint(bytes_of(writer[name]), bytes_of(writer[name + _ABSMAX]))
            writer[_FINGERPRINTS][position] = torch.tensor(list(bytes.fromhex(found)), dtype=torch.uint8)
            progress.advance(math.prod(shapes[name][1]) / 1e6)
