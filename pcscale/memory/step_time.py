"""How long a step takes, from configs and a machine's figures alone. Needs no torch.

A step is forward and backward over the micro batches, then the sweep. While the sweep works on one matrix, one thread
fetches the next and another puts the one before back, so of what moves only that counts which takes longer than the
work. Matrices of equal shapes are counted once: a search asks some thousand times.

Not in it: evaluation and checkpoints; host memory as a cache of files (what lives on disk is read from the disk in
every step); what a small `pinned_memory` costs; parameters that DeepSpeed offloads.

Legend: O, I base sizes of the out and in side; o, i compressed sizes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pcscale.common.sizes import LOGIT_CHUNK_VALUES
from pcscale.config.schema import RunConfig
from pcscale.families.axes import Q_HEADS, RESIDUAL, VOCAB
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.families.spec import Kind
from pcscale.memory.components import record_format
from pcscale.memory.hardware import Dtype, Hardware
from pcscale.memory.working import kept_base_bytes, stored_bytes, taught_bytes
from pcscale.projection.costs import visit_flops
from pcscale.projection.layout import AUX, RecordFormat, record_bytes, trainable_values, value_shapes
from pcscale.projection.owners import rounds

FORWARD_BACKWARD, SWEEP = "forward and backward", "sweep"
MOTION, COMMUNICATION, TOTAL = "motion not hidden", "communication", "total"
RECOMPUTED_SHARE = 1 / 3
"""Of a layer's forward and backward, what computing its activations again adds."""
LOGIT_PASSES = 10
"""How often a logit is read or written in float32: in a loss that is computed twice and differentiated once."""
HEAD_PASSES = 7
"""How often the head, or its gradient, is read or written for one chunk of the loss: to give the logits twice and the
hidden states' gradient once, and to add its own gradient to those of other chunks."""
WEIGHT_PASSES = 5
"""How often a compressed weight or its gradient is read or written for one micro batch, beside the products."""
CLIP_PASSES = 3
"""How often a gradient is read or written to be clipped."""
STAGE_3_SLOWDOWN = 2.4
"""Of communication between processors at ZeRO stage 3, which gathers and lets go the weights of one module at a time.
Source: benchmarks/reports/ranks_amd-epyc-2-cores_2026-11-25.md: 7.6 s where stage 1 took 3.2, for as many bytes.
Between GPUs it is not known, and left out."""
_CACHE_SIZE = 4096
_BYTES = {"float32": 4, "bfloat16": 2}


def step_seconds(
    plan: Plan, config: RunConfig, hardware: Hardware, world_size: int = 1, zero_stage: int = 0
) -> dict[str, float]:
    """Seconds of one optimizer step, by part.

    Args:
        config: its batch is that of one rank.
        hardware: what each rank computes with. Ranks without a GPU share the processors of one host; all share a disk.
        zero_stage: of DeepSpeed, with several ranks.

    Returns:
        "forward and backward", "sweep", "motion not hidden", "communication", and their "total".
    """
    machine = _Machine(plan, config, hardware, world_size)
    sweep, motion = machine.sweep_and_motion()
    parts = {
        FORWARD_BACKWARD: machine.forward_backward(),
        SWEEP: sweep,
        MOTION: motion,
        COMMUNICATION: machine.communication(zero_stage),
    }
    return {**parts, TOTAL: sum(parts.values())}


def forward_backward_flops(plan: Plan, config: RunConfig) -> float:
    """Operations of a rank's forward and backward in a step, with what is computed twice, and of the teacher's."""
    hidden, vocab, layers = plan.sizes[RESIDUAL], plan.sizes[VOCAB], plan.num_layers
    multiplied = sum(
        math.prod(planned.shape) * count for planned, count in plan.alike if planned.weight.kind is Kind.LINEAR
    )
    attention = layers * plan.sizes[Q_HEADS] * config.sequence_length
    layer_flops = 6 * (multiplied + attention) * (1 + RECOMPUTED_SHARE * config.gradient_checkpointing)
    # The loss computes its logits again in the backward pass, always.
    return config.tokens_per_step * (layer_flops + 8 * hidden * vocab + _teacher_flops(plan, config))


def _teacher_flops(plan: Plan, config: RunConfig) -> int:
    """Of the base's forward for a token; its whole distribution is computed again in the backward pass."""
    if config.distill is None or config.distill.cache is not None:
        return 0
    linear = sum(math.prod(p.base_shape) * count for p, count in plan.alike if p.weight.kind is Kind.LINEAR)
    attention = plan.num_layers * plan.base_sizes[Q_HEADS] * config.sequence_length
    head = plan.base_sizes[RESIDUAL] * plan.base_sizes[VOCAB] * (2 if config.distill.top_k is None else 1)
    return 2 * (linear + attention + head)


@dataclass(frozen=True)
class _Machine:
    """One step's parts on one rank. Units: seconds."""

    plan: Plan
    config: RunConfig
    hardware: Hardware
    world_size: int

    @property
    def shared_by(self) -> int:
        """Ranks that share what this one computes with."""
        return 1 if self.hardware.on_gpu else self.world_size

    @property
    def weight_dtype(self) -> Dtype:
        return "bfloat16" if self.config.bf16 else "float32"

    @property
    def gradient_bytes(self) -> int:
        """One gradient of every compressed weight."""
        return self.plan.parameters * _BYTES[self.config.gradient_dtype]

    def forward_backward(self) -> float:
        config, hardware = self.config, self.hardware
        flops = forward_backward_flops(self.plan, config)
        logits = config.tokens_per_step * self.plan.sizes[VOCAB] * LOGIT_PASSES * _BYTES["float32"]
        chunk_tokens = max(1, LOGIT_CHUNK_VALUES // self.plan.sizes[VOCAB])
        chunks = -(-config.per_device_train_batch_size * (config.sequence_length - 1) // chunk_tokens)
        head = chunks * HEAD_PASSES * self.plan.sizes[RESIDUAL] * self.plan.sizes[VOCAB]
        weights = (self.plan.parameters * WEIGHT_PASSES + head) * config.gradient_accumulation_steps
        moved = logits + weights * _BYTES[self.weight_dtype]
        return (flops / hardware.training_rates[self.weight_dtype] + moved / hardware.memory_bandwidth) * self.shared_by

    def sweep_and_motion(self) -> tuple[float, float]:
        hardware, projected = self.hardware, self.config.method == "projected"
        groups = self.plan.alike if projected else ()
        also = self._gradients_moved() + self._taught()
        direct = self.plan.parameters - sum(math.prod(planned.shape) * count for planned, count in groups)
        seconds = direct * hardware.update_seconds["float32/32bit"]
        seconds += self.gradient_bytes * CLIP_PASSES / hardware.memory_bandwidth
        if not projected:
            return seconds * self.shared_by, also
        form = record_format(self.config)
        rank = self.config.product_rank
        costs = tuple((_flops(planned.base_shape, planned.shape, rank), count) for planned, count in groups)
        turns = _turns(costs, self.world_size)
        seconds += _over(turns, [self._visit(planned, form) for planned, _ in groups])
        seconds *= self.shared_by
        reads, writes, disks = zip(*(self._moved(planned, form) for planned, _ in groups), strict=True)
        gathered = self._gathered()
        # Reading and writing run beside each other, but for the disk, which does both.
        moving = max(_over(turns, reads) + gathered, _over(turns, writes), _over(turns, disks))
        # Nothing is worked on while the first one comes and the last one goes.
        edges = reads[0] + writes[-1]
        return seconds, max(edges, moving - seconds) + also

    def _visit(self, planned: PlannedWeight, form: RecordFormat) -> float:
        """The work on one matrix: products, updates, and what makes operands of what is kept in fewer bits."""
        config, hardware = self.config, self.hardware
        dtype: Dtype = self.weight_dtype if hardware.on_gpu else "float32"
        values, factors = _values(planned, form.rank)
        seconds = _flops(planned.base_shape, planned.shape, config.product_rank) / hardware.product_rates[dtype]
        seconds += values * hardware.update_seconds[f"{form.dtype}/{form.moments}"]
        base_values = math.prod(planned.base_shape)
        # Pulling back and composing each convert base and factors.
        if config.base_precision == "int8":
            seconds += 2 * base_values * hardware.decode_seconds
        else:
            seconds += 2 * base_values * _conversion(self._stored, dtype) / hardware.memory_bandwidth
        return seconds + 2 * factors * _conversion(form.dtype, dtype) / hardware.memory_bandwidth

    def _moved(self, planned: PlannedWeight, form: RecordFormat) -> tuple[float, float, float]:
        """Of one matrix: reading its base weight and record, writing the record, and both on the disk."""
        config, hardware = self.config, self.hardware
        record, base = _record_bytes(planned, form), self._base_bytes(planned)
        bus = self.shared_by / hardware.bus_bandwidth
        disk_read, disk_write = (
            self.world_size / rate for rate in (hardware.disk_read_bandwidth, hardware.disk_write_bandwidth)
        )
        read = write = disk = 0.0
        # On the host alone a base in memory, or mapped, is worked on where it is; so is a record's buffer of a file.
        if config.base_home == "disk":
            disk = base * disk_read
            read = disk + base * bus * hardware.on_gpu
        elif config.base_home == "cpu":
            read = base * bus * hardware.on_gpu
        if config.residency == "cpu":
            read, write = read + record * bus, record * bus
        elif config.residency == "disk":
            over_bus = record * bus * hardware.on_gpu
            read, write = read + record * disk_read + over_bus, record * disk_write + over_bus
            disk += record * (disk_read + disk_write)
        return read, write, disk

    def _gathered(self) -> float:
        """The whole base on every rank, each with its part of it in host memory."""
        if self.config.base_home != "zero":
            return 0.0
        base = sum(self._base_bytes(planned) * count for planned, count in self.plan.alike)
        from_others = base * (self.world_size - 1) / self.world_size / self.hardware.rank_bandwidth
        return from_others + base / self.world_size / self.hardware.bus_bandwidth * self.hardware.on_gpu

    def _gradients_moved(self) -> float:
        """To the host as backward makes them, and back as the sweep needs them: neither is hidden."""
        if self.config.gradient_home == "device" or not self.hardware.on_gpu:
            return 0.0
        return self.gradient_bytes * (self.config.gradient_accumulation_steps + 1) / self.hardware.bus_bandwidth

    def _taught(self) -> float:
        """Reading what teaches, as far as it takes longer than the base's own forward; of a cache all of it."""
        value = 2 if self.hardware.on_gpu and self.config.bf16 else _BYTES["float32"]
        read = taught_bytes(self.plan, self.config, value)
        seconds = read * self.world_size / self.hardware.disk_read_bandwidth
        seconds += read / self.hardware.bus_bandwidth * self.hardware.on_gpu
        flops = self.config.tokens_per_step * _teacher_flops(self.plan, self.config)
        return max(0.0, seconds - flops / self.hardware.training_rates[self.weight_dtype] * self.shared_by)

    def communication(self, zero_stage: int) -> float:
        """One reduction of the gradients and one broadcast of the weights at stage 0, twice that at stages 1 to 3
        (benchmarks/reports/ranks_*.md, of one micro batch). Each further micro batch reduces again from stage 2 on, and
        gathers the weights again at stage 3. None of it is hidden."""
        if self.world_size == 1:
            return 0.0
        # In bfloat16 stage 0 runs as stage 1.
        twice = 2 if zero_stage > 0 or self.config.bf16 else 1
        again = self.config.gradient_accumulation_steps - 1
        weights = self.plan.parameters * _BYTES[self.weight_dtype]
        # A ring sends a sum's parts around twice, a value once.
        reduction = 2 * (self.world_size - 1) / self.world_size * self.gradient_bytes
        sent = twice * (reduction + weights) + again * (reduction * (zero_stage >= 2) + weights * (zero_stage == 3))
        slowed = STAGE_3_SLOWDOWN if zero_stage == 3 and not self.hardware.on_gpu else 1
        return slowed * sent / self.hardware.rank_bandwidth

    @property
    def _stored(self) -> Dtype:
        return "float32" if stored_bytes(self.plan.base_config) == _BYTES["float32"] else "bfloat16"

    def _base_bytes(self, planned: PlannedWeight) -> int:
        return kept_base_bytes(planned, self.plan.base_config, self.config)


def _conversion(kept: str, wanted: str) -> int:
    """Bytes that a value's copy in another dtype reads and writes."""
    return 0 if kept == wanted else _BYTES[kept] + _BYTES[wanted]


_flops, _record_bytes = lru_cache(_CACHE_SIZE)(visit_flops), lru_cache(_CACHE_SIZE)(record_bytes)


@lru_cache(_CACHE_SIZE)
def _values(planned: PlannedWeight, rank: int | None) -> tuple[int, int]:
    """Trainable values, and those of them that products multiply by: all but aux."""
    shapes = value_shapes(planned, rank)
    return trainable_values(planned, rank), sum(math.prod(shape) for name, shape in shapes.items() if name != AUX)


@lru_cache(_CACHE_SIZE)
def _turns(costs: tuple[tuple[int, int], ...], world_size: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Which kinds of matrix the ranks work on in a round, and in how many rounds.

    Args:
        costs: of a visit to one matrix of each kind, and how many there are.
    """
    if world_size == 1:
        return tuple(((kind,), count) for kind, (_, count) in enumerate(costs))
    kinds = [kind for kind, (_, count) in enumerate(costs) for _ in range(count)]
    turns = rounds({str(number): costs[kind][0] for number, kind in enumerate(kinds)}, world_size)
    return tuple(Counter(tuple(sorted(kinds[int(name)] for name in turn if name)) for turn in turns).items())


def _over(turns: Sequence[tuple[tuple[int, ...], int]], seconds: Sequence[float]) -> float:
    """All rounds: in each the ranks wait for the slowest one."""
    return sum(max(seconds[kind] for kind in turn) * count for turn, count in turns)
