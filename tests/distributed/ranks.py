"""Several ranks on this machine: processes forked from a server that has imported everything.

They talk over gloo, as `DS_ACCELERATOR=cpu` has DeepSpeed do.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.children import Prepare, run_command

WAIT_SECONDS = 280


def run_on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)`, a module's function, returns on each rank."""
    port = _free_port()
    with ProcessPoolExecutor(world_size, _context()) as pool:
        ranks = [pool.submit(_run, _launched(rank, world_size, port), work, arguments) for rank in range(world_size)]
        return [rank.result(WAIT_SECONDS) for rank in ranks]


def start_ranks(
    world_size: int, arguments: list[str | Path], logs: Path, prepare: Mapping[int, Prepare] | None = None
) -> list[BaseProcess]:
    """Begin a command on each rank, as a launcher does; rank k's output goes to `logs`/k."""
    port, words = _free_port(), [str(part) for part in arguments]
    logs.mkdir(exist_ok=True)
    processes = [
        _context().Process(
            target=_command,
            args=(_launched(rank, world_size, port), words, str(logs / str(rank)), (prepare or {}).get(rank)),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    return context


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _launched(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    return {name: str(value) for name, value in (places | address).items()}


def _run(launched: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.update(launched)
    torch.set_num_threads(1)
    return work(*arguments)


def _command(launched: dict[str, str], arguments: list[str], log: str, prepare: Prepare | None) -> None:
    os.environ.update(launched)
    run_command(arguments, log, prepare)
