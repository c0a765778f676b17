"""The processes of a run, started by torchrun, the deepspeed launcher or SLURM, and how they talk to each other."""

import os
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pcscale.common.topology import Topology

# DeepSpeed calls these by names that torch 2.13 deprecates.
warnings.filterwarnings(
    "ignore", message=r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", category=FutureWarning
)

_PATIENCE = timedelta(days=7)
"""Time that a rank waits for the others, which may merge a large model meanwhile. gloo notices when one dies."""
_PATIENCE_ON_DEVICES = timedelta(hours=1)
"""Time that a rank waits for gradients and weights over NCCL, which does not notice."""


class ProcessGroup:
    """All ranks of this run. Raises RuntimeError where they cannot be reached."""

    def __init__(self) -> None:
        if "RANK" not in os.environ:  # The process was started by hand: set what a launcher sets, with any free port.
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        # For processors DeepSpeed would compile an op to sum over shared memory, which training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        accelerator = get_accelerator()
        assert accelerator is not None
        launched = Topology.launched()
        self.device_name: str | None = accelerator.device_name(launched.local_rank)
        self.device = torch.device(self.device_name)
        on_host = self.device.type == "cpu"
        if not dist.is_initialized():
            deepspeed.init_distributed(timeout=_PATIENCE if on_host else _PATIENCE_ON_DEVICES, verbose=False)
        self.topology = Topology(dist.get_rank(), dist.get_world_size(), launched.local_rank)
        if not on_host:
            torch.cuda.set_device(self.device)
        self._talk = None if on_host else dist.new_group(backend="gloo", timeout=_PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value, self._talk)
        return values

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._talk)
        return total.tolist()

    def close(self) -> None:
        dist.destroy_process_group()


def is_about_a_peer(error: BaseException) -> bool:
    """Tell whether a collective failed because another process is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
