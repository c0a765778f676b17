"""The seconds of a step the slow way: matrix by matrix and round by round, for one machine and one config."""

import math

from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.memory.hardware import Hardware
from pcscale.memory.step_time import FORWARD_BACKWARD, MOTION, SWEEP, forward_backward_flops
from pcscale.projection.costs import visit_flops
from pcscale.projection.layout import RecordFormat, record_bytes
from pcscale.projection.owners import sweep_rounds
from tests.tiny import SIZES

TINY = {**SIZES, "model_type": "qwen2", "dtype": "bfloat16"}
"""Whose attention has biases."""


class SlowStep:
    """The same sums, matrix by matrix and round by round, written out for one machine and one config."""

    logits_at_a_time = 2**13

    def __init__(self, plan: Plan, config: RunConfig, machine: Hardware, ranks: int) -> None:
        self.plan, self.config, self.machine, self.ranks = plan, config, machine, ranks
        self.gpu = machine.device_bytes is not None
        self.crowd = 1 if self.gpu else ranks
        aux_start = config.weight_decay > 0 and config.base_precision == "int8"
        self.form = RecordFormat(config.record_dtype, config.moments, config.rank, aux_start)
        self.compute = "bfloat16" if config.bf16 and self.gpu else "float32"

    def work(self, planned: PlannedWeight) -> float:
        (O, I), (o, i) = planned.shapes
        rank, wide = self.config.rank, 2 if self.compute == "bfloat16" else 4
        seconds = visit_flops((O, I), (o, i), rank) / self.machine.product_rates[self.compute]  # type: ignore
        sizes = [(o, O)] * planned.projects_out + [(i, I)] * planned.projects_in
        factors = sum(small * big if rank is None else rank * (small + big) for small, big in sizes)
        name = f"{self.config.record_dtype}/{self.config.moments}"
        seconds += (factors + o * i) * self.machine.update_seconds[name]
        if self.config.base_precision == "int8":
            seconds += 2 * O * I * self.machine.decode_seconds
        elif wide != 2:
            seconds += 2 * O * I * (2 + wide) / self.machine.memory_bandwidth
        kept = 2 if self.config.record_dtype == "bfloat16" else 4
        if kept != wide:
            seconds += 2 * factors * (kept + wide) / self.machine.memory_bandwidth
        return seconds * self.crowd

    def moved(self, planned: PlannedWeight) -> tuple[float, float, float]:
        config, machine = self.config, self.machine
        O, I = planned.base_shape
        base = O * I + 4 * math.ceil(O * I / 256) if config.base_precision == "int8" else 2 * O * I
        record = record_bytes(planned, self.form)
        reading: list[float] = []
        writing: list[float] = []
        disk = 0.0
        if config.base_home == "disk":
            disk += base / machine.disk_read_bandwidth * self.ranks
            reading.append(base / machine.disk_read_bandwidth * self.ranks)
        if self.gpu and config.base_home in ("disk", "cpu"):
            reading.append(base / machine.bus_bandwidth)
        if config.residency == "disk":
            reading.append(record / machine.disk_read_bandwidth * self.ranks)
            writing.append(record / machine.disk_write_bandwidth * self.ranks)
            disk += reading[-1] + writing[-1]
        if config.residency == "cpu" or (config.residency == "disk" and self.gpu):
            reading.append(record / machine.bus_bandwidth * self.crowd)
            writing.append(record / machine.bus_bandwidth * self.crowd)
        return sum(reading), sum(writing), disk

    def seconds(self) -> dict[str, float]:
        config, machine = self.config, self.machine
        matrices = {planned.name: planned for planned in self.plan.matrices}
        work = {name: self.work(planned) for name, planned in matrices.items()}
        moved = {name: self.moved(planned) for name, planned in matrices.items()}
        turns = sweep_rounds(list(matrices.values()), config.rank, self.ranks)
        mine = [[name for name in turn if name is not None] for turn in turns]
        vectors = sum(math.prod(planned.shape) for planned in self.plan.weights if not planned.is_matrix)
        parameters = sum(math.prod(planned.shape) for planned in self.plan.weights)
        gradients = parameters * (2 if config.gradient_dtype == "bfloat16" else 4)
        clip = gradients * 3 / machine.memory_bandwidth + vectors * machine.update_seconds["float32/32bit"]
        sweep = sum(max(work[name] for name in turn) for turn in mine) + clip * self.crowd
        reading, writing, disk = (sum(max(moved[name][k] for name in turn) for turn in mine) for k in range(3))
        first, *_, last = matrices
        motion = max(moved[first][0] + moved[last][1], max(reading, writing, disk) - sweep)
        if self.gpu and config.gradient_home == "cpu":
            motion += gradients * (config.gradient_accumulation_steps + 1) / machine.bus_bandwidth
        kept = 2 if config.bf16 else 4
        streams = config.tokens_per_step * TINY["vocab_size"] * 40
        batches = config.gradient_accumulation_steps
        streams += parameters * 5 * kept * batches
        chunk = self.logits_at_a_time // TINY["vocab_size"]
        predicted = config.per_device_train_batch_size * (config.sequence_length - 1)
        streams += len(range(0, predicted, chunk)) * 7 * kept * 24 * TINY["vocab_size"] * batches
        rate = machine.training_rates["bfloat16" if config.bf16 else "float32"]
        training = forward_backward_flops(self.plan, config) / rate + streams / machine.memory_bandwidth
        return {FORWARD_BACKWARD: training * self.crowd, SWEEP: sweep, MOTION: motion}
