"""What a phase really took: seconds, peak anonymous host memory, peak device memory."""

import ctypes
import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_STATUS = Path("/proc/self/status")
_CPU_INFO = Path("/proc/cpuinfo")
_RSS_ANON = re.compile(rb"RssAnon:\s+(\d+) kB")


def anonymous_bytes() -> int:
    """Anonymous memory of this process: what no file backs (docs/decisions/0004). Elsewhere than Linux: all of it."""
    if _STATUS.exists():
        match = _RSS_ANON.search(_STATUS.read_bytes())
        if match:
            return int(match[1]) * 1024
    return psutil.Process().memory_info().rss


def release_freed() -> None:
    """Give memory that is free inside the allocator back to the system: glibc keeps gigabytes of small tensors."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


@dataclass
class PhaseUsage:
    """What one phase took. Units: seconds, bytes."""

    seconds: float = 0.0
    peak_host_anonymous_bytes: int = 0
    peak_device_bytes: int | None = None  # None: there was no device beside the host


@contextmanager
def measured(usage: dict[str, PhaseUsage], phase: str) -> Iterator[None]:
    """Add what the block takes to a phase; a phase that is entered again, as after a resume, adds up."""
    import torch

    entry = usage.setdefault(phase, PhaseUsage())
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, peak = time.monotonic(), AnonymousPeak()
    try:
        with peak:
            yield
    finally:
        entry.seconds += time.monotonic() - started
        entry.peak_host_anonymous_bytes = max(entry.peak_host_anonymous_bytes, peak.peak_bytes)
        if on_gpu:
            entry.peak_device_bytes = max(entry.peak_device_bytes or 0, torch.cuda.max_memory_allocated())


def machine() -> dict[str, Any]:
    """What the figures were measured on. Units: bytes."""
    import torch

    model = "unknown"
    if _CPU_INFO.exists():
        match = re.search(r"model name\s*:\s*(.+)", _CPU_INFO.read_text())
        model = match[1] if match else model
    return {
        "cpu": model,
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": psutil.virtual_memory().total,
    }
