"""The processes that a run has been started on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.common.topology import ALONE, Group
from pcscale.config.schema import RunConfig
from pcscale.distributed.settings import read_engine_settings


@contextmanager
def processes(config: RunConfig) -> Iterator[Group]:
    """All processes of the run, which talk to each other from here on; only the first one prints.

    Raises:
        RequestError: run.yaml names no DeepSpeed file, or one that contradicts it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.deepspeed is None:
        if world_size > 1:
            raise RequestError(
                f"started on {world_size} processes, and run.yaml names no DeepSpeed file. "
                "Set deepspeed, for instance to deepspeed_configs/zero1.json."
            )
        yield ALONE
        return
    read_engine_settings(Path(config.deepspeed), config, world_size)
    if find_spec("deepspeed") is None:
        raise RequestError("deepspeed needs the package deepspeed. Run `pip install deepspeed`.")
    from pcscale.distributed.group import ProcessGroup, is_about_a_peer

    group = ProcessGroup()
    if not group.topology.is_first:
        console.configure(quiet=True)
    try:
        yield group
    except Exception as error:
        if is_about_a_peer(error):
            raise RunError(
                "another process of the run has ended. Go on from the last checkpoint with --resume."
            ) from error
        raise
    group.close()
