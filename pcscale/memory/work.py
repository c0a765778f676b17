"""The work of a step on one rank, computed and moved: settings are ranked by it.

Needs no torch. Not counted: evaluations and checkpoints; host memory as a cache of files (what lives on disk is read
from the disk in every step).
"""

import math
from dataclasses import dataclass

from pcscale.config.schema import PlanConfig
from pcscale.families.axes import Q_HEADS, RESIDUAL, VOCAB
from pcscale.families.plan import Plan
from pcscale.families.spec import Kind

RECOMPUTED_SHARE = 1 / 3
"""Share of a layer's forward and backward that computing its activations again adds."""


@dataclass(frozen=True)
class Work:
    """One rank's step. Bytes on the disk are those of all ranks, which share it.

    Attributes:
        train_flops: forward and backward, with what is computed twice, and the teacher's forward.
        sweep_flops: products of the sweep.
        bus_bytes: between host and device while the sweep runs; without a GPU from memory to memory.
        gradient_bytes: between host and device while it does not: gradients, and what ZeRO offloads.
        disk_read_bytes: base weights, records, and what teaches.
        disk_written_bytes: records.
        rank_bytes: sent to other ranks.
    """

    train_flops: float
    sweep_flops: float
    bus_bytes: float
    gradient_bytes: float
    disk_read_bytes: float
    disk_written_bytes: float
    rank_bytes: float

    @property
    def links(self) -> tuple[float, float, float]:
        """Bytes over the bus, to and from the disk, and between ranks."""
        disk_bytes = self.disk_read_bytes + self.disk_written_bytes
        return self.bus_bytes + self.gradient_bytes, disk_bytes, self.rank_bytes


def train_flops(plan: Plan, config: PlanConfig) -> float:
    """Operations of a rank's forward and backward in a step, with what is computed twice, and of the teacher's."""
    hidden, vocab = plan.sizes[RESIDUAL], plan.sizes[VOCAB]
    linear = sum(
        math.prod(planned.shape) * count for planned, count in plan.alike if planned.weight.kind is Kind.LINEAR
    )
    attention = plan.num_layers * plan.sizes[Q_HEADS] * config.sequence_length
    layers = 6 * (linear + attention) * (1 + RECOMPUTED_SHARE * config.gradient_checkpointing)
    # The loss computes its logits again in the backward pass, always.
    return config.tokens_per_step * (layers + 8 * hidden * vocab + _teacher_flops(plan, config))


def _teacher_flops(plan: Plan, config: PlanConfig) -> int:
    """Operations of the base's forward for a token; its whole distribution is computed again in the backward pass."""
    if config.distill is None or config.distill.cache is not None:
        return 0
    linear = sum(math.prod(p.base_shape) * count for p, count in plan.alike if p.weight.kind is Kind.LINEAR)
    attention = plan.num_layers * plan.base_sizes[Q_HEADS] * config.sequence_length
    head = plan.base_sizes[RESIDUAL] * plan.base_sizes[VOCAB] * (2 if config.distill.top_k is None else 1)
    return 2 * (linear + attention + head)
