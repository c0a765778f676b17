"""What memory is taken for: large tensors are entered where they are born, by component and home.

What is not entered (activations, temporaries, libraries) is the difference to what the process holds (memory/tracker).
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

LIBRARIES = "libraries"
FROZEN_BASE = "frozen base"
ROTATION = "rotation"
RECORDS = "records"
MOMENTS = "moments"
RECORD_BUFFERS = "record buffers"
PINNED_BUFFERS = "pinned buffers"
WEIGHTS = "compressed weights"
GRADIENTS = "gradients"
DIRECT = "norms and biases"
ENGINE = "ZeRO copies and buckets"
HIDDEN = "hidden states"
TEACHER = "teacher"
WORKING = "working memory"
CONTEXT = "device context"
COMPONENTS = (
    LIBRARIES,
    CONTEXT,
    FROZEN_BASE,
    ROTATION,
    RECORDS,
    MOMENTS,
    RECORD_BUFFERS,
    PINNED_BUFFERS,
    WEIGHTS,
    GRADIENTS,
    DIRECT,
    ENGINE,
    HIDDEN,
    TEACHER,
    WORKING,
)
"""Every component of measured memory. Libraries, working memory and a device's context are never entered: they are what
is left."""

Key = tuple[str, str]
"""Home and component."""


class Listener(Protocol):
    """Who measures."""

    def change(self, moment: str | None) -> None:
        """Another moment begins; None: none of its own."""
        ...

    def settle(self) -> None:
        """Everything that is held now is entered, or the libraries'."""
        ...


class Ledger:
    """Bytes held now by home (`host`, `pinned`, `device`) and component, and the moment of the run.

    Thread-safe. Cost: some microseconds an entry.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Key, int] = {}
        self._moments: list[str] = []
        self.listener: Listener | None = None

    def enter(self, component: str, home: str, num_bytes: int) -> None:
        """Add to what is held; a negative count takes away."""
        with self._lock:
            self._held[home, component] = self._held.get((home, component), 0) + num_bytes

    def keep(self, owner: Any, component: str, home: str, num_bytes: int) -> None:
        """Enter what an object holds, until it is gone."""
        self.enter(component, home, num_bytes)
        weakref.finalize(owner, self.enter, component, home, -num_bytes)

    def held(self) -> dict[Key, int]:
        """A copy of what is held now."""
        with self._lock:
            return dict(self._held)

    @property
    def moment(self) -> str | None:
        """The innermost part of the phase that runs now."""
        return self._moments[-1] if self._moments else None

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """Name what runs in the block, for whoever measures. Called from the main thread."""
        self._moments.append(moment)
        self._tell(moment)
        try:
            yield
        finally:
            self._moments.pop()
            self._tell(self.moment)

    def _tell(self, moment: str | None) -> None:
        if self.listener is not None:
            self.listener.change(moment)

    def settle(self) -> None:
        """Say that nothing temporary is held: what is not entered are libraries."""
        if self.listener is not None:
            self.listener.settle()


ledger = Ledger()


def home_of(device: Any) -> str:
    """The home of a tensor on a torch device: without a GPU the device is the host."""
    return "host" if device.type == "cpu" else "device"
