"""Whole commands in processes of their own, which may be killed.

They are forked from a server that has imported everything and computed nothing, so each starts in a tenth of a second.
"""

import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401

import pcscale.jobs.compress
from pcscale.cli.main import app
from tests.runs import World, report_without_plots, run_lightly, run_values, write_yaml

WAIT_SECONDS = 120

Prepare = Callable[[], None]


def run_command(arguments: list[str], log: str, prepare: Prepare | None) -> None:
    """In a process of its own: the command with both streams in one file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    run_lightly()
    if prepare:
        prepare()
    pcscale.jobs.compress.write_report = report_without_plots
    sys.stdout.flush()
    app([*arguments, "--json"], prog_name="pcscale")


def start(arguments: list[str | Path], log: Path, prepare: Prepare | None = None) -> BaseProcess:
    """Begin a command whose output goes to `log`; `prepare` is called in its process first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run_command, args=([str(part) for part in arguments], str(log), prepare))
    process.start()
    return process


def wait(process: BaseProcess) -> int:
    """Its exit code; -9 where it was killed."""
    process.join(WAIT_SECONDS)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def kill_itself(target: str, call: int) -> Prepare:
    """The process kills itself instead of making the call of that number to `target` (`module:name`)."""
    return functools.partial(_replace, target, call)


def _replace(target: str, call: int) -> None:
    module_name, _, name = target.partition(":")
    holder: Any = import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    function, calls = getattr(holder, last), 0

    def replaced(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*positional, **named)

    setattr(holder, last, replaced)


def slow_steps() -> None:
    """Steps that a test can meet: a fifteenth of a second each."""
    import pcscale.training.loop as loop

    take_step = loop._take_step

    def slow(training: Any) -> Any:
        time.sleep(0.07)
        return take_step(training)

    loop._take_step = slow


def wait_for_step(run: Path, step: int, process: BaseProcess) -> None:
    """Until metrics.jsonl has that step."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        assert process.is_alive(), "the command ended too early"
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never reached")


def run_killed(world: World, run: Path, target: str, call: int, **changes: Any) -> None:
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run, **changes))
    process = start(["compress", yaml], run.parent / "log", kill_itself(target, call))
    assert wait(process) == -signal.SIGKILL, (run.parent / "log").read_text()
