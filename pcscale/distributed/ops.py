"""The op that DeepSpeed compiles before ranks on processors can talk to each other, and what may be in its way."""

import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.topology import Topology

BUILD_SECONDS = 15 * 60
"""A build takes a minute or two. One that has held its lock for so long was killed."""


def prepare_ops() -> Any | None:
    """Call before `deepspeed.init_distributed`, which would compile without a word or wait for ever.

    On processors ranks of one host sum over shared memory. The op for it lies in a folder of `TORCH_EXTENSIONS_DIR`;
    without a compiler to make it, it is turned off and gloo sums alone.

    Returns:
        DeepSpeed's builder of the op, whose `load` compiles it where that is still to be done. None: no op is needed.

    Raises:
        RequestError: a build that was killed has left its lock, on which every other would wait.
    """
    builder: Any = get_accelerator().create_op_builder("ShareMemCommBuilder")  # pyright: ignore[reportOptionalMemberAccess]
    compatible = deepspeed.ops.__compatible_ops__
    if builder is None or not compatible.get(builder.NAME) or installed_ops.get(builder.NAME):
        return None
    folder = Path(cpp_extension._get_build_directory(builder.NAME, verbose=False))
    _wait_for_other_build(folder / "lock")
    is_built = (folder / f"{builder.NAME}{cpp_extension.LIB_EXT}").is_file()
    missing = _missing_tools(is_built)
    if missing:
        compatible[builder.NAME] = False
        if _speaks():
            console.warn(
                f"DeepSpeed's {builder.NAME} cannot be {'loaded' if is_built else 'compiled'} without "
                f"{' and '.join(missing)}: ranks talk over gloo alone."
            )
        return None
    if not is_built and _speaks():
        console.say(f"compiling DeepSpeed's {builder.NAME} into {folder}: once, about a minute or two")
    return builder


def _wait_for_other_build(lock: Path) -> None:
    """torch makes this file when a build begins and removes it at the end, unless it is killed."""
    waits = False
    while (age := _age_seconds(lock)) is not None:
        if age > BUILD_SECONDS:
            raise RequestError(
                f"{lock} is {age / 60:.0f} minutes old: a build of DeepSpeed's op was killed, and every later one "
                "would wait for it for ever. Remove this file, if no build is running."
            )
        if not waits and _speaks():
            console.say(f"waiting for another build of DeepSpeed's op; if there is none, remove {lock}")
        waits = True
        time.sleep(0.1)


def _age_seconds(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _missing_tools(is_built: bool) -> list[str]:
    """What the op cannot be compiled without; torch asks for ninja even to load one that is built."""
    if not cpp_extension.is_ninja_available():
        # DeepSpeed brings ninja as a package, whose program lies beside an interpreter that PATH may not lead to.
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    compiler = cpp_extension.get_cxx_compiler()
    has_compiler = is_built or shutil.which(compiler) is not None
    return [f"a C++ compiler ({compiler})"] * (not has_compiler) + ["ninja"] * (not cpp_extension.is_ninja_available())


def _speaks() -> bool:
    """One rank of a host says what all of them meet."""
    return Topology.launched().local_rank == 0
