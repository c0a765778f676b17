"""The processes that a run has been started on."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from pcscale.common.console import console
from pcscale.common.errors import PcscaleError, PeerFailed, RequestError, RunError
from pcscale.common.topology import ALONE, Group, Topology
from pcscale.config.schema import RunConfig
from pcscale.distributed.settings import read_engine_settings

Result = TypeVar("Result")


@contextmanager
def processes(config: RunConfig) -> Iterator[Group]:
    """All processes of the run, which talk to each other from here on; only the first one prints.

    Raises:
        RequestError: run.yaml names no DeepSpeed file, or one that contradicts it; deepspeed is not installed.
        RunError: another process has ended.
        PeerFailed: something went wrong that another process says.
    """
    launched = Topology.launched()
    reported_once(lambda: check_processes(config))
    if config.deepspeed is None:
        yield ALONE
        return
    from pcscale.distributed.group import ProcessGroup, is_about_a_peer

    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if not launched.is_first:
        # For the rest of this process: its results are the first one's too.
        console.configure(quiet=True)
        sys.stdout = nowhere
    # DeepSpeed chats on standard output, which belongs to the result.
    with redirect_stdout(nowhere):
        group = reported_once(ProcessGroup)
        try:
            yield group
        except Exception as error:
            if not is_about_a_peer(error):
                raise
            if launched.local_rank > 0:
                raise PeerFailed(RunError.exit_code) from error
            raise RunError(
                "another process of the run has ended. Go on from the last checkpoint with --resume."
            ) from error
        group.close()


def reported_once(work: Callable[[], Result]) -> Result:
    """Do what goes well or wrong on all processes alike, before they talk to each other.

    Raises:
        PcscaleError: it went wrong, on the first process of each host; on the others it is `PeerFailed`.
    """
    try:
        return work()
    except PcscaleError as error:
        if Topology.launched().local_rank == 0:
            raise
        raise PeerFailed(error.exit_code) from error


def check_processes(config: RunConfig) -> None:
    """Refuse what cannot run on the processes that were started.

    Raises:
        RequestError: several and no DeepSpeed file, a file that contradicts run.yaml, or no deepspeed.
    """
    world_size = Topology.launched().world_size
    if config.deepspeed is None:
        if world_size > 1:
            raise RequestError(
                f"started on {world_size} processes, and run.yaml names no DeepSpeed file. "
                "Set deepspeed, for instance to deepspeed_configs/zero1.json."
            )
        return
    read_engine_settings(Path(config.deepspeed), config, world_size)
    if find_spec("deepspeed") is None:
        raise RequestError("deepspeed needs the package deepspeed. Run `pip install 'pcscale[deepspeed]'`.")
