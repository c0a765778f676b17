"""What a run really takes: peaks and times by phase, moment and component, and memory over time.

A thread samples the process some dozen times a second. Components that the ledger knows (common/ledger.py) are exact;
working memory is the difference to what the process holds. Device peaks are the allocator's own, also exact.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcscale.common.allocator import trim_heap
from pcscale.common.ledger import CONTEXT, LIBRARIES, WORKING, ledger
from pcscale.memory.process import anonymous_bytes, file_bytes, unique_bytes, written_bytes
from pcscale.memory.series import Sample, Series
from pcscale.memory.watchdog import Watchdog

SNAPSHOT_ENTRIES = 100_000
"""Events of a snapshot: the last ones."""
INTERVAL_SECONDS = 0.05
"""Between two samples: one takes some 60 microseconds."""


PEAKS = ("host_anonymous", "host_file", "host_unique", "pinned", "device", "device_reserved")


@dataclass
class Usage:
    """What a phase, or a moment of it, took at most. Units: seconds, bytes; None: not there, or not told.

    Attributes:
        written: to disks, in all.
        components: by home and name, each one's own highest; of working memory, which is a difference, what it was when
            that home held most.
        most: by home, what it held then.
    """

    seconds: float = 0.0
    peak: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(PEAKS))
    written: int = 0
    components: dict[str, dict[str, int]] = field(default_factory=lambda: {"host": {}, "device": {}})
    most: dict[str, int] = field(default_factory=dict)
    moments: dict[str, "Usage"] = field(default_factory=dict)

    def raise_to(self, peaks: dict[str, int | None], components: dict[str, dict[str, int]]) -> None:
        """Take what is higher than before."""
        for name, num_bytes in peaks.items():
            if num_bytes is not None:
                self.peak[name] = max(self.peak[name] or 0, num_bytes)
        for home, parts in components.items():
            highest, total = self.components[home], sum(parts.values())
            for name, num_bytes in parts.items():
                if name != WORKING:
                    highest[name] = max(highest.get(name, 0), num_bytes)
                elif total >= self.most.get(home, 0):
                    # At other times the allocator may still keep what the ledger has struck out.
                    highest[name], self.most[home] = num_bytes, total

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Usage":
        """From what `document` gave."""
        peaks = dict(values["peak"])
        written = peaks.pop("written", 0)
        moments = {name: cls.read(moment) for name, moment in values.get("moments", {}).items()}
        return cls(values["seconds"], peaks, written, values["components"], dict(values.get("most", {})), moments)

    def document(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "peak": {**self.peak, "written": self.written},
            "components": self.components,
            "most": self.most,
            "moments": {name: moment.document() for name, moment in self.moments.items()},
        }


class Tracker:
    """Measures the phases of one run; a phase that is entered again, as after a resume, adds up.

    Args:
        phases: what an earlier part of the run took, by phase; changed in place.
        series: its samples.
        watchdog: warns when memory is nearly full; None: nobody does.
    """

    def __init__(self, phases: dict[str, Usage], series: Series, watchdog: Watchdog | None = None) -> None:
        self.phases, self.series = phases, series
        self._watchdog = watchdog
        self._lock = threading.Lock()
        self._phase: str | None = None
        self._moment: str | None = None
        self._libraries = self._context = 0
        self._began = self._moment_began = time.monotonic()
        self._earlier_seconds = series.last_seconds
        self._written = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase."""
        trim_heap()
        self.mark_idle()
        usage = self.phases.setdefault(name, Usage())
        self._phase, self._moment, self._written = name, None, written_bytes()
        started = self._moment_began = time.monotonic()
        stop = threading.Event()
        sampler = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        _reset_device_peak()
        ledger.listener = self
        sampler.start()
        try:
            yield
        finally:
            ledger.listener = None
            stop.set()
            sampler.join()
            self.change(None)
            usage.raise_to({"host_unique": unique_bytes()}, {})
            usage.seconds += time.monotonic() - started
            self._phase = None

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL_SECONDS):
            self._sample()

    def mark_idle(self) -> None:
        """Take what nobody has entered for the libraries'."""
        entered = sum(num_bytes for (home, _), num_bytes in ledger.held().items() if home != "device")
        with self._lock:
            self._libraries = max(0, anonymous_bytes() - entered)
            self._context = _context_bytes()

    def change(self, stage: str | None) -> None:
        """Close the stage that ends here; on the thread that does the work."""
        assert self._phase is not None
        self._sample()
        now, written = time.monotonic(), written_bytes()
        with self._lock:
            usage = self.phases[self._phase]
            usage.written += written - self._written
            for entry in (usage, self._of_moment(usage)):
                if entry is not None:
                    entry.raise_to(_device_peaks(self._context), {})
            current = self._of_moment(usage)
            if current is not None:
                current.seconds += now - self._moment_began
                current.written += written - self._written
            self._moment, self._moment_began, self._written = stage, now, written
            _reset_device_peak()

    def _of_moment(self, usage: Usage) -> Usage | None:
        return None if self._moment is None else usage.moments.setdefault(self._moment, Usage())

    def _sample(self) -> None:
        with self._lock:
            if self._phase is None:
                return
            anonymous = anonymous_bytes()
            host, device = self._components(anonymous)
            pinned = sum(n for (home, _), n in ledger.held().items() if home == "pinned")
            peaks = {"host_anonymous": anonymous, "host_file": file_bytes(), "pinned": pinned}
            usage = self.phases[self._phase]
            for entry in (usage, self._of_moment(usage)):
                if entry is not None:
                    entry.raise_to(peaks, {"host": host, "device": device})
            seconds = self._earlier_seconds + time.monotonic() - self._began
            self.series.add(Sample(seconds, self._phase, self._moment, host, device))
        if self._watchdog is not None:
            self._watchdog.look(host, device)

    def _components(self, anonymous: int) -> tuple[dict[str, int], dict[str, int]]:
        """What the host and the device hold now, by component."""
        host: dict[str, int] = {LIBRARIES: self._libraries}
        device: dict[str, int] = {}
        for (home, component), num_bytes in ledger.held().items():
            where = device if home == "device" else host
            where[component] = where.get(component, 0) + num_bytes
        # Memory that was taken but not written to yet is not there: the difference may be less than nothing.
        host[WORKING] = max(0, anonymous - sum(host.values()))
        if _on_gpu():
            import torch

            device[WORKING] = max(0, torch.cuda.memory_allocated() - sum(device.values()))
            device[CONTEXT] = self._context
        return host, device


@contextmanager
def allocator_snapshot(path: Path | None) -> Iterator[None]:
    """Record a GPU's allocator during the block, into a file for torch's viewer; None: nothing is recorded."""
    if path is None:
        yield
        return
    import torch

    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_device_peak() -> None:
    if _on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()


def _context_bytes() -> int:
    """What of the device is taken beside torch's allocator: its context, and whatever others hold of it."""
    if not _on_gpu():
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def _device_peaks(context: int) -> dict[str, int | None]:
    if not _on_gpu():
        return {}
    import torch

    peaks = {"device": torch.cuda.max_memory_allocated(), "device_reserved": torch.cuda.max_memory_reserved()}
    return {name: num_bytes + context for name, num_bytes in peaks.items()}
