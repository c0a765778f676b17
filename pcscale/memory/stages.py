"""The memory of each phase and each stage of training at its peak, part by part, from configs alone. Needs no torch.

Everything that is alive at a time makes a stage: training's stages follow each other, and its peak is the largest.
Placements are those of memory/deployment.py; the mapped base is file-backed memory, which no budget here counts.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from pcscale.common import ledger
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES, HIDDEN_BUDGET_BYTES
from pcscale.common.units import parse_bytes
from pcscale.families.axes import FFN, RESIDUAL, VOCAB
from pcscale.memory import working
from pcscale.memory.deployment import FLOAT_BYTES, GATHERED, Part, Parts, total
from pcscale.memory.shared import SharedSizes, shared
from pcscale.projection.layout import record_format

MIB = 2**20
LIBRARY_BYTES = {"calibrate": 330 * MIB, "train": 385 * MIB, "merge": 385 * MIB, "evaluate": 385 * MIB}
"""Anonymous memory of Python, torch and transformers with their threads, beside any tensor."""
BITSANDBYTES_BYTES = 40 * MIB
"""Anonymous memory that importing bitsandbytes adds."""
DEEPSPEED_BYTES = 25 * MIB
"""Anonymous memory that DeepSpeed and a process group add."""
CUDA_HOST_BYTES = 1536 * MIB
"""Host memory that CUDA's libraries add. Assumed, not measured."""
CUDA_CONTEXT_BYTES = 640 * MIB
"""A device's context with the workspaces of its libraries. Assumed, not measured."""
ALLOCATOR_BYTES = {"calibrate": 64 * MIB, "evaluate": 32 * MIB, "sweep": 56 * MIB}
"""Freed tensors that the C library's allocator keeps within a stage. It keeps none above 32 MiB, so this does not grow
with the model; measured with `python -m benchmarks memory-plan`."""
PIECES_BYTES = 90 * MIB
"""Holes that the allocator keeps between the activations of a layer."""
PIECES_SHARE, SMALL_PIECES_SHARE = 0.34, 0.62
"""Holes between the activations of all layers, as a share of them: by themselves, and where records of 4 bytes a value
lie among them on the same host."""
BIRTH_BYTES = 192 * MIB
"""Holes that gradients leave to the sweep when they are born in a step of one micro batch."""
DEVICE_SLACK = 0.05
"""Loss of a GPU's caching allocator between blocks, as a share of activations and temporaries. Assumed."""

ACTIVATIONS, LOGITS, HEAD_GRADIENT = "activations", "logits", "head gradient"
ON_ITS_WAY, IN_FLIGHT, TEMPORARIES = "base on its way", "base in flight", "sweep temporaries"
START, LAYER, SECOND_MOMENTS, BUFFERS = "start tensors", "layer", "second moments", "merge buffers"
TARGETS, SCATTERED, ALLOCATOR = "teacher targets", "scattered gradients", "allocator"
_PASSING = (ledger.GRADIENTS, GATHERED)
"""Parts of the compressed model that are not there in a whole step."""
_RECORD_PLACEMENTS = {"device": "device", "cpu": "pinned", "disk": "disk"}
_BASE_PLACEMENTS = {"device": "device", "cpu": "pinned", "zero": "host", "disk": "disk"}


def working_parts(parts: Parts) -> list[Part]:
    """The parts that are measured together, as working memory."""
    return [part for name, part in parts.items() if name not in ledger.COMPONENTS]


@dataclass(frozen=True)
class Stages(SharedSizes):
    """The memory of one rank of a run, by phase and by stage of training."""

    @cached_property
    def training(self) -> dict[str, Parts]:
        """The parts of each stage of training at its peak."""
        held = self._held
        full = held | {name: part for name, part in self._model.items() if name in _PASSING}
        before = full if self.config.gradient_accumulation_steps > 1 else held
        activations = Part("device", working.activation_bytes(self.plan, self.config))
        layer = Part("device", working.layer_activation_bytes(self.plan, self.config))
        head = Part("device", self.plan.sizes[VOCAB] * self.plan.sizes[RESIDUAL] * self.weight_bytes)
        distill = self.config.distill
        # Logits of both models, and those of the teacher that the divergence keeps.
        teacher_logits = 0 if distill is None else 2 if distill.top_k is None else 1
        begins = {ACTIVATIONS: activations, LOGITS: self._logits(3 + teacher_logits), HEAD_GRADIENT: head}
        ends = {ACTIVATIONS: layer, HEAD_GRADIENT: head}
        targets = self._targets
        stages = {
            "start": self._larger(self._being_built, held | self._beginning),
            "evaluate": before | {ACTIVATIONS: self._one_layer(self.weight_bytes), LOGITS: self._logits(2)},
            **({"teach": before | targets | self._teaching} if distill else {}),
            "forward": before | targets | {ACTIVATIONS: activations, LOGITS: self._logits(2 + teacher_logits)},
            "backward": self._larger(before | targets | begins, full | ends) | self._scattered,
            "sweep": full | self._visit,
            "checkpoint": before,
        }
        return {
            name: self._settled(parts, self._kept_by_allocator(name, activations.num_bytes))
            for name, parts in stages.items()
        }

    @shared("bf16", "per_device_train_batch_size", "base_precision", "moments")
    def calibrate(self) -> Parts:
        """The layer-major pass over the base; scores by magnitude or at random need less."""
        moments, base, kept = self.plan.base_sizes[RESIDUAL] ** 2, self.plan.base_sizes[FFN], self.plan.sizes[FFN]
        # Those of one ffn, and its least squares in float64.
        solved = base * base + kept * base + 2 * (2 * kept * kept + 2 * self.rebuilt_values)
        held = FLOAT_BYTES * max(moments, solved * self.config.rebuilds)
        parts = self._base_pass("calibrate") | {SECOND_MOMENTS: Part("device", held)}
        return self._settled(parts, ALLOCATOR_BYTES["calibrate"])

    @shared("bf16", "per_device_train_batch_size", "base_precision", "moments")
    def evaluate(self) -> Parts:
        """The evaluation of the base, layer by layer, or of the merged model, whichever holds more."""
        merged = Part("device", self.plan.parameters * self.weight_bytes)
        of_base = self._base_pass("evaluate") | {LOGITS: self._logits(3)}
        of_merged = {
            **self._libraries("evaluate"),
            ledger.WEIGHTS: merged,
            LOGITS: self._logits(2),
            ACTIVATIONS: self._one_layer(self.weight_bytes),
        }
        if self.deployment.on_gpu:
            # Stock transformers load it into host memory, from where it goes to the device.
            of_merged[START] = Part("host", merged.num_bytes)
        return self._settled(self._larger(of_base, of_merged), ALLOCATOR_BYTES["evaluate"])

    @shared("base_precision", "moments")
    def merge(self) -> Parts:
        """The merge, on the host alone."""
        buffers = working.merge_need_bytes(self.plan, self.config.rank, self.config.rotates)
        return self.deployment.settle({**self._libraries("merge"), BUFFERS: Part("host", buffers)})

    # Parts of training.

    @shared("bf16", "gradient_accumulation_steps", "gradient_home")
    def _model(self) -> Parts:
        """Weights and gradients of the compressed model, with what ZeRO keeps of them."""
        plan, config, zero = self.plan, self.config, self.deployment.zero
        if zero is not None:
            largest = max(math.prod(planned.shape) for planned in plan.weights)
            accumulates = config.gradient_accumulation_steps > 1
            return zero.parts(plan.parameters, self.weight_bytes, self.deployment.ranks, accumulates, largest)
        value = 2 if config.gradient_dtype == "bfloat16" else FLOAT_BYTES
        placement = "pinned" if config.gradient_home == "cpu" else "device"
        return {
            ledger.WEIGHTS: Part("device", plan.parameters * self.weight_bytes),
            ledger.GRADIENTS: Part(placement, plan.parameters * value),
        }

    @cached_property
    def _held(self) -> Parts:
        """Parts that stay from the start of training to its end."""
        plan, config, deployment = self.plan, self.config, self.deployment
        held = self._libraries("train")
        held |= {name: part for name, part in self._model.items() if name not in _PASSING}
        whole = deployment.zero is not None and deployment.zero.stage == 3
        if whole and deployment.ranks > 1 and not deployment.on_gpu:
            # One more copy of this rank's part, which no attribute of DeepSpeed's leads to: nobody enters it.
            unseen = FLOAT_BYTES * -(-plan.parameters // deployment.ranks)
            held[ledger.LIBRARIES] = Part("host", held[ledger.LIBRARIES].num_bytes + unseen)
        if config.distill is not None and config.distill.top_k is None:
            head = plan.base_sizes[VOCAB] * plan.base_sizes[RESIDUAL] * self.product_bytes
            held[ledger.TEACHER] = Part("device", head)
        if config.distill is not None and config.distill.cache is not None:
            trained_on = config.max_steps * config.sequences_per_step * deployment.ranks
            held[ledger.TEACHER] = Part("host", CACHED_SEQUENCE_BYTES * trained_on)
        # Moments, and a float32 value where the model has none whole.
        copies = 3 if config.bf16 or whole else 2
        held[ledger.DIRECT] = Part("device", self.direct_values * copies * FLOAT_BYTES)
        return held | self._state if self.projects else held

    @shared("base_precision", "record_dtype", "moments", "residency", "base_home")
    def _state(self) -> Parts:
        """Base, records and their buffers."""
        config, owned = self.config, self.owned
        overlap = 0 if config.residency == "device" else owned.overlap
        staging = overlap if config.residency == "disk" else 0
        if config.pinned_memory is not None:
            staging = min(staging, parse_bytes(config.pinned_memory))
        # Without a copy to a device one set of buffers does for both.
        buffers = staging if config.residency == "disk" and not self.deployment.on_gpu else overlap
        placement = _RECORD_PLACEMENTS[config.residency]
        return {
            **({ledger.ROTATION: Part("device", self.basis_bytes)} if config.rotates else {}),
            ledger.FROZEN_BASE: Part(_BASE_PLACEMENTS[config.base_home], owned.base),
            ledger.RECORDS: Part(placement, owned.records - owned.moments),
            ledger.MOMENTS: Part(placement, owned.moments),
            ledger.RECORD_BUFFERS: Part("device", buffers),
            ledger.PINNED_BUFFERS: Part("pinned", staging),
        }

    @property
    def _being_built(self) -> Parts:
        """The start's tensors beside the model that copies them, before there are records."""
        built = {name: self._held[name] for name in (ledger.LIBRARIES, ledger.CONTEXT)}
        exact = self.config.rotates or self.config.rebuilds
        start = self.plan.parameters * (FLOAT_BYTES if exact else self.stored_bytes)
        weights = self.plan.parameters * self.weight_bytes
        if self.deployment.zero is not None:
            # Until DeepSpeed takes the model apart, every rank has all of it in host memory.
            return built | {START: Part("host", start + weights)}
        return built | {START: Part("host", start), ledger.WEIGHTS: Part("device", weights)}

    @shared("base_precision")
    def _beginning(self) -> Parts:
        """Where aux begins for the largest matrix, its copy on the way into a record, and what rebuilds it."""
        if not self.projects or not (self.config.base_precision == "int8" or self.config.rebuilds):
            return {}
        largest = max(math.prod(planned.shape) for planned, _ in self.plan.alike)
        return {START: Part("host", FLOAT_BYTES * (2 * largest + self.rebuilt_values))}

    @property
    def _targets(self) -> Parts:
        """A teacher's targets for all tokens of a step: last hidden states, or ids and logarithms."""
        if self.config.distill is None:
            return {}
        top_k = self.config.distill.top_k
        each = self.plan.base_sizes[RESIDUAL] * self.product_bytes if top_k is None else 2 * FLOAT_BYTES * top_k
        return {TARGETS: Part("host", self.config.tokens_per_step * each)}

    @property
    def _teaching(self) -> Parts:
        """The base's pass over the tokens of a step: a layer, a batch that goes through it, and what waits.

        From a cache there is none: what is read of it is file-backed.
        """
        if self.config.distill is not None and self.config.distill.cache is not None:
            return {}
        passing = self._base_pass("teach")
        del passing[ledger.LIBRARIES], passing[ledger.CONTEXT]
        return passing | {LOGITS: self._logits(2)}

    @property
    def _scattered(self) -> Parts:
        """The copy of gradients that the collective makes on processors to scatter them."""
        deployment = self.deployment
        if deployment.zero is None or deployment.on_gpu:
            return {}
        return {SCATTERED: Part("host", deployment.zero.scattered_bytes(self.plan.parameters, deployment.ranks))}

    @shared("bf16", "base_precision", "record_dtype", "moments", "base_home")
    def _visit(self) -> Parts:
        """The sweep's own parts, beside records, base and gradients."""
        if not self.projects:
            return {}
        form, value = record_format(self.config), self.product_bytes
        # Stored in the products' dtype, a base weight is multiplied where it lies.
        as_stored = self.config.base_precision == "stored" and self.stored_bytes == value
        matrices = [planned for planned, _ in self.plan.alike]
        flight = 0 if as_stored else max((working.block_bytes(planned, value) for planned in matrices), default=0)
        visits = max((working.visit_bytes(planned, form, value) for planned in matrices), default=0)
        return {
            ON_ITS_WAY: Part("device", 0 if self.config.base_home == "device" else self.owned.under_way),
            IN_FLIGHT: Part("device", flight),
            # A dense S is scaled for a norm, and added to D.
            TEMPORARIES: Part("device", visits + 2 * self.basis_bytes),
        }

    # Parts of every phase.

    def _one_layer(self, value_bytes: int) -> Part:
        return Part("device", working.one_layer_bytes(self.plan.sizes, self.config, value_bytes))

    def _logits(self, copies: int) -> Part:
        return Part("device", working.logit_bytes(self.plan, self.config, copies))

    def _base_pass(self, phase: str) -> Parts:
        """One layer-major pass: a layer, one batch going through it, and the hidden states that wait on the host."""
        plan, config, value = self.plan, self.config, self.product_bytes
        tokens = {"calibrate": config.calibration_tokens, "teach": config.tokens_per_step}
        hidden = tokens.get(phase, config.eval_tokens) * plan.base_sizes[RESIDUAL] * value
        mapped = not self.deployment.on_gpu and self.stored_bytes == value
        return {
            **self._libraries(phase),
            ledger.HIDDEN: Part("host", min(HIDDEN_BUDGET_BYTES, hidden)),
            LAYER: Part("device", 0 if mapped else plan.base_layer_values * value),
            ACTIVATIONS: Part("device", working.one_layer_bytes(plan.base_sizes, config, value)),
        }

    def _libraries(self, phase: str) -> Parts:
        eight_bits = self.config.base_precision == "int8" or self.config.moments == "8bit"
        # Once imported, a library stays for the phases that follow.
        host = LIBRARY_BYTES.get(phase, LIBRARY_BYTES["train"])
        host += BITSANDBYTES_BYTES * (eight_bits and phase != "calibrate")
        host += DEEPSPEED_BYTES * (self.deployment.zero is not None) + CUDA_HOST_BYTES * self.deployment.on_gpu
        return {ledger.LIBRARIES: Part("host", host), ledger.CONTEXT: Part("device", CUDA_CONTEXT_BYTES)}

    def _kept_by_allocator(self, stage: str, activation_bytes: int) -> int:
        config = self.config
        alone = config.gradient_accumulation_steps == 1
        if stage in ("forward", "backward"):
            among_small = config.residency == "device" and config.record_dtype == "bfloat16"
            share = SMALL_PIECES_SHARE if among_small else PIECES_SHARE
            pieces = PIECES_BYTES + int(share * activation_bytes) * (not config.gradient_checkpointing)
            return min(pieces, BIRTH_BYTES) if alone else pieces
        return ALLOCATOR_BYTES.get(stage, 0) + BIRTH_BYTES * (alone and stage == "sweep")

    def _settled(self, parts: Parts, kept_bytes: int) -> Parts:
        """The parts with what allocators keep, each at its placement."""
        if self.deployment.on_gpu:
            lost = DEVICE_SLACK * total(working_parts(parts), "device")
            return parts | {ALLOCATOR: Part("device", int(lost))}
        return self.deployment.settle(parts | {ALLOCATOR: Part("host", kept_bytes)})

    def _larger(self, one: Parts, other: Parts) -> Parts:
        """The larger of two states that follow each other; where there are two memories, of each memory its own."""
        if not self.deployment.on_gpu:
            return max(one, other, key=lambda parts: total(parts.values(), "device", "host", "pinned"))
        found: Parts = {}
        for placements in (("device",), ("host", "pinned"), ("disk",)):
            there = (
                {name: part for name, part in parts.items() if part.placement in placements} for parts in (one, other)
            )
            found |= max(there, key=lambda parts: sum(part.num_bytes for part in parts.values()))
        return found
