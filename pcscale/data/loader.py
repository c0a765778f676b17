"""The sequences of a step: a pure function of its number, so the data position needs no state of its own.

Shapes: N train sequences, B sequences in a micro batch, T tokens in a sequence.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from pcscale.common.topology import ONE_PROCESS, Topology
from pcscale.storage.hashing import fingerprint


@lru_cache(maxsize=1)
def sequence_order(num_sequences: int, seed: int, epoch: int) -> Tensor:
    """The order of the sequences in one epoch, counted from 0: int64 `[N]`; do not change it, it is cached."""
    # torch seeds its host generator with the low 32 bits alone, so seed and epoch are mixed into all of them.
    mixed = int(fingerprint(f"{seed} {epoch}".encode())[:16], 16)
    return torch.randperm(num_sequences, generator=torch.Generator().manual_seed(mixed))


def step_batches(
    train_NT: Tensor, step: int, sequences_per_step: int, batch_size: int, seed: int, topology: Topology = ONE_PROCESS
) -> Iterator[Tensor]:
    """One rank's micro batches of one optimizer step, dealt out to the ranks one by one.

    The run's k-th sequence is number k mod N of epoch k div N, and step s sees those from (s - 1) × sequences_per_step
    on. Runs with equal sequences_per_step thus see the same sequences in the same order, whatever their batches and
    ranks.

    Args:
        train_NT: token ids.
        step: counted from 1.
        sequences_per_step: micro batch times accumulation times ranks.
        batch_size: B; the last batch is smaller where it does not divide sequences_per_step.

    Returns:
        int64 tensors `[B, T]`, on the host.
    """
    num_sequences = len(train_NT)
    first, end = (step - 1) * sequences_per_step, step * sequences_per_step
    for start in range(first + topology.rank * batch_size, end, topology.world_size * batch_size):
        rows_B = [
            sequence_order(num_sequences, seed, k // num_sequences)[k % num_sequences]
            for k in range(start, min(start + batch_size, end))
        ]
        yield train_NT[torch.stack(rows_B)].long()
