"""Files that are whole as soon as they are visible: written beside their place, synced, then renamed."""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError, RunError

TEMPORARY_PREFIX = ".partial-"
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag, from Linux's headers


@contextmanager
def readable_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals around `path` into errors that a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: the disk is full. Nothing was replaced; free space and run again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RequestError(f"{path}: no permission to write here. Choose another folder or change it.") from error
        if error.errno == errno.ENOTDIR:
            raise RequestError(f"{path}: a part of this path is a file. Name a new folder.") from error
        raise


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """The hidden name that a file or folder has until it is whole."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never changed in place a second name, instead of any file that has that name.

    Where the file system has no links, the second name gets a synced copy.
    """
    temporary = temporary_beside(target)
    with readable_os_errors(target):
        try:
            temporary.unlink(missing_ok=True)
            try:
                temporary.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, temporary)
                sync_to_disk(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)  # Renaming one name of a file to another of its names does nothing.


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders swap names in one step; False where the system cannot, and nothing was done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def publish(temporary: Path, path: Path) -> None:
    """Give a written and synced file or folder its name; a file replaces a file, a folder a folder."""
    if temporary.is_dir() and path.is_dir() and any(path.iterdir()):
        old = temporary
        if not _exchange(temporary, path):
            old = temporary.with_name(f"{temporary.name}-old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            temporary.rename(path)
        sync_to_disk(path.parent)
        shutil.rmtree(old)
    else:
        temporary.replace(path)
    sync_to_disk(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    temporary = temporary_beside(path)
    with readable_os_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # It is gone where it was published.


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a JSON document in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON document in `path`.

    Raises:
        RequestError: the file is absent, cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError, PermissionError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON ({error}). Restore the file.") from None


def empty_folder(path: Path) -> None:
    """Make an empty folder, whatever was there."""
    with readable_os_errors(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished folder the name `path`, instead of any folder that has it."""
    with readable_os_errors(path):
        sync_to_disk(temporary)
        publish(temporary, path)


@contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well and vanishes when it does not."""
    temporary = temporary_beside(path)
    with readable_os_errors(path):
        empty_folder(temporary)
        try:
            yield temporary
            publish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
