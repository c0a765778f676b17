"""A warning before memory runs out, while there is still time to stop at a checkpoint."""

import time
from collections.abc import Callable

from pcscale.common.console import console
from pcscale.common.units import format_bytes
from pcscale.memory.limits import Limit

NEAR_SHARE = 0.95
"""From this share of a limit on it is near."""
CALM_SHARE = 0.90
"""Below this share a warning may be given again."""
INTERVAL_SECONDS = 1.0


class Watchdog:
    """Compares memory in use with its limits.

    Args:
        limits: the limits on `host` and `device` memory, and how to see the bytes in use that count against each.
    """

    def __init__(self, limits: dict[str, tuple[Limit, Callable[[], int]]]) -> None:
        self._limits = limits
        self._warned: set[str] = set()
        self._next_look = 0.0

    def look(self, host: dict[str, int], device: dict[str, int]) -> None:
        """Warn where memory is within 5 % of its limit, once until it has fallen below 90 % of it.

        Args:
            host, device: bytes that this process holds, by component.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + INTERVAL_SECONDS
        for memory, components in (("host", host), ("device", device)):
            limit, in_use = self._limits[memory]
            if limit.num_bytes is None:
                continue
            used = in_use()
            if used < CALM_SHARE * limit.num_bytes:
                self._warned.discard(memory)
            elif used >= NEAR_SHARE * limit.num_bytes and memory not in self._warned:
                self._warned.add(memory)
                size, name = max(((size, name) for name, size in components.items()), default=(0, ""))
                largest = f"; the largest part of this run is {name} ({format_bytes(size)})" if name else ""
                console.warn(
                    f"{memory} memory is nearly full: {format_bytes(used)} of {format_bytes(limit.num_bytes)} "
                    f"({limit.source}){largest}. Ctrl-C writes a checkpoint; `pcscale plan` shows what would need less."
                )
