"""Fingerprints that bind files and tensors to each other: 128-bit XXH3, as fast as memory is read.

They find mistakes and corruption, not forgery (docs/decisions/0003).
"""

import mmap
from pathlib import Path

import xxhash


def fingerprint(data: memoryview | bytes) -> str:
    """The fingerprint of some bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint_file(path: Path) -> str:
    """The fingerprint of a file's content. Memory: file-backed only."""
    if not path.stat().st_size:
        return fingerprint(b"")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return xxhash.xxh3_128_hexdigest(data)
