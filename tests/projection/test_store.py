"""Visits to records: what they change is kept, the next one is on its way meanwhile, and no failure makes them hang."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.projection.layout import RecordFormat
from pcscale.projection.record import views_of
from pcscale.projection.residency import Residency, State
from pcscale.projection.store import RecordStore
from tests.projection.parts import Compression, copies
from tests.projection.residencies import (
    HOMES,
    MOVING,
    WAIT_SECONDS,
    no_endless_wait,
)
from tests.projection.stores import (
    a_store,
    all_records,
    alone,
    compression,
    least,
    one_step,
    values,
    visit_all,
)
from tests.tiny import build_base

__all__ = ["a_store", "compression", "no_endless_wait"]

SMALL = RecordFormat("bfloat16", "8bit")
FORMATS = {"published": RecordFormat(), "small": SMALL}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """Wide enough that moments are kept in 8 bits."""
    folder = build_base(tmp_path_factory.mktemp("wide"), "llama", hidden_size=96, intermediate_size=160, head_dim=24)
    return Compression.of(folder, hidden_size=72, intermediate_size=120)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("home", HOMES)
def test_what_a_visit_changes_is_the_records(
    home: str, tight: bool, a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    store = a_store(home, least(home, compression) if tight else None)
    for _ in range(2):
        assert visit_all(store) == list(store)
    assert [values(store, name) for name in store] == [{200.0 + position} for position in range(len(store))]


@pytest.mark.parametrize("home", MOVING)
def test_visits_that_are_not_to_change_anything_do_not(home: str, a_store: Callable[..., RecordStore]) -> None:
    store = a_store(home)
    visit_all(store, change=False)
    assert [values(store, name) for name in store] == [{float(position)} for position in range(len(store))]
    assert store.traffic.records_written == 0


@pytest.mark.parametrize("home", HOMES)
def test_only_those_that_were_named_are_visited(home: str, a_store: Callable[..., RecordStore]) -> None:
    store = a_store(home)
    names = list(store)
    with store.visits(alone([names[3], names[1]]), True) as visits:
        assert [visit.planned.name for visit in visits] == [names[3], names[1]]
    with store.visits([], True) as visits:
        assert list(visits) == []


def names_of(compression: Compression) -> list[str]:
    return [planned.name for planned in compression.plan.matrices]


@pytest.mark.parametrize("home", HOMES)
def test_a_rank_has_and_visits_its_matrix_of_each_round(
    home: str, a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    first, second, third, fourth, fifth = names_of(compression)[:5]
    turns = [(first, fifth), (second, None), (third, fourth), (None, None)]
    store = a_store(home, turns=turns, rank=1)
    assert list(store) == [fifth, fourth]
    for _ in range(2):
        visited = []
        with store.visits(turns, True) as visits:
            for visit in visits:
                visited.append(visit and visit.planned.name)
                for tensor in visit.record.tensors().values() if visit else ():
                    tensor += 100
        assert visited == [fifth, None, fourth, None]
    assert [values(store, name) for name in store] == [{200.0}, {201.0}]


@pytest.mark.parametrize("collective", [False, True])
def test_a_collective_base_is_asked_for_every_weight_of_a_round_in_one_order(
    collective: bool, a_store: Callable[..., RecordStore], compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks must take part where each holds a part of a weight; elsewhere each reads its own alone."""
    first, second, third = names_of(compression)[:3]
    turns, asked, read = [(first, second), (third, None)], [], compression.base.weight
    monkeypatch.setattr(compression.base, "collective", collective, raising=False)
    monkeypatch.setattr(compression.base, "weight", lambda name: (asked.append(name), read(name))[1])
    for rank, own in enumerate(([first, third], [second])):
        store = a_store("device", turns=turns, rank=rank)
        asked.clear()
        with store.visits(turns, False) as visits:
            found = {visit.planned.name: visit.weight.rows(torch.float32) for visit in visits if visit}
        assert asked == ([first, second, third] if collective else own)
        assert list(found) == own
        assert all(torch.equal(weight, compression.weights[name]) for name, weight in found.items())
        assert store.traffic.base_read == sum(compression.weights[name].nbytes for name in own)


def test_a_visit_comes_with_its_base_weight(a_store: Callable[..., RecordStore], compression: Compression) -> None:
    store = a_store("cpu")
    with store.visits(alone(store), False) as visits:
        for visit in visits:
            assert torch.equal(visit.weight.rows(torch.float32), compression.weights[visit.planned.name])


@pytest.mark.parametrize("home", HOMES)
def test_a_record_that_is_read_by_name_is_a_copy(home: str, a_store: Callable[..., RecordStore]) -> None:
    store = a_store(home)
    name = list(store)[2]
    for tensor in store[name].tensors().values():
        tensor.fill_(-1)
    assert values(store, name) == {2.0}
    before = store[name]
    visit_all(store)
    assert {value for tensor in before.tensors().values() for value in tensor.unique().tolist()} == {2.0}


def test_asking_which_records_there_are_moves_none(
    a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    store = a_store("disk")
    names = [planned.name for planned in compression.plan.matrices]
    assert (list(store), len(store), set(store.keys())) == (names, len(names), set(names))
    assert names[0] in store
    assert "model.norm.weight" not in store
    assert store.traffic.total == 0


# Traffic.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("home", HOMES)
def test_a_sweep_moves_every_record_in_and_out_once_and_every_base_weight_in_once(
    home: Any, form: str, wide: Compression, tmp_path: Path
) -> None:
    model = wide.model()
    optimizer = wide.optimizer(model, form=FORMATS[form], state=State(home, tmp_path / "residency"))
    traffic = optimizer.records.traffic
    records = 0 if home == "device" else all_records(wide, FORMATS[form])
    base = sum(wide.weights[planned.name].nbytes for planned in wide.plan.matrices)
    for step in (1, 2):
        one_step(wide, optimizer, model)
        assert (traffic.base_read, traffic.records_read, traffic.records_written) == (
            step * base,
            step * records,
            step * records,
        )
    optimizer.compose_all()
    assert (traffic.base_read, traffic.records_read, traffic.records_written) == (3 * base, 3 * records, 2 * records)


# The same steps, wherever records live.


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("home", MOVING)
def test_steps_are_the_same_to_the_last_bit_wherever_records_live(
    home: Any, form: str, tight: bool, wide: Compression, tmp_path: Path
) -> None:
    need = least(home, wide, FORMATS[form])
    ends = []
    for residency in (State(), State(home, tmp_path / "residency", need if tight else None)):
        model = wide.model()
        optimizer = wide.optimizer(model, form=FORMATS[form], state=residency)
        for seed in range(3):
            one_step(wide, optimizer, model, seed)
        state = {
            f"{name}: {part}": tensor
            for name in optimizer.records
            for part, tensor in optimizer.records[name].tensors().items()
        }
        assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == (form == "small")
        ends.append(state | copies(model))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# Prefetch.


class RecordingResidency:
    """A residency that remembers who was read, where, and written, and lets a test wait for it."""

    def __init__(self, home: Residency) -> None:
        self._home = home
        self.events: list[tuple[str, str]] = []
        self.buffers: dict[str, torch.Tensor] = {}
        self._changed = threading.Condition()

    def _note(self, event: str, name: str) -> None:
        with self._changed:
            self.events.append((event, name))
            self._changed.notify_all()

    def happened(self, event: str, name: str, seconds: float = WAIT_SECONDS) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: (event, name) in self.events, seconds)

    def read(self, name: str) -> torch.Tensor:
        self._note("asked for", name)
        buffer = self.buffers[name] = self._home.read(name)
        self._note("fetched", name)
        return buffer

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        self._note("given back", name)
        self._home.write(name, buffer, changed)
        self._note("put", name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._home, name)


def recording(store: RecordStore) -> RecordingResidency:
    home = RecordingResidency(store.residency)
    store.residency = home
    return home


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("home", HOMES)
def test_the_next_records_are_fetched_before_the_one_at_work_is_given_back(
    home: str, ahead: int, a_store: Callable[..., RecordStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.projection.store.AHEAD", ahead)
    store = a_store(home)
    seen, names = recording(store), list(store)[:5]
    with store.visits(alone(names), True) as visits:
        for position, visit in enumerate(visits):
            for following in names[position + 1 : position + 1 + ahead]:
                assert seen.happened("fetched", following)
            # No more: each takes memory.
            assert not {("asked for", later) for later in names[position + 1 + ahead :]} & set(seen.events)
            assert ("given back", visit.planned.name) not in seen.events
    assert [name for event, name in seen.events if event == "put"] == names


def test_with_the_least_memory_the_next_record_waits_for_the_one_before(
    a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    store = a_store("disk", least("disk", compression))
    sizes = {name: sum(spec.num_bytes for spec in layout.values()) for name, layout in store.layouts.items()}
    seen = recording(store)
    first, second = sorted(store, key=lambda name: -sizes[name])[:2]
    with store.visits(alone([first, second]), True) as visits:
        next(visits)
        assert seen.happened("asked for", second)
        # That it goes on waiting can only be seen for a while.
        assert not seen.happened("fetched", second, 0.05)
        assert [visit.planned.name for visit in visits] == [second]
    assert seen.events.index(("put", first)) < seen.events.index(("fetched", second))


@pytest.mark.parametrize("home", MOVING)
def test_a_record_is_written_back_while_the_next_one_is_worked_on(
    home: str, a_store: Callable[..., RecordStore]
) -> None:
    store = a_store(home)
    seen, names = recording(store), list(store)[:3]
    with store.visits(alone(names), True) as visits:
        for position, _ in enumerate(visits):
            for before in names[max(position - 1, 0) : position]:
                assert seen.happened("put", before)


def test_everything_is_written_when_the_block_ends(
    a_store: Callable[..., RecordStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_store("disk")
    slow = threading.Event()
    write = type(store.residency).write

    def late(*arguments: Any, **named: Any) -> None:
        slow.wait(0.02)
        write(*arguments, **named)

    monkeypatch.setattr(type(store.residency), "write", late)
    visit_all(store)
    monkeypatch.undo()
    assert [values(store, name) for name in store] == [{100.0 + position} for position in range(len(store))]


def test_a_layout_is_what_views_of_a_visit_lie_in(a_store: Callable[..., RecordStore]) -> None:
    """A visit's tensors are its buffer's bytes, so nothing but the buffer needs to be written."""
    store = a_store("disk")
    seen = recording(store)
    with store.visits(alone(list(store)[:2]), False) as visits:
        for visit in visits:
            buffer = seen.buffers[visit.planned.name]
            expected = views_of(buffer, store.layouts[visit.planned.name])
            found = visit.record.tensors()
            assert found.keys() == expected.keys()
            assert all(found[part].data_ptr() == expected[part].data_ptr() for part in found)
            assert sum(tensor.nbytes for tensor in found.values()) == len(buffer)
