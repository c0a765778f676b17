"""The homes of records: each gives back the bytes that were put, and no checkpoint is ever changed in place."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcscale.common.errors import BudgetError
from pcscale.common.units import aligned
from pcscale.projection import memory_residency, record_files
from pcscale.projection.layout import TensorSpec, overlap_bytes
from pcscale.projection.memory_residency import Traffic
from pcscale.projection.record import views_of
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.host_memory import HostBytes
from pcscale.storage.index import read_header
from tests.projection.residencies import (
    HOMES,
    LARGEST,
    LAYOUTS,
    MOVING,
    SIZES,
    a_home,
    as_bytes,
    assert_holds,
    file_bytes,
    filled,
    full_disk,
    held,
    no_endless_wait,
    put,
    some_bytes,
)

__all__ = ["full_disk", "no_endless_wait"]

NAMES = list(LAYOUTS)
ALL = sum(SIZES.values())
ALL_PINNED = sum(map(aligned, SIZES.values()))
DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the records."""
    return tmp_path / "run" / "residency"


@pytest.mark.parametrize("home", HOMES)
def test_a_home_gives_back_exactly_the_bytes_that_were_put(home: str, folder: Path) -> None:
    records = a_home(home, folder)
    assert_holds(records, {name: torch.zeros(SIZES[name], dtype=torch.uint8) for name in NAMES})
    assert_holds(records, filled(records))


@pytest.mark.parametrize("home", HOMES)
def test_any_byte_pattern_comes_back(home: str, folder: Path) -> None:
    """Also of what is no number."""
    records = a_home(home, folder)
    for name in NAMES:
        pattern = torch.arange(SIZES[name]).to(torch.uint8)
        put(records, name, pattern)
        put(records, name, 255 - pattern)
        assert torch.equal(held(records, name), 255 - pattern)


@pytest.mark.parametrize("home", MOVING)
def test_a_buffer_that_is_put_unchanged_leaves_the_record(home: str, folder: Path) -> None:
    records = a_home(home, folder)
    before = filled(records)
    for name in NAMES:
        records.write(name, records.read(name).fill_(99), changed=False)
    assert_holds(records, before)


@pytest.mark.parametrize("home", HOMES)
def test_create_sets_what_it_is_given_and_leaves_zeros_elsewhere(home: str, folder: Path) -> None:
    records = a_home(home, folder)
    before = filled(records)
    aux = torch.randn(24, 30, generator=torch.Generator().manual_seed(3))
    records.create("large.weight", {"aux": aux})
    tensors = views_of(held(records, "large.weight"), LAYOUTS["large.weight"])
    assert torch.equal(tensors.pop("aux"), aux.bfloat16())
    assert all(not tensor.any() for tensor in tensors.values())
    del before["large.weight"]
    assert_holds(records, before)


@pytest.mark.parametrize("home", HOMES)
def test_create_takes_tensors_that_are_not_contiguous(home: str, folder: Path) -> None:
    records = a_home(home, folder)
    values = torch.arange(15.0).view(5, 3).T
    records.create("small.weight", {"aux": values})
    assert torch.equal(views_of(held(records, "small.weight"), LAYOUTS["small.weight"])["aux"], values)


@pytest.mark.parametrize("home", HOMES)
def test_a_saved_record_is_read_by_the_safetensors_library(home: str, folder: Path, tmp_path: Path) -> None:
    records = a_home(home, folder)
    for name, record in filled(records).items():
        path = tmp_path / "checkpoint" / "records" / f"{name}.safetensors"
        assert records.save(name, path) == fingerprint_file(path)
        assert as_bytes(load_file(path)) == as_bytes(views_of(record, LAYOUTS[name]))
    assert {path.name for path in (tmp_path / "checkpoint" / "records").iterdir()} == {
        f"{name}.safetensors" for name in NAMES
    }


def test_every_home_writes_the_same_file(folder: Path, tmp_path: Path) -> None:
    for home in HOMES:
        records = a_home(home, folder)
        filled(records)
        records.save("large.weight", tmp_path / home)
    assert len({(tmp_path / home).read_bytes() for home in HOMES}) == 1


@pytest.mark.parametrize("loading", HOMES)
@pytest.mark.parametrize("saving", HOMES)
def test_what_one_home_saved_another_loads(saving: str, loading: str, tmp_path: Path) -> None:
    one, other = a_home(saving, tmp_path / "one"), a_home(loading, tmp_path / "other")
    before = filled(one)
    for name in NAMES:
        one.save(name, tmp_path / name)
        put(other, name, some_bytes(name, seed=8))
        other.load(name, tmp_path / name)
    assert_holds(other, before)
    assert_holds(one, before)


@pytest.mark.parametrize("home", HOMES)
def test_a_file_with_its_tensors_in_another_order_is_loaded(home: str, folder: Path, tmp_path: Path) -> None:
    records = a_home(home, folder)
    name, record = "large.weight", some_bytes("large.weight")
    tensors = views_of(record, LAYOUTS[name])
    # The library sorts by dtype and then by name; ours keeps the layout's order, and here has one more word to say.
    save_file(dict(reversed(tensors.items())), tmp_path / "file", {"made by": "others"})
    found = read_header(tmp_path / "file")[0]
    ordered = sorted(found, key=lambda part: found[part].start)
    save_in_reverse(tmp_path / "reversed", tensors)
    assert ordered == list(tensors)
    for file in ("file", "reversed"):
        put(records, name, some_bytes(name, seed=8))
        records.load(name, tmp_path / file)
        assert torch.equal(held(records, name), record)


def save_in_reverse(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A legal file of the format whose narrow tensors come first."""
    from pcscale.storage.writer import write_tensors

    write_tensors(path, dict(reversed(tensors.items())))


@pytest.mark.parametrize("home", HOMES)
def test_saving_over_a_file_replaces_it(home: str, folder: Path, tmp_path: Path) -> None:
    records, path = a_home(home, folder), tmp_path / "file"
    name = "small.weight"
    for seed in (1, 1, 2):
        put(records, name, some_bytes(name, seed))
        records.save(name, path)
        records.save(name, path)
        assert as_bytes(load_file(path)) == as_bytes(views_of(some_bytes(name, seed), LAYOUTS[name]))


@pytest.mark.parametrize("home", HOMES)
def test_saving_over_a_file_leaves_other_checkpoints_alone(home: str, folder: Path, tmp_path: Path) -> None:
    """After a load, on a disk, records and both checkpoints are one file until something changes."""
    records, name = a_home(home, folder), "small.weight"
    put(records, name, some_bytes(name))
    records.save(name, tmp_path / "first")
    before = (tmp_path / "first").read_bytes()
    records.load(name, tmp_path / "first")
    records.save(name, tmp_path / "second")
    put(records, name, some_bytes(name, seed=7))
    records.save(name, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == before
    assert as_bytes(load_file(tmp_path / "second")) == as_bytes(views_of(some_bytes(name, seed=7), LAYOUTS[name]))


# Budgets.

NEEDS = {"cpu": (ALL_PINNED, "all records take"), "disk": (LARGEST, "the largest record takes")}
PADDING = 512 * len(NAMES)
"""What may lie between records, so that each begins where every dtype may begin."""


def least_of(home: str, folder: Path) -> int:
    """The least pinned memory that would do, as a refusal says it."""
    message = rf"^pinned_memory 1 B is too small for residency {home}: {NEEDS[home][1]} .+\. Give at least \d+ bytes\.$"
    with pytest.raises(BudgetError, match=message) as caught:
        a_home(home, folder, 1)
    return int(str(caught.value).split()[-2])


@pytest.mark.parametrize("home", MOVING)
def test_too_little_pinned_memory_is_refused_with_the_least_that_would_do(home: str, folder: Path) -> None:
    least = least_of(home, folder)
    assert NEEDS[home][0] <= least <= NEEDS[home][0] + PADDING
    with pytest.raises(BudgetError, match=f"Give at least {least} bytes"):
        a_home(home, folder, least - 1)
    assert not folder.exists(), "nothing was written"


@pytest.mark.parametrize("home", MOVING)
def test_the_least_pinned_memory_works_and_no_more_is_taken(
    home: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, taken = least_of(home, folder), []
    for module in (memory_residency, record_files):
        monkeypatch.setattr(module, "HostBytes", lambda num_bytes: taken.append(num_bytes) or HostBytes(num_bytes))
    records = a_home(home, folder, least)
    assert_holds(records, filled(records))
    assert sum(taken) <= least


def test_residency_device_needs_no_pinned_memory(folder: Path) -> None:
    records = a_home("device", folder, 1)
    assert_holds(records, filled(records))


@pytest.mark.parametrize("home", MOVING)
def test_without_a_budget_one_record_comes_while_one_is_worked_on_and_one_goes(home: str, folder: Path) -> None:
    records = a_home(home, folder)
    filled(records)
    buffers = {name: records.read(name) for name in NAMES}
    for name, buffer in buffers.items():
        records.write(name, buffer, changed=True)


def test_buffers_for_an_overlap_are_those_of_the_three_neighbours_that_take_most() -> None:
    """In units that buffers are aligned to."""
    expected = {(): 0, (5,): 5, (5, 3): 8, (9, 1, 1, 4, 5, 6, 1, 9): 16}
    assert {sizes: overlap_bytes([512 * size for size in sizes]) // 512 for sizes in expected} == expected


@pytest.mark.parametrize("home", HOMES)
def test_records_of_an_odd_number_of_bytes_lie_beside_each_other(home: str, folder: Path) -> None:
    """As bfloat16 records have where both compressed widths are odd."""
    layout = {
        "delta_in": TensorSpec("F32", (2, 2)),
        "aux": TensorSpec("BF16", (3, 5)),
        "codes": TensorSpec("U8", (3, 5)),
    }
    layouts = dict.fromkeys(("one", "two", "three"), layout)
    records = a_home(home, folder, layouts=layouts, made=False)
    values = torch.arange(4.0).view(2, 2)
    for name in layouts:
        records.create(name, {"delta_in": values})
    for name in layouts:
        assert torch.equal(views_of(held(records, name), layout)["delta_in"], values)


@pytest.mark.parametrize("pinned_bytes", [None, 1])
@pytest.mark.parametrize("home", HOMES)
def test_no_records_live_anywhere(home: str, pinned_bytes: int | None, folder: Path, tmp_path: Path) -> None:
    """Those of the control arm."""
    traffic = Traffic()
    a_home(home, folder, pinned_bytes, traffic=traffic, layouts={})
    assert traffic.total == 0
    assert file_bytes(tmp_path) == {}


# Traffic.


@pytest.mark.parametrize("home", HOMES)
def test_bytes_are_counted_where_they_move(home: str, folder: Path) -> None:
    traffic = Traffic()
    records = a_home(home, folder, traffic=traffic)
    for name in NAMES:
        records.create(name, {})
        put(records, name, some_bytes(name))
        held(records, name)
    assert (traffic.records_read, traffic.records_written) == ((0, 0) if home == "device" else (2 * ALL, ALL))
    assert traffic.total == (0 if home == "device" else 3 * ALL)
