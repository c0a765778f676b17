"""The ledger of memory: large tensors are entered where they are born, by component and placement.

Activations, temporaries and libraries are not entered; they are the rest of what the process holds (memory/measure.py).
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
_PROJECTIONS = (FROZEN_BASE, ROTATION, RECORDS, MOMENTS, RECORD_BUFFERS, PINNED_BUFFERS)
_MODELS = (WEIGHTS, GRADIENTS, DIRECT, ENGINE, HIDDEN, TEACHER)
COMPONENTS = (LIBRARIES, CONTEXT, *_PROJECTIONS, *_MODELS, WORKING)
"""Every component of measured memory. Libraries, working memory and a device's context are never entered: they are the
rest."""

Key = tuple[str, str]
"""Placement and component."""


class Listener(Protocol):
    """An observer of the run's stages, which measures memory."""

    def change(self, stage: str | None) -> None:
        """Note that another stage begins; None: the phase goes on outside of any stage."""

    def mark_idle(self) -> None:
        """Count all memory that is held and not entered as the libraries'."""


class Ledger:
    """Bytes held now by placement (`host`, `pinned`, `device`) and component, and the stage of the run.

    Thread-safe. Cost: some microseconds an entry.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Key, int] = {}
        self._stages: list[str] = []
        self.listener: Listener | None = None

    def enter(self, component: str, placement: str, num_bytes: int) -> None:
        """Add to the bytes of a component; a negative count takes away."""
        with self._lock:
            self._held[placement, component] = self._held.get((placement, component), 0) + num_bytes

    def keep(self, owner: Any, component: str, placement: str, num_bytes: int) -> None:
        """Enter the bytes that an object holds, until it is gone."""
        self.enter(component, placement, num_bytes)
        weakref.finalize(owner, self.enter, component, placement, -num_bytes)

    def held(self) -> dict[Key, int]:
        """A copy of the bytes that are held now."""
        with self._lock:
            return dict(self._held)

    @property
    def stage(self) -> str | None:
        """The innermost stage that runs now."""
        return self._stages[-1] if self._stages else None

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Name the stage that runs in the block, for the listener. Called from the main thread."""
        self._stages.append(stage)
        self._notify()
        try:
            yield
        finally:
            self._stages.pop()
            self._notify()

    def _notify(self) -> None:
        if self.listener is not None:
            self.listener.change(self.stage)

    def mark_idle(self) -> None:
        """Tell the listener that nothing temporary is held: memory that is not entered belongs to libraries."""
        if self.listener is not None:
            self.listener.mark_idle()


ledger = Ledger()


def placement_of(device: Any) -> str:
    """The placement of a tensor on a torch device: without a GPU the device is the host."""
    return "host" if device.type == "cpu" else "device"
