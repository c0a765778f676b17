"""The prediction of a run: bytes by component, phase and stage, bytes moved and written, from configs alone.

Needs no torch. The parts of memory are in memory/stages.py.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from pcscale.common import ledger
from pcscale.common.sizes import CACHED_PROBABILITY_BYTES, HIDDEN_BUDGET_BYTES, token_bytes
from pcscale.families.axes import RESIDUAL, VOCAB
from pcscale.memory import working
from pcscale.memory.deployment import FLOAT_BYTES, Parts, total
from pcscale.memory.shared import KNOBS, shared
from pcscale.memory.stages import Stages, working_parts
from pcscale.projection.layout import trainable_values

RECOMPUTED_SHARE = 1 / 3
"""Share of a layer's forward and backward that computing its activations again adds."""
TRAIN = "train"
PUBLISHED_BYTES = 16
"""A trainable value in the published form: a float32 value, its gradient and two moments."""
ALTERNATIVES = {
    "published form": "the base, 16 bytes a trainable value, the composed weights with their gradients, "
    "and activations",
    "hard pruning": "16 bytes a parameter of the compressed model, and activations",
    "this run": "all that training holds on devices and hosts, libraries too",
}
"""Ways to train, with the memory that is counted."""


def totals(parts: Parts) -> dict[str, int]:
    """`{device_bytes, host_bytes}`, pinned memory counted as the host's."""
    held = parts.values()
    return {"device_bytes": total(held, "device"), "host_bytes": total(held, "host", "pinned")}


class Work(NamedTuple):
    """One rank's step, computed and moved: settings are ranked by it.

    Not counted: evaluations and checkpoints; host memory as a cache of files (what lives on disk is read from the disk
    in every step).

    Attributes:
        flops: forward and backward, with what is computed twice, the teacher's forward, and products of the sweep.
        bus_bytes: between host and device; without a GPU from memory to memory while the sweep runs.
        disk_bytes: base weights, records, and what teaches, of all ranks, which share the disk.
        rank_bytes: sent to other ranks.
    """

    flops: float
    bus_bytes: float
    disk_bytes: float
    rank_bytes: float


@dataclass(frozen=True)
class Prediction(Stages):
    """Everything that is known of a run before it starts, from its plan, its settings and its deployment."""

    def varied(self, **knobs: Any) -> "Prediction":
        """The prediction with other values of some `KNOBS`; it shares what does not depend on them."""
        assert knobs.keys() <= set(KNOBS), knobs
        return replace(self, config=self.config.model_copy(update=knobs))

    @cached_property
    def phases(self) -> dict[str, Parts]:
        """The parts of each phase at its peak."""
        first = "device_bytes" if self.deployment.on_gpu else "host_bytes"
        return {
            "calibrate": self.calibrate,
            TRAIN: max(self.training.values(), key=lambda parts: totals(parts)[first]),
            "merge": self.merge,
            "evaluate": self.evaluate,
        }

    @cached_property
    def peaks(self) -> dict[str, dict[str, int]]:
        """`{phase: {device_bytes, host_bytes, disk_bytes}}` of one rank; the disk's are of all ranks together.

        The device's and the host's peak may be in different stages.
        """
        found = {phase: totals(parts) for phase, parts in self.phases.items()}
        stages = [totals(parts) for parts in self.training.values()]
        found[TRAIN] = {key: max(stage[key] for stage in stages) for key in ("device_bytes", "host_bytes")}
        return {phase: {**found[phase], "disk_bytes": sum(self.disk[phase].values())} for phase in found}

    @property
    def needs(self) -> dict[str, int]:
        """Peaks over all phases: `device` of each, `host` with all its ranks, `disk`. Units: bytes."""
        ranks = {"device": 1, "host": self.deployment.sharing, "disk": 1}
        return {name: max(peak[f"{name}_bytes"] for peak in self.peaks.values()) * ranks[name] for name in ranks}

    @property
    def _records_in_files(self) -> bool:
        return self.config.residency == "disk" and self.projects

    @shared("base_precision", "record_dtype", "moments", "residency")
    def disk(self) -> dict[str, dict[str, int]]:
        """The most that lies in the run folder, by phase. Units: bytes."""
        config, in_files = self.config, self._records_in_files
        records, spare = self.record_bytes
        coded = {"8-bit base": self.base_bytes * (config.base_precision == "int8")}
        rebuilt = {"rebuilt channels": 2 * self.plan.num_layers * self.rebuilt_values}
        in_place = {"records and moments": records * in_files, "spare files": spare * in_files}
        checkpoints = {"checkpoints": self.checkpoint_bytes * (config.keep_checkpoints + 1)}
        # The merged model has the base's dtype.
        merged = {"merged model": self.plan.parameters * self.stored_bytes}
        kept = coded | {"checkpoints": self.checkpoint_bytes * config.keep_checkpoints} | merged
        train = coded | rebuilt | in_place | checkpoints
        return {"calibrate": rebuilt, TRAIN: train, "merge": kept, "evaluate": kept}

    @property
    def checkpoint_bytes(self) -> int:
        """Disk that one checkpoint takes: every trainable value with its moments.

        With residency disk it shares its files with the records until they are written anew.
        """
        direct = 3 * self.direct_values * FLOAT_BYTES
        return direct + (self.record_bytes[0] + self.basis_bytes) * self.projects

    @cached_property
    def moved(self) -> dict[str, int]:
        """The least that a step can move, over all ranks: each base weight once, each record in and out once.

        With a teacher also what it reads: every rank the base's weights for its own tokens, or their part of a cache.
        """
        config = self.config
        teacher = {"teacher": self._taught_bytes * self.deployment.ranks} if config.distill is not None else {}
        records = self.record_bytes[0] if self.projects and config.residency != "device" else 0
        base = self.base_bytes if self.projects and config.base_home != "device" else 0
        return {"base": base, "records_read": records, "records_written": records, **teacher}

    @property
    def _taught_bytes(self) -> int:
        """Bytes that one rank reads in a step to be taught: the base's weights once a pass, or its tokens of a
        cache."""
        config, sizes = self.config, self.plan.base_sizes
        assert config.distill is not None
        top_k = config.distill.top_k
        if config.distill.cache is not None and top_k is not None:
            return config.tokens_per_step * top_k * (CACHED_PROBABILITY_BYTES + token_bytes(sizes[VOCAB]))
        waiting = working.micro_batch_tokens(config) * sizes[RESIDUAL] * self.product_bytes
        passes = -(-config.gradient_accumulation_steps // max(1, HIDDEN_BUDGET_BYTES // waiting))
        # Of the embedding only rows are looked up; where the whole distribution counts, the head stays on the device.
        left_out = (not self.plan.tied) + (top_k is None)
        values = self.plan.base_parameters - left_out * sizes[VOCAB] * sizes[RESIDUAL]
        return passes * values * self.stored_bytes

    @property
    def written_bytes_per_step(self) -> int:
        """Bytes that a step writes to files, a checkpoint's share with them: the wear of the disk."""
        # Where records are files, a checkpoint links them.
        if self._records_in_files:
            return self.moved["records_written"]
        return self.checkpoint_bytes // self.config.save_steps

    @property
    def communicated_bytes_per_step(self) -> int:
        """Payload of one rank's collectives: gradients reduced and weights sent once at stage 0, twice at stages 1 to
        3."""
        deployment = self.deployment
        if deployment.ranks == 1:
            return 0
        once = self.plan.parameters * (FLOAT_BYTES + self.weight_bytes)
        return once * (2 if deployment.zero is not None and deployment.zero.stage > 0 else 1)

    @property
    def work(self) -> Work:
        """One rank's share of a step."""
        config, deployment, moved = self.config, self.deployment, self.moved
        ranks, on_gpu, zero = deployment.ranks, deployment.on_gpu, deployment.zero
        plan, again = self.plan, config.gradient_accumulation_steps - 1
        records = moved["records_read"] + moved["records_written"]
        teacher = moved.get("teacher", 0)
        # On the host alone a base in memory, or mapped, is worked on where it is; so is a record's buffer of a file.
        over_bus = moved["base"] + records + teacher if on_gpu else records * (config.residency == "cpu")
        gradient_bytes = plan.parameters * (2 if config.gradient_dtype == "bfloat16" else FLOAT_BYTES)
        passing = gradient_bytes * (again + 2) * (config.gradient_home == "cpu")
        sent = self.communicated_bytes_per_step + moved["base"] * (ranks - 1) / ranks * (config.base_home == "zero")
        if zero is not None:
            passing += zero.moved_bytes(plan.parameters, self.weight_bytes, ranks, again + 1)
            # Each further micro batch reduces again from stage 2 on, and gathers the weights again at stage 3.
            weights = plan.parameters * self.weight_bytes
            sent += again * (gradient_bytes * (zero.stage >= 2) + weights * (zero.stage == 3)) * (ranks > 1)
        disk_bytes = moved["base"] * (config.base_home == "disk") + records * self._records_in_files + teacher
        flops = self._train_flops + sum(self.sweep_flops) / ranks
        return Work(flops, over_bus / ranks + passing * on_gpu, disk_bytes, sent)

    @shared("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")
    def _train_flops(self) -> float:
        """Operations of a rank's forward and backward in a step, with what is computed twice, and of the teacher's."""
        plan, config, distill = self.plan, self.config, self.config.distill
        layers = 6 * working.forward_products(plan, config) * (1 + RECOMPUTED_SHARE * config.gradient_checkpointing)
        # The loss computes its logits again in the backward pass, always; the teacher's where all of them count.
        token = layers + 8 * plan.sizes[RESIDUAL] * plan.sizes[VOCAB]
        if distill is not None and distill.cache is None:
            head = plan.base_sizes[RESIDUAL] * plan.base_sizes[VOCAB] * (2 if distill.top_k is None else 1)
            token += 2 * (working.forward_products(plan, config, of_base=True) + head)
        return config.tokens_per_step * token

    @property
    def alternatives(self) -> dict[str, dict[str, Any]]:
        """Device and host memory that training takes, beside that of the published form and of hard pruning."""
        plan, backward = self.plan, self.training["backward"]
        libraries = [backward[name] for name in (ledger.LIBRARIES, ledger.CONTEXT) if name in backward]
        same = sum(part.num_bytes for part in (*libraries, *working_parts(backward)))
        values = sum(trainable_values(planned) for planned in plan.weights)
        base = plan.base_parameters * self.stored_bytes
        composed = 2 * FLOAT_BYTES * self.matrix_values
        own = max(sum(totals(parts).values()) for parts in self.training.values())
        published = base + PUBLISHED_BYTES * values + composed + same
        needed = (published, PUBLISHED_BYTES * plan.parameters + same, own * self.deployment.ranks)
        return {
            name: {"bytes": size, "of": ALTERNATIVES[name]} for name, size in zip(ALTERNATIVES, needed, strict=True)
        }

    def document(self, base_name: str) -> dict[str, Any]:
        """The contents of plan.json, which `pcscale plan --json` prints."""
        plan = self.plan
        base = {"name": base_name, "family": plan.family.name, "parameters": plan.base_parameters, "tied": plan.tied}
        largest: Parts = {}
        for name, part in (entry for parts in self.training.values() for entry in parts.items()):
            largest[name] = max(largest.get(name, part), part, key=lambda part: part.num_bytes)
        stages = {name: _document(parts) for name, parts in self.training.items()}
        (compose, pull_back), per_token = self.sweep_flops, plan.train_flops_per_token(self.config.sequence_length)
        return {
            "base": base,
            "compressed": {
                "hidden_size": plan.hidden_size,
                "intermediate_size": plan.intermediate_size,
                "parameters": plan.parameters,
                "keep_fraction": plan.keep_fraction,
            },
            "trainable": {"parameters": self.record_values + self.direct_values, "bytes": self.checkpoint_bytes},
            "flops": {"compose_per_step": compose, "pull_back_per_step": pull_back, "train_per_token": per_token},
            "moved": self.moved,
            "written_bytes_per_step": self.written_bytes_per_step,
            "communicated_bytes_per_step": self.communicated_bytes_per_step,
            "memory": _document(largest),
            "peak": self.peaks,
            "phases": {
                phase: {"components": _document(parts), "stages": stages if phase == TRAIN else {}}
                for phase, parts in self.phases.items()
            },
            "disk": self.disk,
            "alternatives": self.alternatives,
            "ranks": self.deployment.ranks,
        }


def _document(parts: Parts) -> dict[str, dict[str, Any]]:
    return {name: {"home": part.placement, "bytes": part.num_bytes} for name, part in parts.items()}
