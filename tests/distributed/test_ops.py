"""What may be in the way of the op that DeepSpeed compiles. Nothing is compiled here."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils import cpp_extension

from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.distributed import ops
from tools import deepspeed_ops

NAME = "deepspeed_shm_comm"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the op is going to lie, on a machine whose ranks are on processors and which has all tools."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # What is appended to it goes away again.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(ops, "get_accelerator", CPU_Accelerator)
    monkeypatch.setattr(ops, "installed_ops", {})
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, NAME, True)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(ops.shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / NAME).mkdir()
    yield tmp_path / NAME
    console.configure(quiet=True)


def _prepare(quiet: bool = False) -> Any | None:
    console.configure(quiet)
    return ops.prepare_ops()


def _is_used() -> bool:
    """What DeepSpeed asks itself before it loads the op."""
    return deepspeed.ops.__compatible_ops__[NAME]


def _lock(folder: Path, age_minutes: float) -> Path:
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 60 * age_minutes,) * 2)
    return lock


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops.shutil, "which", lambda name: None)


def test_the_user_is_told_before_the_op_is_compiled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = _prepare()
    assert builder is not None
    assert builder.NAME == NAME
    assert f"compiling DeepSpeed's {NAME} into {folder}: once, about a minute or two" in capsys.readouterr().err
    assert _is_used()


def test_an_op_that_is_there_is_used_without_a_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / f"{NAME}.so").touch()
    assert _prepare() is not None
    assert capsys.readouterr().err == ""
    assert _is_used()


def test_without_a_compiler_gloo_is_used_and_the_user_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without_compiler(monkeypatch)
    assert _prepare(quiet=True) is None
    assert not _is_used()
    assert capsys.readouterr().err == (
        f"warning: DeepSpeed's {NAME} cannot be compiled without a C++ compiler (no-such-compiler): "
        "ranks talk over gloo alone.\n"
    )


def test_an_op_that_is_there_needs_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_compiler(monkeypatch)
    (folder / f"{NAME}.so").touch()
    assert _prepare() is not None
    assert _is_used()


def test_an_op_that_is_there_cannot_be_loaded_without_ninja(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / f"{NAME}.so").touch()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert _prepare() is None
    assert not _is_used()
    assert "cannot be loaded without ninja" in capsys.readouterr().err


def test_ninja_is_found_beside_an_interpreter_that_is_not_on_the_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scripts" / "ninja"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ops.sysconfig, "get_path", lambda name: str(program.parent))
    assert not cpp_extension.is_ninja_available()
    assert ops._missing_tools(is_built=True) == []


def test_the_lock_of_a_killed_build_is_refused(folder: Path) -> None:
    # Even where the op is there: torch waits for the lock before it looks.
    (folder / f"{NAME}.so").touch()
    lock = _lock(folder, age_minutes=20)
    message = (
        f"{lock} is 20 minutes old: a build of DeepSpeed's op was killed.* Remove this file, if no build is running"
    )
    with pytest.raises(RequestError, match=message):
        _prepare()
    lock.unlink()
    assert _prepare() is not None


def test_another_build_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, naps = _lock(folder, age_minutes=1), []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (folder / f"{NAME}.so").touch()
            lock.unlink()

    monkeypatch.setattr(ops.time, "sleep", nap)
    assert _prepare() is not None
    assert len(naps) == 3
    assert capsys.readouterr().err == f"waiting for another build of DeepSpeed's op; if there is none, remove {lock}\n"


def test_a_build_that_never_ends_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = _lock(folder, age_minutes=1)
    monkeypatch.setattr(ops.time, "sleep", lambda seconds: _lock(folder, age_minutes=16))
    with pytest.raises(RequestError, match=f"{lock} is 16 minutes old"):
        _prepare()


def test_one_rank_of_a_host_speaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    lock = _lock(folder, age_minutes=1)
    monkeypatch.setattr(ops.time, "sleep", lambda seconds: lock.unlink())
    assert _prepare() is not None
    _without_compiler(monkeypatch)
    assert _prepare() is None
    assert capsys.readouterr().err == ""
    assert not _is_used()


def test_no_op_is_prepared_for_other_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> None:
            return None

    monkeypatch.setattr(ops, "get_accelerator", Other)
    _lock(folder, age_minutes=20)
    assert _prepare() is None


def test_the_tool_refuses_a_stale_lock_and_does_without_a_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = _lock(folder, age_minutes=20)
    assert deepspeed_ops.main() == 2
    assert f"pcscale: {lock} is 20 minutes old" in capsys.readouterr().err
    lock.unlink()
    _without_compiler(monkeypatch)
    assert deepspeed_ops.main() == 0
    assert "cannot be compiled without a C++ compiler" in capsys.readouterr().err
