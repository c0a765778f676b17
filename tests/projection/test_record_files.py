"""Records in files: links that no write reaches, cut files, full disks, and what a killed run left."""

import errno
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pcscale.common.errors import RequestError, RunError
from pcscale.common.files import TEMPORARY_PREFIX
from pcscale.projection.record import views_of
from pcscale.projection.residency import Residency
from pcscale.storage.hashing import fingerprint_file
from tests.projection.residencies import (
    LARGEST,
    LAYOUTS,
    SIZES,
    FullDisk,
    a_home,
    as_bytes,
    assert_holds,
    file_bytes,
    filled,
    full_disk,
    held,
    no_endless_wait,
    put,
    record_path,
    some_bytes,
)

__all__ = ["full_disk", "no_endless_wait"]

NAMES = list(LAYOUTS)
ALL = sum(SIZES.values())
DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the records."""
    return tmp_path / "run" / "residency"


def test_a_checkpoint_holds_the_records_file_itself_and_later_writes_leave_it_alone(
    folder: Path, tmp_path: Path
) -> None:
    home = a_home("disk", folder)
    filled(home)
    for name in NAMES:
        saved = tmp_path / "checkpoint" / name
        home.save(name, saved)
        assert saved.samefile(record_path(folder, name)), "a link, not a copy"
    before = file_bytes(tmp_path / "checkpoint")
    for name in NAMES:
        put(home, name, some_bytes(name, seed=7))
        home.create(name, {})
    assert file_bytes(tmp_path / "checkpoint") == before


def test_a_loaded_checkpoint_is_not_changed_by_training_on(folder: Path, tmp_path: Path) -> None:
    first = a_home("disk", folder)
    records = filled(first)
    for name in NAMES:
        first.save(name, tmp_path / "checkpoint" / name)
    before = file_bytes(tmp_path / "checkpoint")
    second = a_home("disk", folder)
    for name in NAMES:
        second.load(name, tmp_path / "checkpoint" / name)
        assert record_path(folder, name).samefile(tmp_path / "checkpoint" / name), "a link, not a copy"
    assert_holds(second, records)
    changed = {name: some_bytes(name, seed=7) for name in NAMES}
    for name, record in changed.items():
        put(second, name, record)
    assert_holds(second, changed)
    assert file_bytes(tmp_path / "checkpoint") == before


def test_a_checkpoint_may_be_deleted_after_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    first = a_home("disk", folder)
    records = filled(first)
    for name in NAMES:
        first.save(name, tmp_path / "checkpoint" / name)
    second = a_home("disk", folder)
    for name in NAMES:
        second.load(name, tmp_path / "checkpoint" / name)
    shutil.rmtree(tmp_path / "checkpoint")
    assert_holds(second, records)


def test_where_links_fail_files_are_copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    home = a_home("disk", folder)
    records = filled(home)
    for name in NAMES:
        saved = tmp_path / "checkpoint" / name
        assert home.save(name, saved) == fingerprint_file(saved)
        assert not saved.samefile(record_path(folder, name))
        put(home, name, some_bytes(name, seed=7))
        assert as_bytes(load_file(saved)) == as_bytes(views_of(records[name], LAYOUTS[name]))
        home.load(name, saved)
        assert not saved.samefile(record_path(folder, name))
    assert_holds(home, records)
    before = file_bytes(tmp_path / "checkpoint")
    filled(home)
    assert file_bytes(tmp_path / "checkpoint") == before


def test_a_disk_that_fills_up_while_a_checkpoint_is_copied_is_said_plainly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(code: int) -> None:
        raise OSError(code, os.strerror(code))

    home = a_home("disk", folder)
    filled(home)
    home.save("small.weight", tmp_path / "saved")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: refuse(errno.EXDEV))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: refuse(errno.ENOSPC))
    with pytest.raises(RunError, match=r"small\.weight\.safetensors: the disk is full"):
        home.load("small.weight", tmp_path / "saved")


def test_a_saved_file_is_synced_before_it_is_linked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are named through /proc")
    home = a_home("disk", folder)
    filled(home)
    synced: list[tuple[str, bool]] = []

    def watch(handle: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{handle}").readlink()), (tmp_path / "saved").exists()))

    monkeypatch.setattr(os, "fsync", watch)
    put(home, "small.weight", some_bytes("small.weight"))
    assert synced == [], "a step's files need not last through a power cut"
    home.save("small.weight", tmp_path / "saved")
    assert synced == [(str(record_path(folder, "small.weight")), False)]


@pytest.mark.parametrize("cut", [1, 100, LARGEST])
def test_a_file_that_was_cut_short_is_said_with_the_way_on(cut: int, folder: Path) -> None:
    home = a_home("disk", folder, LARGEST)
    records = filled(home)
    path = record_path(folder, "large.weight")
    os.truncate(path, path.stat().st_size - cut)
    message = (
        f"{path} is {cut} bytes too short. Check the disk; the last checkpoint is whole: go on from it with --resume."
    )
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        home.read("large.weight")
    assert torch.equal(held(home, "middle.weight"), records["middle.weight"]), "no buffer was lost"


def test_a_file_that_is_gone_is_said_with_the_way_on(folder: Path) -> None:
    home = a_home("disk", folder, LARGEST)
    records = filled(home)
    record_path(folder, "large.weight").unlink()
    with pytest.raises(
        RunError, match=r"large\.weight\.safetensors cannot be read \(.+\)\. .+ go on from it with --resume"
    ):
        home.read("large.weight")
    assert torch.equal(held(home, "middle.weight"), records["middle.weight"]), "no buffer was lost"


def records_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """All files but the spare ones, which hold nothing that anybody reads."""
    return {name: data for name, data in files.items() if not name.startswith(f"{TEMPORARY_PREFIX}spare")}


def test_a_spare_file_is_written_over_and_never_one_that_a_checkpoint_shares(folder: Path, tmp_path: Path) -> None:
    home, path = a_home("disk", folder), record_path(folder, "large.weight")
    first = path.stat().st_ino
    put(home, "large.weight", some_bytes("large.weight", seed=1))
    second = path.stat().st_ino
    put(home, "large.weight", some_bytes("large.weight", seed=2))
    assert (path.stat().st_ino, first != second) == (first, True), "two files take turns"
    home.save("large.weight", tmp_path / "saved")
    for seed in (3, 4, 5):
        put(home, "large.weight", some_bytes("large.weight", seed))
        assert path.stat().st_ino != first
        assert as_bytes(load_file(tmp_path / "saved")) == as_bytes(
            views_of(some_bytes("large.weight", 2), LAYOUTS["large.weight"])
        )


def assert_full(home: Residency, folder: Path, before: dict[str, bytes], disk: FullDisk) -> None:
    """A put fails, leaves what was there and no more, and succeeds when there is room again."""
    disk.full = True
    message = (
        f"{record_path(folder, 'large.weight')}: the disk is full. Nothing was replaced; free space and run again."
    )
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        put(home, "large.weight", some_bytes("large.weight", seed=7))
    assert records_of(file_bytes(folder)) == records_of(before)
    disk.full = False
    put(home, "large.weight", some_bytes("large.weight", seed=7))
    assert torch.equal(held(home, "large.weight"), some_bytes("large.weight", seed=7))


def test_a_disk_that_fills_up_in_the_middle_of_a_write_leaves_the_old_file(folder: Path, full_disk: FullDisk) -> None:
    home = a_home("disk", folder, LARGEST)
    filled(home)
    assert_full(home, folder, file_bytes(folder), full_disk)


def test_a_disk_that_fills_up_when_a_record_is_made_leaves_nothing_half_written(
    folder: Path, full_disk: FullDisk
) -> None:
    home = a_home("disk", folder, made=False)
    full_disk.full = True
    with pytest.raises(RunError, match=r"small\.weight\.safetensors: the disk is full"):
        home.create("small.weight", {"aux": torch.ones(3, 5)})
    assert file_bytes(folder) == {}


def test_a_name_that_cannot_be_given_leaves_no_partial_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = a_home("disk", folder)
    filled(home)
    before = file_bytes(folder)

    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(RunError, match="the disk is full"):
        put(home, "large.weight", some_bytes("large.weight", seed=7))
    assert records_of(file_bytes(folder)) == records_of(before)


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, num_bytes))


def test_too_little_disk_is_said_before_the_first_byte_with_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All records, and a spare file of each size."""
    with_free(monkeypatch, ALL + sum(set(SIZES.values())) - 100)
    message = (
        rf"^{re.escape(str(folder))}: the disk has .+ free, residency disk takes .+\. "
        r"Free at least 100 bytes more, or choose another output\.$"
    )
    with pytest.raises(RunError, match=message):
        a_home("disk", folder)
    with_free(monkeypatch, ALL + sum(set(SIZES.values())))
    home = a_home("disk", folder)
    assert_holds(home, filled(home))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_refused(code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"{folder}: no permission to write here. Choose another folder or change it."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        a_home("disk", folder)


def test_what_a_killed_run_left_does_not_reach_the_next_one(folder: Path) -> None:
    filled(a_home("disk", folder))
    record_path(folder, ".partial-small.weight").write_bytes(b"half")
    (folder / "notes.txt").write_text("somebody else's")
    home = a_home("disk", folder)
    assert_holds(home, {name: torch.zeros(SIZES[name], dtype=torch.uint8) for name in NAMES})
    assert set(records_of(file_bytes(folder))) == {f"{name}.safetensors" for name in NAMES} | {"notes.txt"}
