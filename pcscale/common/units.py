"""Sizes, counts and names as people write and read them."""

import math
import re
from pathlib import Path

from pcscale.common.errors import RequestError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_FACTORS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Read a size such as `5GB`, `5GiB`, `24g` (decimal) or `5000000000`. Units: bytes.

    Raises:
        RequestError: the text is no size, or the size is not positive.
    """
    match = _SIZE.fullmatch(str(text))
    size_bytes = 0
    if match and not (match[3] and not match[2]):
        factors = _BINARY_FACTORS if match[3] else _FACTORS
        size = float(match[1]) * factors[match[2].lower()]
        size_bytes = int(size) if math.isfinite(size) else 0
    if size_bytes <= 0 or isinstance(text, bool):
        raise RequestError(f"'{text}' is not a size. Write it like 5GB, 5GiB or 5000000000.")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Write bytes for people: `1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} TiB"


def format_count(count: float) -> str:
    """Write a count for people: `134515008` → `134.5 M`."""
    for unit in ("", " K", " M", " G", " T", " P"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.{1 if unit in (' K', ' M') else 2}f}{unit}"
        count /= 1000
    return f"{count:.2f} E"


def format_seconds(seconds: float) -> str:
    """Write a duration for people: `3725` → `1:02:05`."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def short_name(model: str) -> str:
    """A Hub id unchanged, or the last part of a folder's path, since the rest means nothing elsewhere."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def aligned(num_bytes: int) -> int:
    """The next multiple of 512, at which another buffer may follow."""
    return -(-num_bytes // 512) * 512
