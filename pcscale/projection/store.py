"""The records of a run, and the visits that a sweep pays them: the next one is fetched while one is worked on."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pcscale.base.weight import FrozenWeight
from pcscale.families.plan import PlannedWeight
from pcscale.importance.select import KeptIndices
from pcscale.projection.homes import Traffic
from pcscale.projection.layout import AHEAD, RecordFormat, record_layout
from pcscale.projection.record import Kept, MatrixRecord, views_of
from pcscale.projection.residency import Residency, open_home


class Base(Protocol):
    """What the sweep needs of a frozen base.

    Attributes:
        home: `disk`, `cpu` or `device`: where its weights come from.
        coded_fingerprints: of the 8-bit codes that its weights come from; empty: they are the stored ones.
    """

    home: str
    coded_fingerprints: dict[str, str]

    def weight(self, name: str) -> FrozenWeight: ...

    def loss(self, name: str, kept_out: torch.Tensor | None, kept_in: torch.Tensor | None) -> torch.Tensor | None: ...

    def prefetch(self, names: list[str]) -> None: ...


@dataclass(frozen=True)
class Visit:
    """One matrix on the device: its base weight and its record, whose tensors may be changed in place."""

    planned: PlannedWeight
    weight: FrozenWeight
    record: MatrixRecord
    buffer: torch.Tensor


class RecordStore(Mapping[str, MatrixRecord]):
    """Records by the name of their matrix, wherever they live. Reading one by name gives a copy of it on the device.

    Args:
        matrices: the projected weights.
        kept: the kept indices of the start.
        base: where base weights come from.
        device: where visits take place.
    """

    def __init__(
        self,
        matrices: list[PlannedWeight],
        form: RecordFormat,
        kept: KeptIndices,
        base: Base,
        residency: Residency,
        device: torch.device,
    ) -> None:
        self.form = form
        self.traffic = Traffic()
        self._planned = {planned.name: planned for planned in matrices}
        self.layouts = {planned.name: record_layout(planned, form) for planned in matrices}
        self._base, self._device = base, device
        self.home = open_home(residency, self.layouts, device, self.traffic)
        self.keep(kept)

    def keep(self, kept: KeptIndices) -> None:
        """Select these channels of the base weights from now on."""
        self._kept = {name: Kept.of(planned, kept, self._device) for name, planned in self._planned.items()}

    def __getitem__(self, name: str) -> MatrixRecord:
        buffer = self.home.fetch(name)
        copy = buffer.clone()
        self.home.put(name, buffer, changed=False)
        return MatrixRecord.of(self._kept[name], views_of(copy, self.layouts[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._planned  # Mapping's own would fetch the record.

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned)

    def __len__(self) -> int:
        return len(self._planned)

    @contextlib.contextmanager
    def visits(self, names: list[str], change: bool) -> Iterator[Iterator[Visit]]:
        """Visit these matrices in turn; what a visit changes is the record's when the next one begins.

        With residency device records are changed in place, also by a visit that fails.

        Raises:
            RunError: a record could not be read or written; those before it have been changed.
        """
        with (
            ThreadPoolExecutor(1, "fetch") as reader,
            ThreadPoolExecutor(1, "put") as writer,
            contextlib.closing(self._visit_each(names, change, reader, writer)) as visits,
        ):
            yield visits

    def _visit_each(
        self, names: list[str], change: bool, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> Generator[Visit]:
        coming = deque(reader.submit(self._fetch, name) for name in names[:AHEAD])
        going: list[Future[None]] = []
        try:
            for position in range(len(names)):
                visit = coming.popleft().result()
                coming.extend(reader.submit(self._fetch, name) for name in names[position + AHEAD :][:1])
                changed = False
                visit.weight.keep_for(self._device)
                try:
                    yield visit
                    changed = change
                finally:
                    # Also when the caller failed: the reader may be waiting for this buffer.
                    going.append(writer.submit(self._put, visit, self._now(), changed))
                while going and going[0].done():
                    going.pop(0).result()
            for put in going:
                put.result()
        finally:
            for fetched in coming:
                # What was fetched for a visit that is not made.
                if not fetched.cancel() and fetched.exception() is None:
                    writer.submit(self._put, fetched.result(), None, False)

    def _fetch(self, name: str) -> Visit:
        self._base.prefetch([name])
        buffer = self.home.fetch(name)  # First: room for records bounds how many base weights are under way.
        try:
            weight = self._weight(name)
        except BaseException:
            self.home.put(name, buffer, False)
            raise
        record = MatrixRecord.of(self._kept[name], views_of(buffer, self.layouts[name]))
        return Visit(self._planned[name], weight, record, buffer)

    def _weight(self, name: str) -> FrozenWeight:
        weight = self._base.weight(name)
        self.traffic.base_read += weight.num_bytes * (self._base.home != "device")
        if self._device.type != "cpu":
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                weight = weight.to(self._device)
            stream.synchronize()
        return weight

    def _put(self, visit: Visit, computed: torch.cuda.Event | None, changed: bool) -> None:
        if computed is not None:
            computed.synchronize()
        self.home.put(visit.planned.name, visit.buffer, changed)

    def _now(self) -> torch.cuda.Event | None:
        """The end of what has been asked of the device so far; None: the host computes, and has finished."""
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def save(self, name: str, path: Path) -> str:
        """Write a record's file; returns its fingerprint."""
        return self.home.save(name, path)

    def load(self, name: str, path: Path) -> None:
        """Take a record from a file that `save` wrote, in the same format."""
        self.home.load(name, path)
