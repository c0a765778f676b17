"""The processes of a run, started by torchrun, the deepspeed launcher or SLURM, and what they say to each other."""

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pcscale.common.topology import Topology
from pcscale.distributed.ops import prepare_ops

# DeepSpeed's own calls, which torch 2.13 has renamed.
warnings.filterwarnings(
    "ignore", message=r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", category=FutureWarning
)

_PATIENCE = timedelta(days=7)
"""How long a rank waits for the others, which may merge or evaluate a large model. One that dies is noticed at once."""


class ProcessGroup:
    """All ranks of this run.

    Raises:
        RequestError: a build of DeepSpeed's op was killed, and would be waited for.
        RuntimeError: the other ranks cannot be reached.
    """

    def __init__(self) -> None:
        _name_the_lone_process()
        prepare_ops()
        if not dist.is_initialized():
            deepspeed.init_distributed(timeout=_PATIENCE, verbose=False)
        self.topology = Topology(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
        accelerator = get_accelerator()
        assert accelerator is not None
        self.device = torch.device(accelerator.device_name(self.topology.local_rank))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32).to(
            self.device
        )
        dist.all_reduce(total)
        return total.tolist()

    def close(self) -> None:
        dist.destroy_process_group()


def _name_the_lone_process() -> None:
    """What a launcher would have set, for a process that was started by hand."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})


def is_about_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "nccl")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
