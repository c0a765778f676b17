"""Memory and time that a run really takes, by phase, stage and component, and memory over time.

A thread samples the process some dozen times a second. Components that the ledger knows (common/ledger.py) are exact;
working memory is the difference to the memory that the process holds. Device peaks are the allocator's own, also exact.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pcscale.common.allocator import trim_heap
from pcscale.common.ledger import CONTEXT, LIBRARIES, WORKING, ledger
from pcscale.memory.process import anonymous_bytes, file_bytes, unique_bytes, written_bytes
from pcscale.memory.watchdog import Watchdog
from pcscale.run.documents import read_document, write_document
from pcscale.run.record import MemorySamples, Peaks, Sample, Usage

MAX_SAMPLES = 1000
SNAPSHOT_ENTRIES = 100_000
"""Events of a snapshot: the last ones."""
INTERVAL_SECONDS = 0.05
"""Between two samples: one takes some 60 microseconds."""


class Series:
    """Memory over time in at most `MAX_SAMPLES` samples: the highest of each stretch; stretches grow with the run.

    Args:
        samples: those of an earlier part of the run.
    """

    def __init__(self, samples: list[Sample] | None = None) -> None:
        self.samples = samples or []
        self._stretch = self._left = 1
        """Samples that make one kept sample, and how many of them are still to come."""
        self._thin_out()

    def add(self, sample: Sample) -> None:
        """Take a sample, later than all others."""
        if self._left == self._stretch:
            self.samples.append(sample)
            self._thin_out()
        elif sample.total > self.samples[-1].total:
            self.samples[-1] = sample
        self._left = self._left - 1 or self._stretch

    def _thin_out(self) -> None:
        while len(self.samples) >= MAX_SAMPLES:
            pairs = [self.samples[first : first + 2] for first in range(0, len(self.samples), 2)]
            self.samples = [max(pair, key=lambda sample: sample.total) for pair in pairs]
            self._stretch *= 2
            self._left = self._stretch

    def write(self, path: Path) -> None:
        """Replace memory.json."""
        write_document(path, MemorySamples(self.samples))

    @classmethod
    def read(cls, path: Path) -> "Series":
        """The series that `write` left; an empty one where there is no file.

        Raises:
            RequestError: the file is broken.
        """
        kept = read_document(path, MemorySamples, "Restore or remove the file.")
        return cls(kept.samples if kept else None)


class MemoryMeter:
    """Measures the phases of one run; a phase that is entered again, as after a resume, adds up.

    Args:
        phases: usage of an earlier part of the run, by phase; changed in place.
        series: its samples.
        watchdog: warns when memory is nearly full; None: nobody does.
    """

    def __init__(self, phases: dict[str, Usage], series: Series, watchdog: Watchdog | None = None) -> None:
        self.phases, self.series = phases, series
        self._watchdog = watchdog
        self._lock = threading.Lock()
        self._phase: str | None = None
        self._stage: str | None = None
        self._libraries = self._context = 0
        self._stage_began = time.monotonic()
        self._began = self._stage_began - (series.samples[-1].seconds if series.samples else 0)
        """The beginning of the series on this process's clock."""
        self._written = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase."""
        trim_heap()
        self.mark_idle()
        usage = self.phases.setdefault(name, Usage())
        self._phase, self._stage, self._written = name, None, written_bytes()
        self._stage_began = time.monotonic()
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
            _raise_peaks(usage.peak, host_unique=unique_bytes())
            self._phase = None

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL_SECONDS):
            self._sample()

    def mark_idle(self) -> None:
        """Take what nobody has entered for the libraries'."""
        entered = sum(num_bytes for (placement, _), num_bytes in ledger.held().items() if placement != "device")
        with self._lock:
            self._libraries = max(0, anonymous_bytes() - entered)
            self._context = _context_bytes()

    def change(self, stage: str | None) -> None:
        """Close the stage that ends here; on the thread that does the work."""
        self._sample()
        now, written = time.monotonic(), written_bytes()
        with self._lock:
            for usage in self._current():
                usage.peak.written += written - self._written
                _raise_peaks(usage.peak, **_device_peaks(self._context))
                usage.seconds += now - self._stage_began
            self._stage, self._stage_began, self._written = stage, now, written
            _reset_device_peak()

    def _current(self) -> list[Usage]:
        """The usage of the phase and, where one runs, of its stage."""
        assert self._phase is not None
        phase = self.phases[self._phase]
        return [phase] if self._stage is None else [phase, phase.stages.setdefault(self._stage, Usage())]

    def _sample(self) -> None:
        with self._lock:
            if self._phase is None:
                return
            anonymous = anonymous_bytes()
            host, device = self._components(anonymous)
            pinned = sum(n for (placement, _), n in ledger.held().items() if placement == "pinned")
            for usage in self._current():
                _raise_peaks(usage.peak, host_anonymous=anonymous, host_file=file_bytes(), pinned=pinned)
                _raise_components(usage, "host", host)
                _raise_components(usage, "device", device)
            self.series.add(Sample(time.monotonic() - self._began, self._phase, self._stage, host, device))
        if self._watchdog is not None:
            self._watchdog.look(host, device)

    def _components(self, anonymous: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that the host and the device hold now, by component."""
        host: dict[str, int] = {LIBRARIES: self._libraries}
        device: dict[str, int] = {}
        for (placement, component), num_bytes in ledger.held().items():
            held = device if placement == "device" else host
            held[component] = held.get(component, 0) + num_bytes
        # Memory that was taken but not written to yet is not there: the difference may be less than nothing.
        host[WORKING] = max(0, anonymous - sum(host.values()))
        if _on_gpu():
            device[WORKING] = max(0, torch.cuda.memory_allocated() - sum(device.values()))
            device[CONTEXT] = self._context
        return host, device


def _raise_peaks(peaks: Peaks, **held: int | None) -> None:
    for name, num_bytes in held.items():
        if num_bytes is not None:
            setattr(peaks, name, max(getattr(peaks, name) or 0, num_bytes))


def _raise_components(usage: Usage, placement: str, held: dict[str, int]) -> None:
    highest, total = usage.components[placement], sum(held.values())
    for name, num_bytes in held.items():
        if name != WORKING:
            highest[name] = max(highest.get(name, 0), num_bytes)
        elif total >= usage.most.get(placement, 0):
            # At other times the allocator may still keep what the ledger has struck out.
            highest[name], usage.most[placement] = num_bytes, total


@contextmanager
def allocator_snapshot(path: Path | None) -> Iterator[None]:
    """Record a GPU's allocator during the block, into a file for torch's viewer; None: nothing is recorded."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_device_peak() -> None:
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()


def _context_bytes() -> int:
    """Device memory beside torch's allocator: the context, and what other processes hold."""
    if not _on_gpu():
        return 0
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def _device_peaks(context: int) -> dict[str, int]:
    if not _on_gpu():
        return {}
    peaks = {"device": torch.cuda.max_memory_allocated(), "device_reserved": torch.cuda.max_memory_reserved()}
    return {name: num_bytes + context for name, num_bytes in peaks.items()}
