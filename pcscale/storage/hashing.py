"""Fingerprints that bind files and tensors to each other: 128-bit XXH3, as fast as memory is read.

They find mistakes and corruption, not forgery (docs/decisions/0003).
"""

import hashlib
from pathlib import Path

import xxhash


def fingerprint(data: memoryview | bytes) -> str:
    """The fingerprint of some bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint_file(path: Path) -> str:
    """The fingerprint of a file's content. Memory: a small buffer."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()
