"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import signal
import threading
from types import FrameType


class StopRequest:
    """While the block runs, the first signal sets `asked`; a second Ctrl-C interrupts at once.

    A SIGTERM after another signal does not: DeepSpeed's launcher sends one when it sees the Ctrl-C that ranks saw too.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
