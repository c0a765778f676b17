"""Visits, files and disks that fail: what was there before is whole, nobody waits for ever, and work goes on after."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RunError
from pcscale.common.files import TEMPORARY_PREFIX
from pcscale.projection.residency import State
from pcscale.projection.store import RecordStore
from tests.projection.parts import Compression
from tests.projection.residencies import (
    MOVING,
    FullDisk,
    file_bytes,
    full_disk,
    no_endless_wait,
)
from tests.projection.stores import (
    a_store,
    alone,
    compression,
    largest_record,
    least,
    one_step,
    values,
    visit_all,
)

__all__ = ["a_store", "compression", "full_disk", "no_endless_wait"]


class Broken(Exception):
    """What a visit may raise."""


def failing_visit(store: RecordStore, position: int) -> None:
    """Change every record up to this one, whose visit fails after it was changed."""
    with store.visits(alone(store), True) as visits:
        for number, visit in enumerate(visits):
            for tensor in visit.record.tensors().values():
                tensor += 100
            if number == position:
                raise Broken(visit.planned.name)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("position", [0, 4])
@pytest.mark.parametrize("home", MOVING)
def test_a_visit_that_fails_leaves_its_record_and_those_after_it(
    home: str, position: int, tight: bool, a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    store = a_store(home, least(home, compression) if tight else None)
    name = list(store)[position]
    with pytest.raises(Broken, match=re.escape(name)):
        failing_visit(store, position)
    found = [values(store, name) for name in store]
    assert found == [{number + 100.0 * (number < position)} for number in range(len(store))]


@pytest.mark.parametrize("home", MOVING)
def test_visits_that_are_left_early_can_be_made_again(
    home: str, a_store: Callable[..., RecordStore], compression: Compression
) -> None:
    store = a_store(home, least(home, compression))
    for _ in range(20):
        with store.visits(alone(store), False) as visits:
            next(visits)
    assert visit_all(store) == list(store)


def test_a_base_weight_that_cannot_be_read_ends_the_visits(
    a_store: Callable[..., RecordStore], compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_store("disk", least("disk", compression))
    names, read = list(store), compression.base.weight

    def broken(name: str) -> Any:
        if name == names[2]:
            raise Broken(name)
        return read(name)

    monkeypatch.setattr(compression.base, "weight", broken)
    with pytest.raises(Broken, match=re.escape(names[2])):
        visit_all(store)
    monkeypatch.undo()
    assert [values(store, name) for name in names[:3]] == [{100.0}, {101.0}, {2.0}]


def test_a_record_that_was_cut_short_ends_the_visits(
    a_store: Callable[..., RecordStore], compression: Compression, tmp_path: Path
) -> None:
    store = a_store("disk", least("disk", compression))
    names = list(store)
    path = tmp_path / "residency" / f"{names[2]}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(RunError, match=r"is 4 bytes too short\. .+ go on from it with --resume"):
        visit_all(store)
    path.write_bytes(whole)
    assert [values(store, name) for name in names[:3]] == [{100.0}, {101.0}, {2.0}]


@pytest.mark.parametrize("position", [0, 3, -1], ids=["first", "middle", "last"])
def test_a_disk_that_fills_up_in_the_middle_of_a_sweep_ends_it_and_the_next_sweep_goes_on(
    position: int, compression: Compression, tmp_path: Path, full_disk: FullDisk
) -> None:
    """With the least memory: the reader waits for the very buffer that cannot be written."""
    folder, model = tmp_path / "residency", compression.model()
    optimizer = compression.optimizer(model, state=State("disk", folder, largest_record(compression)))
    one_step(compression, optimizer, model)
    name = list(optimizer.records)[position]
    before = file_bytes(folder)
    full_disk.full, full_disk.record = True, name
    message = f"{folder / name}.safetensors: the disk is full. Nothing was replaced; free space and run again."
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        one_step(compression, optimizer, model)
    after = file_bytes(folder)
    written = {file for file in before if not file.startswith(f"{TEMPORARY_PREFIX}spare")}
    assert {file for file in after if not file.startswith(f"{TEMPORARY_PREFIX}spare")} == written, "no part is left"
    assert after[f"{name}.safetensors"] == before[f"{name}.safetensors"]
    full_disk.full = False
    optimizer.zero_grad()
    one_step(compression, optimizer, model)
    assert file_bytes(folder)[f"{name}.safetensors"] != before[f"{name}.safetensors"]


def test_a_failed_write_is_said_even_where_it_was_the_last(
    a_store: Callable[..., RecordStore], full_disk: FullDisk
) -> None:
    store = a_store("disk")
    full_disk.full, full_disk.record = True, list(store)[-1]
    with pytest.raises(RunError, match="the disk is full"):
        visit_all(store)
