"""Files and folders that are whole or absent, and the errors around them."""

import errno
import json
import os
from pathlib import Path

import pytest

from pcscale.common.errors import (
    BudgetError,
    Interrupted,
    PcscaleError,
    RequestError,
    RunError,
)
from pcscale.common.files import (
    published_folder,
    read_json,
    readable_os_errors,
    temporary_beside,
    write_json,
    write_text,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"name": "größer", "shape": [1, 2], "rate": 1.5e-4, "none": None}
    write_json(tmp_path / "plan.json", value)
    assert read_json(tmp_path / "plan.json") == value == json.loads((tmp_path / "plan.json").read_bytes())
    assert (tmp_path / "plan.json").read_text(encoding="utf-8").endswith("}\n")
    assert _names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(("value", "error"), [({"loss": float("nan")}, ValueError), ({"shape": {1, 2}}, TypeError)])
def test_a_value_that_is_no_json_leaves_the_old_file(value: object, error: type[Exception], tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", {"old": True})
    with pytest.raises(error, match="JSON"):
        write_json(tmp_path / "plan.json", value)
    assert read_json(tmp_path / "plan.json") == {"old": True}
    assert _names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, RunError, r"plan\.json: the disk is full\. Nothing was replaced; free space and run again"),
        (errno.EDQUOT, RunError, r"plan\.json: the disk is full"),
        (errno.EACCES, RequestError, r"plan\.json: no permission to write here\. Choose another folder or change it"),
        (errno.EROFS, RequestError, r"plan\.json: no permission to write here"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_a_refusal_of_the_system_leaves_the_old_file(
    code: int, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    write_json(tmp_path / "plan.json", {"old": True})
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(error, match=message):
        write_json(tmp_path / "plan.json", {"old": False})
    assert read_json(tmp_path / "plan.json") == {"old": True}
    assert _names(tmp_path) == ["plan.json"]


def test_the_new_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    seen: list[tuple[str, list[str]]] = []
    sync = os.fsync

    def watch(handle: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{handle}").readlink()), _names(tmp_path)))
        sync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are named through /proc")
    monkeypatch.setattr(os, "fsync", watch)
    write_text(path, "hello")
    temporary = temporary_beside(path)
    assert seen == [(str(temporary), [temporary.name]), (str(tmp_path), ["note.txt"])]


def test_a_missing_json_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"plan\.json does not exist"):
        read_json(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", pytest.param(b"[" * 90_000, id="nested")])
def test_a_file_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"plan\.json is not JSON \(.+\)\. Restore the file"):
        read_json(tmp_path / "plan.json")


def test_a_published_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-1"
    with published_folder(path) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert _names(path) == ["a.txt"]
    assert _names(path.parent) == ["step-1"]


class _Stop(BaseException):
    """Like KeyboardInterrupt, which pytest keeps for itself."""


@pytest.mark.parametrize("error", [ValueError("broken"), _Stop("interrupted")])
def test_a_failed_block_leaves_no_folder(error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        with published_folder(tmp_path / "step-1") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error), match=str(error)):
        fail()
    assert _names(tmp_path) == []


def test_a_folder_on_a_full_disk_is_said_plainly_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step-1: the disk is full"), published_folder(tmp_path / "step-1"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _names(tmp_path) == []


def test_what_a_killed_run_left_behind_does_not_reach_the_new_folder(tmp_path: Path) -> None:
    left = temporary_beside(tmp_path / "step-1")
    left.mkdir()
    (left / "half.safetensors").write_text("half")
    with published_folder(tmp_path / "step-1") as temporary:
        (temporary / "whole.safetensors").write_text("whole")
    assert _names(tmp_path / "step-1") == ["whole.safetensors"]
    assert _names(tmp_path) == ["step-1"]


def _publish_new_over_old(path: Path, fails: bool) -> None:
    path.mkdir()
    (path / "old.txt").write_text("old")
    with published_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
        assert _names(path) == ["old.txt"]
        if fails:
            raise ValueError("broken")


def test_a_folder_that_stands_already_is_replaced_at_the_end(tmp_path: Path) -> None:
    _publish_new_over_old(tmp_path / "step-1", fails=False)
    assert _names(tmp_path / "step-1") == ["new.txt"]
    assert _names(tmp_path) == ["step-1"]


def test_a_folder_that_stands_already_survives_a_failed_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        _publish_new_over_old(tmp_path / "step-1", fails=True)
    assert _names(tmp_path / "step-1") == ["old.txt"]
    assert _names(tmp_path) == ["step-1"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "precious.txt").write_text("weeks of work")
    with pytest.raises(IsADirectoryError):
        write_text(folder, "a report")
    assert _names(folder) == ["precious.txt"]
    assert _names(tmp_path) == ["runs"]


def test_other_errors_pass_through_unchanged(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "the cable is out")
    with pytest.raises(OSError, match="the cable is out") as caught, readable_os_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "exit_code", "also"),
    [
        (PcscaleError, 1, Exception),
        (RequestError, 2, ValueError),
        (BudgetError, 3, ValueError),
        (RunError, 1, RuntimeError),
        (Interrupted, 130, Exception),
    ],
)
def test_every_error_has_the_documented_exit_code(
    error: type[PcscaleError], exit_code: int, also: type[Exception]
) -> None:
    assert error.exit_code == exit_code
    assert issubclass(error, PcscaleError)
    assert issubclass(error, also)
