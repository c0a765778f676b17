"""Memory that this process holds, as the system tells it, and the machine it runs on."""

import re
import threading
from functools import cache
from pathlib import Path

import psutil
import torch

from pcscale.common.console import console
from pcscale.run.record import Machine

_STATUS = Path("/proc/self/status")
_CPU_INFO = Path("/proc/cpuinfo")
_RSS = {name: re.compile(rb"Rss" + name + rb":\s+(\d+) kB") for name in (b"Anon", b"File")}


def _resident(name: bytes) -> int | None:
    """Resident memory of this process of one kind; None: the system does not tell."""
    try:
        match = _RSS[name].search(_STATUS.read_bytes())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def anonymous_bytes() -> int:
    """Anonymous memory of this process, which no file backs (docs/decisions/0004).

    Where the system does not tell it apart (it is not Linux, or hides /proc): all resident memory, and a warning.
    """
    found = _resident(b"Anon")
    if found is not None:
        return found
    _warn_of_resident_memory()
    return psutil.Process().memory_info().rss


@cache
def _warn_of_resident_memory() -> None:
    console.warn(
        f"{_STATUS} does not tell anonymous memory here: measured host memory is all that is resident, "
        "mapped files with it."
    )


def file_bytes() -> int | None:
    """Resident pages of mapped files; None: the system does not tell them apart."""
    return _resident(b"File")


def unique_bytes() -> int | None:
    """Memory that would be free if this process ended (USS); None: the system does not tell. Takes milliseconds."""
    try:
        return psutil.Process().memory_full_info().uss
    except (psutil.Error, OSError, AttributeError):  # No /proc, or a system without USS.
        return None


def written_bytes() -> int:
    """Bytes that this process has sent to disks so far; 0 where the system does not count them."""
    try:
        return psutil.Process().io_counters().write_bytes
    # A kernel that does not count, a sandbox that hides the file, or psutil without it (NotImplementedError).
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return 0


class AnonymousPeak:
    """Samples anonymous memory on a thread while the block runs. Overhead: some ten microseconds a sample."""

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self.interval_seconds = interval_seconds
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __enter__(self) -> "AnonymousPeak":
        self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def machine() -> Machine:
    """The machine that figures are measured on."""
    model = re.search(r"model name\s*:\s*(.+)", _CPU_INFO.read_text()) if _CPU_INFO.exists() else None
    return Machine(
        cpu=model[1] if model else "unknown",
        cores=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        memory_bytes=psutil.virtual_memory().total,
    )
