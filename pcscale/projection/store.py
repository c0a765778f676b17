"""The records of a run, and the visits that a sweep pays them: the next one is read while one is worked on."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import torch

from pcscale.base.weight import FrozenWeight
from pcscale.families.plan import PlannedWeight
from pcscale.projection.compression import Base
from pcscale.projection.layout import AHEAD, RecordFormat, record_layout
from pcscale.projection.memory_residency import Traffic
from pcscale.projection.owners import Round
from pcscale.projection.record import FixedTensors, MatrixRecord, views_of
from pcscale.projection.residency import State, open_residency


@dataclass(frozen=True)
class Visit:
    """One matrix on the device: its base weight and its record, whose tensors may be changed in place."""

    planned: PlannedWeight
    weight: FrozenWeight
    record: MatrixRecord


class _Ready(NamedTuple):
    """A visit's buffer and base weight; None where a rank may not read the weight without the others."""

    name: str
    buffer: torch.Tensor
    weight: FrozenWeight | None


class RecordStore(Mapping[str, MatrixRecord]):
    """The records of one rank by the name of their matrix; reading one by name gives a copy of it on the device.

    Args:
        matrices: the projected weights, of which rank `rank` visits its own in the order of `rounds`.
        fixed: what S is made of; copied to `device`, where visits take place.
    """

    def __init__(
        self,
        matrices: list[PlannedWeight],
        rounds: list[Round],
        rank: int,
        form: RecordFormat,
        fixed: FixedTensors,
        base: Base,
        state: State,
        device: torch.device,
    ) -> None:
        self.form = form
        self.traffic = Traffic()
        planned_of = {planned.name: planned for planned in matrices}
        self._planned = {name: planned_of[name] for sweep_round in rounds if (name := sweep_round[rank]) is not None}
        self.layouts = {name: record_layout(planned, form) for name, planned in self._planned.items()}
        self._base, self._rank, self._device = base, rank, device
        self.fixed = {name: tensor.to(device, copy=True) for name, tensor in fixed.items()}
        self.residency = residency = open_residency(state, self.layouts, device, self.traffic)
        self.create, self.save, self.load = residency.create, residency.save, residency.load

    def __getitem__(self, name: str) -> MatrixRecord:
        buffer = self.residency.read(name)
        copy = buffer.clone()
        self.residency.write(name, buffer, changed=False)
        return self._record(name, copy)

    def _record(self, name: str, buffer: torch.Tensor) -> MatrixRecord:
        return MatrixRecord.of(self._planned[name], self.fixed, views_of(buffer, self.layouts[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._planned  # Mapping's own would read the record.

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned)

    def __len__(self) -> int:
        return len(self._planned)

    @contextlib.contextmanager
    def visits(self, rounds: list[Round], change: bool) -> Iterator[Iterator[Visit | None]]:
        """Visit this rank's matrix of each round, None where it has none; what a visit changes is the record's when the
        next one begins.

        With residency device records are changed in place, also by a visit that fails.

        Raises:
            RunError: a record could not be read or written; those before it have been changed.
        """
        with (
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(1, "write") as writer,
            contextlib.closing(self._visit_each(rounds, change, reader, writer)) as visits,
        ):
            yield visits

    def _visit_each(
        self, rounds: list[Round], change: bool, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> Generator[Visit | None]:
        names = iter([sweep_round[self._rank] for sweep_round in rounds])
        coming = deque(reader.submit(self._read, name) for name in islice(names, AHEAD))
        going: list[Future[None]] = []
        gathered = self._gathered(rounds)
        try:
            for _ in rounds:
                ready = coming.popleft().result()
                coming.extend(reader.submit(self._read, name) for name in islice(names, 1))
                weight = next(gathered) if self._base.collective else ready and ready.weight
                if ready is None:
                    yield None
                    continue
                changed = False
                assert weight is not None
                try:
                    weight.keep_for(self._device)
                    yield Visit(self._planned[ready.name], weight, self._record(ready.name, ready.buffer))
                    changed = change
                finally:
                    # Also when the caller failed: the reader may be waiting for this buffer.
                    going.append(writer.submit(self._write, ready, self._now(), changed))
                while going and going[0].done():
                    going.pop(0).result()
            for written in going:
                written.result()
        finally:
            for future in coming:
                # It was read for a visit that is not made.
                if not future.cancel() and future.exception() is None and (ready := future.result()) is not None:
                    writer.submit(self._write, ready, None, False)

    def _read(self, name: str | None) -> _Ready | None:
        if name is None:
            return None
        buffer = self.residency.read(name)  # First: room for records bounds how many base weights are under way.
        if self._base.collective:
            return _Ready(name, buffer, None)
        self._base.prefetch([name])
        try:
            return _Ready(name, buffer, self._on_device(self._base.weight(name)))
        except BaseException:
            self.residency.write(name, buffer, False)
            raise

    def _gathered(self, rounds: list[Round]) -> Iterator[FrozenWeight | None]:
        """This rank's base weight of each round, where all ranks ask for each weight together and in one order."""
        names = [name for sweep_round in rounds for name in sweep_round if name is not None]
        following = dict(pairwise(names))
        for sweep_round in rounds:
            mine = None
            for rank, name in enumerate(sweep_round):
                if name is not None:
                    weight = self._base.weight(name)
                    self._base.prefetch([following[name]] if name in following else [])
                    mine = self._on_device(weight) if rank == self._rank else mine
            yield mine

    def _on_device(self, weight: FrozenWeight) -> FrozenWeight:
        self.traffic.base_read += weight.num_bytes * (self._base.placement != "device")
        if self._device.type != "cpu":
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                weight = weight.to(self._device)
            stream.synchronize()
        return weight

    def _write(self, ready: _Ready, computed: torch.cuda.Event | None, changed: bool) -> None:
        if computed is not None:
            computed.synchronize()
        self.residency.write(ready.name, ready.buffer, changed)

    def _now(self) -> torch.cuda.Event | None:
        """The end of what has been asked of the device so far; None: the host computes, and has finished."""
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
