"""The memory of each phase and each stage of training at its peak, part by part, from configs alone. Needs no torch.

Everything that is alive at a time makes a stage: training's stages follow each other, and its peak is the largest.
Placements are those of memory/deployment.py; the mapped base is file-backed memory, which no budget here counts.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from pcscale.common import ledger
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES, HIDDEN_BUDGET_BYTES, LOGIT_CHUNK_VALUES
from pcscale.common.units import parse_bytes
from pcscale.families.axes import FFN, RESIDUAL, VOCAB, Sizes
from pcscale.memory import working
from pcscale.memory.deployment import FLOAT_BYTES, GATHERED, Part, Parts, total
from pcscale.memory.shared import SharedSizes, shared
from pcscale.projection.layout import record_format

MIB = 2**20
LIBRARY_BYTES = {"calibrate": 330 * MIB, "train": 385 * MIB, "merge": 385 * MIB, "evaluate": 385 * MIB}
"""Anonymous memory of Python, torch and transformers with their threads, beside any tensor."""
BITSANDBYTES_BYTES, DEEPSPEED_BYTES = 40 * MIB, 25 * MIB
"""Anonymous memory that importing bitsandbytes adds, and DeepSpeed with a process group."""
CUDA_HOST_BYTES, CUDA_CONTEXT_BYTES = 1536 * MIB, 640 * MIB
"""Host memory that CUDA's libraries add, and a device's context with their workspaces. Assumed, not measured."""
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
_PLACEMENTS = {"device": "device", "cpu": "pinned", "zero": "host", "disk": "disk"}


def working_parts(parts: Parts) -> list[Part]:
    """The parts that are measured together, as working memory."""
    return [part for name, part in parts.items() if name not in ledger.COMPONENTS]


@dataclass(frozen=True)
class Stages(SharedSizes):
    """The memory of one rank of a run, by phase and by stage of training."""

    @cached_property
    def training(self) -> dict[str, Parts]:
        """The parts of each stage of training at its peak."""
        plan, config, distill, zero = self.plan, self.config, self.config.distill, self.deployment.zero
        full = self._held | {name: part for name, part in self._model.items() if name in _PASSING}
        before = full if config.gradient_accumulation_steps > 1 else self._held
        activations = Part("device", working.activation_bytes(plan, config))
        layer = Part("device", working.layer_activation_bytes(plan, config))
        head = {HEAD_GRADIENT: Part("device", plan.sizes[VOCAB] * plan.sizes[RESIDUAL] * self.weight_bytes)}
        taught, teacher_logits = before, 0
        if distill is not None:
            # The teacher's last hidden states, or ids and logarithms, and of its logits those the divergence keeps.
            hidden, kept = plan.base_sizes[RESIDUAL] * self.product_bytes, distill.top_k
            targets = config.tokens_per_step * (hidden if kept is None else 2 * FLOAT_BYTES * kept)
            taught, teacher_logits = before | {TARGETS: Part("host", targets)}, 2 if kept is None else 1
        begins = taught | {ACTIVATIONS: activations, LOGITS: self._logits(3 + teacher_logits)} | head
        stages = {
            "start": self._start,
            "evaluate": before | self._one_layer(plan.sizes, self.weight_bytes) | {LOGITS: self._logits(2)},
        }
        if distill is not None:
            # From a cache there is no pass over the base: what is read of it is file-backed.
            passing = self._layer_major(config.tokens_per_step) | {LOGITS: self._logits(2)}
            stages["teach"] = taught | (passing if distill.cache is None else {})
        stages |= {
            "forward": taught | {ACTIVATIONS: activations, LOGITS: self._logits(2 + teacher_logits)},
            "backward": self._larger(begins, full | {ACTIVATIONS: layer} | head),
            "sweep": full | self._visit,
            "checkpoint": before,
        }
        if zero is not None and not self.deployment.on_gpu:
            # On processors the collective makes a copy of gradients to scatter them.
            copied = zero.scattered_bytes(plan.parameters, self.deployment.ranks)
            stages["backward"][SCATTERED] = Part("host", copied)
        kept = {name: self._kept_by_allocator(name, activations.num_bytes) for name in stages}
        return {name: self._settled(parts, kept[name]) for name, parts in stages.items()}

    @shared("bf16", "per_device_train_batch_size", "base_precision", "moments")
    def calibrate(self) -> Parts:
        """The layer-major pass over the base; scores by magnitude or at random need less."""
        moments, base, kept = self.plan.base_sizes[RESIDUAL] ** 2, self.plan.base_sizes[FFN], self.plan.sizes[FFN]
        # Those of one ffn, and its least squares in float64.
        solved = base * base + kept * base + 2 * (2 * kept * kept + 2 * self.rebuilt_values)
        held = FLOAT_BYTES * max(moments, solved * self.config.rebuilds)
        parts = self._libraries("calibrate") | self._layer_major(self.config.calibration_tokens)
        return self._settled(parts | {SECOND_MOMENTS: Part("device", held)}, ALLOCATOR_BYTES["calibrate"])

    @shared("bf16", "per_device_train_batch_size", "base_precision", "moments")
    def evaluate(self) -> Parts:
        """The evaluation of the base, layer by layer, or of the merged model, whichever holds more."""
        libraries, merged = self._libraries("evaluate"), self.plan.parameters * self.weight_bytes
        of_base = libraries | self._layer_major(self.config.eval_tokens) | {LOGITS: self._logits(3)}
        of_merged = libraries | {ledger.WEIGHTS: Part("device", merged), LOGITS: self._logits(2)}
        of_merged |= self._one_layer(self.plan.sizes, self.weight_bytes)
        if self.deployment.on_gpu:
            # Stock transformers load it into host memory, from where it goes to the device.
            of_merged[START] = Part("host", merged)
        return self._settled(self._larger(of_base, of_merged), ALLOCATOR_BYTES["evaluate"])

    @shared("base_precision", "moments")
    def merge(self) -> Parts:
        """The merge, on the host alone."""
        buffers = working.merge_need_bytes(self.plan, self.config.rank, self.config.rotates)
        return self.deployment.settle(self._libraries("merge") | {BUFFERS: Part("host", buffers)})

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
        held = self._libraries("train") | {name: part for name, part in self._model.items() if name not in _PASSING}
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
        overlap = owned.overlap * (config.residency != "device")
        staging = overlap * (config.residency == "disk")
        if config.pinned_memory is not None:
            staging = min(staging, parse_bytes(config.pinned_memory))
        # Without a copy to a device one set of buffers does for both.
        buffers = staging if config.residency == "disk" and not self.deployment.on_gpu else overlap
        placement = _PLACEMENTS[config.residency]
        return {
            **({ledger.ROTATION: Part("device", self.basis_bytes)} if config.rotates else {}),
            ledger.FROZEN_BASE: Part(_PLACEMENTS[config.base_home], owned.base),
            ledger.RECORDS: Part(placement, owned.records - owned.moments),
            ledger.MOMENTS: Part(placement, owned.moments),
            ledger.RECORD_BUFFERS: Part("device", buffers),
            ledger.PINNED_BUFFERS: Part("pinned", staging),
        }

    @property
    def _start(self) -> Parts:
        """The start's tensors beside the model that copies them; or later, beside all that is held, where aux of the
        largest matrix begins, its copy on the way into a record, and what rebuilds it."""
        plan, config = self.plan, self.config
        start = plan.parameters * (FLOAT_BYTES if config.rotates or config.rebuilds else self.stored_bytes)
        weights = plan.parameters * self.weight_bytes
        built = {name: self._held[name] for name in (ledger.LIBRARIES, ledger.CONTEXT)}
        if self.deployment.zero is None:
            built |= {START: Part("host", start), ledger.WEIGHTS: Part("device", weights)}
        else:
            # Until DeepSpeed takes the model apart, every rank has all of it in host memory.
            built[START] = Part("host", start + weights)
        begun = self._held
        if self.projects and (config.base_precision == "int8" or config.rebuilds):
            largest = max(math.prod(planned.shape) for planned, _ in plan.alike)
            begun = begun | {START: Part("host", FLOAT_BYTES * (2 * largest + self.rebuilt_values))}
        return self._larger(built, begun)

    @shared("bf16", "base_precision", "record_dtype", "moments", "base_home")
    def _visit(self) -> Parts:
        """The sweep's own parts, beside records, base and gradients."""
        if not self.projects:
            return {}
        form, value = record_format(self.config), self.product_bytes
        # Stored in the products' dtype, a base weight is multiplied where it lies.
        as_stored = self.config.base_precision == "stored" and self.stored_bytes == value
        matrices = [planned for planned, _ in self.plan.alike]
        blocks = [working.block_rows(planned) * planned.base_shape[1] * value for planned in matrices]
        visits = [working.visit_bytes(planned, form, value) for planned in matrices]
        return {
            ON_ITS_WAY: Part("device", 0 if self.config.base_home == "device" else self.owned.under_way),
            IN_FLIGHT: Part("device", 0 if as_stored else max(blocks)),
            # A dense S is scaled for a norm, and added to D.
            TEMPORARIES: Part("device", max(visits) + 2 * self.basis_bytes),
        }

    # Parts of every phase.

    def _one_layer(self, sizes: Sizes, value_bytes: int) -> Parts:
        """A layer's forward without a backward pass: the ffn's activations beside the residual stream's."""
        values = working.micro_batch_tokens(self.config) * (3 * sizes[FFN] + 4 * sizes[RESIDUAL])
        return {ACTIVATIONS: Part("device", values * value_bytes)}

    def _logits(self, copies: int) -> Part:
        """Float32 copies of one chunk of logits."""
        values = min(working.micro_batch_tokens(self.config) * self.plan.sizes[VOCAB], LOGIT_CHUNK_VALUES)
        return Part("device", copies * values * FLOAT_BYTES)

    def _layer_major(self, tokens: int) -> Parts:
        """One pass over the base: a layer, one batch going through it, and the hidden states that wait on the host."""
        plan, value = self.plan, self.product_bytes
        mapped = not self.deployment.on_gpu and self.stored_bytes == value
        return {
            ledger.HIDDEN: Part("host", min(HIDDEN_BUDGET_BYTES, tokens * plan.base_sizes[RESIDUAL] * value)),
            LAYER: Part("device", 0 if mapped else plan.base_layer_values * value),
            **self._one_layer(plan.base_sizes, value),
        }

    def _libraries(self, phase: str) -> Parts:
        eight_bits = self.config.base_precision == "int8" or self.config.moments == "8bit"
        # Once imported, a library stays for the phases that follow.
        host = LIBRARY_BYTES[phase] + BITSANDBYTES_BYTES * (eight_bits and phase != "calibrate")
        host += DEEPSPEED_BYTES * (self.deployment.zero is not None) + CUDA_HOST_BYTES * self.deployment.on_gpu
        return {ledger.LIBRARIES: Part("host", host), ledger.CONTEXT: Part("device", CUDA_CONTEXT_BYTES)}

    def _kept_by_allocator(self, stage: str, activation_bytes: int) -> int:
        config, alone = self.config, self.config.gradient_accumulation_steps == 1
        if stage in ("forward", "backward"):
            among_small = config.residency == "device" and config.record_dtype == "bfloat16"
            share = SMALL_PIECES_SHARE if among_small else PIECES_SHARE
            pieces = PIECES_BYTES + int(share * activation_bytes) * (not config.gradient_checkpointing)
            return min(pieces, BIRTH_BYTES) if alone else pieces
        return ALLOCATOR_BYTES.get(stage, 0) + BIRTH_BYTES * (alone and stage == "sweep")

    def _settled(self, parts: Parts, kept_bytes: int) -> Parts:
        """The parts with what allocators keep, each at its placement."""
        if self.deployment.on_gpu:
            return parts | {ALLOCATOR: Part("device", int(DEVICE_SLACK * total(working_parts(parts), "device")))}
        return self.deployment.settle(parts | {ALLOCATOR: Part("host", kept_bytes)})

    def _larger(self, one: Parts, other: Parts) -> Parts:
        """The larger of two states that follow each other; where there are two memories, of each memory its own."""
        if not self.deployment.on_gpu:
            return max(one, other, key=lambda parts: total(parts.values(), "device", "host", "pinned"))
        found: Parts = {}
        for placements in (("device",), ("host", "pinned"), ("disk",)):
            larger = max(one, other, key=lambda parts: total(parts.values(), *placements))
            found |= {name: part for name, part in larger.items() if part.placement in placements}
        return found
