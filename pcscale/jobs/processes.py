"""The processes that a run has been started on."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

from pcscale.common.console import console
from pcscale.common.errors import PcscaleError, PeerFailed, RunError
from pcscale.common.topology import ALONE, Group, Topology
from pcscale.distributed.settings import EngineSettings

Result = TypeVar("Result")


@contextmanager
def processes(engine: EngineSettings | None) -> Iterator[Group]:
    """All processes of the run, which talk to each other from here on; only the first one prints.

    Args:
        engine: DeepSpeed's settings; None: one process without it.

    Raises:
        RunError: another process has ended.
        PeerFailed: something went wrong that another process reports.
    """
    launched = Topology.launched()
    if engine is None:
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
    """Do work that goes alike on all processes, before they talk to each other; its error is reported once.

    Raises:
        PcscaleError: it failed, on the first process of each host; on the others it is `PeerFailed`.
    """
    try:
        return work()
    except PcscaleError as error:
        if Topology.launched().local_rank == 0:
            raise
        raise PeerFailed(error.exit_code) from error
