"""What each part of a run holds at its peak, component by component, from configs alone. Needs no torch.

What is alive at a time makes a moment: training's moments follow each other, and its peak is the largest of them.
Homes are those of memory/place.py; the mapped base is file-backed memory, which no budget here counts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from pcscale.common import ledger
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES, HIDDEN_BUDGET_BYTES
from pcscale.common.units import parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.families.axes import FFN, RESIDUAL, VOCAB
from pcscale.families.plan import Plan, Shapes
from pcscale.memory import working
from pcscale.memory.place import FLOAT_BYTES, GATHERED, Part, Parts, Place
from pcscale.projection.costs import visit_flops
from pcscale.projection.layout import AHEAD, RecordFormat, overlap_bytes, record_layout
from pcscale.projection.owners import rounds

MIB = 2**20
LIBRARY_BYTES = {"calibrate": 330 * MIB, "train": 385 * MIB, "merge": 385 * MIB, "evaluate": 385 * MIB}
"""Anonymous memory of Python, torch and transformers with their threads, beside any tensor."""
BITSANDBYTES_BYTES = 40 * MIB
"""What importing bitsandbytes adds."""
DEEPSPEED_BYTES = 25 * MIB
"""What DeepSpeed and a process group add."""
CUDA_HOST_BYTES = 1536 * MIB
"""What CUDA's libraries add on the host. Assumed, not measured."""
CUDA_CONTEXT_BYTES = 640 * MIB
"""A device's context with the workspaces of its libraries. Assumed, not measured."""
ALLOCATOR_BYTES = {"calibrate": 64 * MIB, "evaluate": 32 * MIB, "sweep": 56 * MIB}
"""What the C library's allocator keeps of freed tensors within a moment. It keeps none above 32 MiB, so this does not
grow with the model; measured with `python -m benchmarks memory-plan`."""
PIECES_BYTES = 90 * MIB
"""The same of holes between the activations of a layer."""
PIECES_SHARE, SMALL_PIECES_SHARE = 0.34, 0.62
"""With those of all layers kept, besides, as a share of them; and where records of 4 bytes a value lie among them on
the same host."""
BIRTH_BYTES = 192 * MIB
"""The same of what gradients that are born in a step of one micro batch leave to the sweep."""
DEVICE_SLACK = 0.05
"""What a GPU's caching allocator loses between blocks, as a share of activations and temporaries. Assumed."""

ACTIVATIONS, LOGITS, HEAD_GRADIENT = "activations", "logits", "head gradient"
ON_ITS_WAY, IN_FLIGHT, TEMPORARIES = "base on its way", "base in flight", "sweep temporaries"
START, LAYER, SECOND_MOMENTS, BUFFERS = "start tensors", "layer", "second moments", "merge buffers"
SAID = "what the teacher says"
SCATTERED = "scattered gradients"
ALLOCATOR = "allocator"
WORKING_PARTS = (
    ACTIVATIONS,
    LOGITS,
    HEAD_GRADIENT,
    ON_ITS_WAY,
    IN_FLIGHT,
    TEMPORARIES,
    START,
    LAYER,
    SECOND_MOMENTS,
    BUFFERS,
    SAID,
    GATHERED,
    SCATTERED,
    ALLOCATOR,
)
"""What is measured together, as working memory."""
_PASSING = (ledger.GRADIENTS, GATHERED)
"""Not there in a whole step."""
_RECORD_HOMES = {"device": "device", "cpu": "pinned", "disk": "disk"}
_BASE_HOMES = {"device": "device", "cpu": "pinned", "zero": "host", "disk": "disk"}


def record_format(config: RunConfig) -> RecordFormat:
    """The format that a run keeps its records in."""
    aux_start = config.weight_decay > 0 and (config.base_precision == "int8" or config.rebuilds)
    return RecordFormat(config.record_dtype, config.moments, config.rank, aux_start)


def train_moments(plan: Plan, config: RunConfig, place: Place) -> dict[str, Parts]:
    """What one rank holds at the peak of each moment of training."""
    held, gradients = _held(plan, config, place), _gradients(plan, config, place)
    full = held | gradients
    before = full if config.gradient_accumulation_steps > 1 else held
    value = working.weight_bytes(config)
    activations = Part("device", working.activation_bytes(plan, config))
    head = Part("device", plan.sizes[VOCAB] * plan.sizes[RESIDUAL] * value)
    # Of both models the logits, and of the teacher's what the divergence keeps.
    teacher_logits = 0 if config.distill is None else 2 if config.distill.top_k is None else 1
    begins = {ACTIVATIONS: activations, LOGITS: _logits(plan, config, 3 + teacher_logits), HEAD_GRADIENT: head}
    ends = {ACTIVATIONS: Part("device", working.layer_activation_bytes(plan, config)), HEAD_GRADIENT: head}
    one_layer = Part("device", working.one_layer_bytes(plan.sizes, config, value))
    said = _said(plan, config, place)
    moments = {
        "start": _larger(_being_built(plan, config, place, held), held | _beginning(plan, config), place),
        "evaluate": before | {ACTIVATIONS: one_layer, LOGITS: _logits(plan, config, 2)},
        **({"teach": before | said | _teaching(plan, config, place)} if config.distill else {}),
        "forward": before | said | {ACTIVATIONS: activations, LOGITS: _logits(plan, config, 2 + teacher_logits)},
        "backward": _larger(before | said | begins, full | ends, place) | _scattered(plan, place),
        "sweep": full | _visit(plan, config, place),
        "checkpoint": before,
    }
    return {
        name: _settled(parts, place, _kept_by_allocator(name, config, activations.num_bytes))
        for name, parts in moments.items()
    }


def _said(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What a teacher says of all tokens of a step: last hidden states, or ids and logarithms."""
    if config.distill is None:
        return {}
    top_k, value = config.distill.top_k, 2 if place.on_gpu and config.bf16 else FLOAT_BYTES
    each = plan.base_sizes[RESIDUAL] * value if top_k is None else 2 * FLOAT_BYTES * top_k
    return {SAID: Part("host", config.tokens_per_step * each)}


def _teaching(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """The base's pass over the tokens of a step: a layer, a batch that goes through it, and what waits.

    From a cache there is none: what is read of it is file-backed.
    """
    if config.distill is not None and config.distill.cache is not None:
        return {}
    passing = _base_pass(plan, config, place, "teach")
    del passing[ledger.LIBRARIES], passing[ledger.CONTEXT]
    return passing | {LOGITS: _logits(plan, config, 2)}


def calibrate_parts(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What the layer-major pass over the base holds; scores by magnitude or at random need less."""
    moment = Part("device", max(plan.base_sizes[RESIDUAL] ** 2 * FLOAT_BYTES, _solved_bytes(plan, config)))
    return _settled(
        _base_pass(plan, config, place, "calibrate") | {SECOND_MOMENTS: moment}, place, ALLOCATOR_BYTES["calibrate"]
    )


def _solved_bytes(plan: Plan, config: RunConfig) -> int:
    """The second moments of one ffn, and its least squares in float64."""
    base, kept = plan.base_sizes[FFN], plan.sizes[FFN]
    of_moments = FLOAT_BYTES * (base * base + kept * base)
    return (of_moments + 2 * FLOAT_BYTES * (2 * kept * kept + 2 * working.rebuilt_values(plan))) * config.rebuilds


def evaluate_parts(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What evaluating holds: of the base, layer by layer, or of the merged model, whichever is more."""
    of_base = _base_pass(plan, config, place, "evaluate") | {LOGITS: _logits(plan, config, 3)}
    value = working.weight_bytes(config)
    of_merged = {
        **_libraries("evaluate", config, place),
        ledger.WEIGHTS: Part("device", plan.parameters * value),
        LOGITS: _logits(plan, config, 2),
        ACTIVATIONS: Part("device", working.one_layer_bytes(plan.sizes, config, value)),
    }
    if place.on_gpu:
        # Stock transformers load it into host memory, from where it goes to the device.
        of_merged[START] = Part("host", plan.parameters * value)
    return _settled(_larger(of_base, of_merged, place), place, ALLOCATOR_BYTES["evaluate"])


def merge_parts(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What merging holds, on the host alone."""
    buffers = Part("host", working.merge_need_bytes(plan, config.rank, config.rotates))
    return place.settle({**_libraries("merge", config, place), BUFFERS: buffers})


@dataclass(frozen=True)
class OwnedSizes:
    """What one rank owns. Units: bytes.

    Attributes:
        records: of all its records, those that are moments with them.
        largest: of its largest record.
        overlap: of the buffers that let their motion overlap with work.
        base: of its base weights, as they are kept.
        under_way: of the base weights that are worked on and fetched ahead at a time.
    """

    records: int
    largest: int
    moments: int
    overlap: int
    base: int
    under_way: int


def owned_sizes(plan: Plan, config: RunConfig, ranks: int) -> OwnedSizes:
    """Of the rank that holds most."""
    form, per_shape = record_format(config), []
    for planned, _ in plan.alike:
        layout = record_layout(planned, form)
        moments = sum(spec.num_bytes for name, spec in layout.items() if "." in name)
        record = sum(spec.num_bytes for spec in layout.values())
        base = working.kept_base_bytes(planned, plan.base_config, config)
        per_shape.append((planned.shapes, (record, moments, base)))
    return _owned_sizes(plan.shapes, tuple(per_shape), config.rank, ranks)


@lru_cache(maxsize=256)
def _owned_sizes(
    shapes: tuple[Shapes, ...], per_shape: tuple[tuple[Shapes, tuple[int, int, int]], ...], rank: int | None, ranks: int
) -> OwnedSizes:
    sizes_of, found = dict(per_shape), []
    for positions in _owned_shapes(shapes, rank, ranks):
        owned = [sizes_of[shapes[position]] for position in positions]
        records, moments, base = ([sizes[part] for sizes in owned] for part in range(3))
        under_way = max((sum(base[first : first + AHEAD + 1]) for first in range(len(base))), default=0)
        sizes = (sum(records), max(records, default=0), sum(moments), overlap_bytes(records))
        found.append(OwnedSizes(*sizes, sum(base), under_way))
    return max(found, key=lambda sizes: sizes.records)


@lru_cache(maxsize=256)
def _owned_shapes(shapes: tuple[Shapes, ...], rank: int | None, ranks: int) -> list[list[int]]:
    """By rank, the positions of the matrices that it owns, in the order of its visits."""
    turns = rounds({str(position): visit_flops(*pair, rank) for position, pair in enumerate(shapes)}, ranks)
    return [[int(name) for turn in turns if (name := turn[one]) is not None] for one in range(ranks)]


def _held(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What stays from the start of training to its end."""
    weights = {ledger.WEIGHTS: Part("device", plan.parameters * working.weight_bytes(config))}
    if place.zero is not None:
        weights = {name: part for name, part in _under_zero(plan, config, place).items() if name not in _PASSING}
    matrices = sum(math.prod(planned.shape) * count for planned, count in plan.alike)
    direct = plan.parameters - (matrices if config.method == "projected" else 0)
    # Moments, and a float32 value where the model has none whole.
    copies = 3 if config.bf16 or (place.zero is not None and place.zero.stage == 3) else 2
    held = _libraries("train", config, place) | weights
    if place.zero is not None and place.zero.stage == 3 and place.ranks > 1 and not place.on_gpu:
        # One more copy of this rank's part, which no attribute of DeepSpeed's leads to: nobody enters it.
        unseen = FLOAT_BYTES * -(-plan.parameters // place.ranks)
        held[ledger.LIBRARIES] = Part("host", held[ledger.LIBRARIES].num_bytes + unseen)
    if config.distill is not None and config.distill.top_k is None:
        value = 2 if place.on_gpu and config.bf16 else FLOAT_BYTES
        held[ledger.TEACHER] = Part("device", plan.base_sizes[VOCAB] * plan.base_sizes[RESIDUAL] * value)
    if config.distill is not None and config.distill.cache is not None:
        trained_on = config.max_steps * config.sequences_per_step * place.ranks
        held[ledger.TEACHER] = Part("host", CACHED_SEQUENCE_BYTES * trained_on)
    held[ledger.DIRECT] = Part("device", direct * copies * FLOAT_BYTES)
    if config.method != "projected":
        return held
    owned = owned_sizes(plan, config, place.ranks)
    overlap = 0 if config.residency == "device" else owned.overlap
    staging = overlap if config.residency == "disk" else 0
    if config.pinned_memory is not None:
        staging = min(staging, parse_bytes(config.pinned_memory))
    # Without a copy to a device one set of buffers does for both.
    buffers = staging if config.residency == "disk" and not place.on_gpu else overlap
    record_home = _RECORD_HOMES[config.residency]
    rotation = {ledger.ROTATION: Part("device", working.basis_bytes(plan))} if config.rotates else {}
    return (
        held
        | rotation
        | {
            ledger.FROZEN_BASE: Part(_BASE_HOMES[config.base_home], owned.base),
            ledger.RECORDS: Part(record_home, owned.records - owned.moments),
            ledger.MOMENTS: Part(record_home, owned.moments),
            ledger.RECORD_BUFFERS: Part("device", buffers),
            ledger.PINNED_BUFFERS: Part("pinned", staging),
        }
    )


def _gradients(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What is there besides, from a step's first backward pass to the end of its sweep."""
    if place.zero is not None:
        parts = _under_zero(plan, config, place)
        return {name: part for name, part in parts.items() if name in _PASSING}
    value = 2 if config.gradient_dtype == "bfloat16" else FLOAT_BYTES
    return {ledger.GRADIENTS: Part("pinned" if config.gradient_home == "cpu" else "device", plan.parameters * value)}


def _under_zero(plan: Plan, config: RunConfig, place: Place) -> Parts:
    assert place.zero is not None
    accumulates = config.gradient_accumulation_steps > 1
    largest = max(math.prod(planned.shape) for planned in plan.weights)
    return place.zero.parts(plan.parameters, working.weight_bytes(config), place.ranks, accumulates, largest)


def _scattered(plan: Plan, place: Place) -> Parts:
    """On processors the collective that scatters gradients copies them once more."""
    if place.zero is None or place.on_gpu:
        return {}
    return {SCATTERED: Part("host", place.zero.scattered_bytes(plan.parameters, place.ranks))}


def _being_built(plan: Plan, config: RunConfig, place: Place, held: Parts) -> Parts:
    """The start's tensors beside the model that copies them, before there are records."""
    built = {name: held[name] for name in (ledger.LIBRARIES, ledger.CONTEXT)}
    exact = config.rotates or config.rebuilds
    start = plan.parameters * (FLOAT_BYTES if exact else working.stored_bytes(plan.base_config))
    weights = plan.parameters * working.weight_bytes(config)
    if place.zero is not None:
        # Until DeepSpeed takes the model apart, every rank has all of it in host memory.
        return built | {START: Part("host", start + weights)}
    return built | {START: Part("host", start), ledger.WEIGHTS: Part("device", weights)}


def _beginning(plan: Plan, config: RunConfig) -> Parts:
    """What aux begins with of the largest matrix, its copy on the way into a record, and what rebuilds it."""
    if config.method != "projected" or not (config.base_precision == "int8" or config.rebuilds):
        return {}
    largest = max(math.prod(planned.shape) for planned, _ in plan.alike)
    rebuilt = working.rebuilt_values(plan) if config.rebuilds else 0
    return {START: Part("host", FLOAT_BYTES * (2 * largest + rebuilt))}


def _visit(plan: Plan, config: RunConfig, place: Place) -> Parts:
    """What the sweep holds at a time beside records, base and gradients."""
    if config.method != "projected":
        return {}
    form = record_format(config)
    value = 2 if place.on_gpu and config.bf16 else FLOAT_BYTES
    # Stored in the products' dtype, a base weight is multiplied where it lies.
    as_stored = config.base_precision == "stored" and working.stored_bytes(plan.base_config) == value
    matrices = [planned for planned, _ in plan.alike]
    flight = 0 if as_stored else max((working.block_bytes(planned, value) for planned in matrices), default=0)
    visits = max((working.visit_bytes(planned, form, value) for planned in matrices), default=0)
    return {
        ON_ITS_WAY: Part(
            "device", 0 if config.base_home == "device" else owned_sizes(plan, config, place.ranks).under_way
        ),
        IN_FLIGHT: Part("device", flight),
        # A dense S is scaled for a norm, and added to D.
        TEMPORARIES: Part("device", visits + 2 * working.basis_bytes(plan) * config.rotates),
    }


def _base_pass(plan: Plan, config: RunConfig, place: Place, phase: str) -> Parts:
    """One layer-major pass: a layer, one batch going through it, and the hidden states that wait on the host."""
    value = 2 if place.on_gpu and config.bf16 else FLOAT_BYTES
    tokens = {"calibrate": config.calibration_tokens, "teach": config.tokens_per_step}.get(phase, config.eval_tokens)
    hidden = min(HIDDEN_BUDGET_BYTES, tokens * plan.base_sizes[RESIDUAL] * value)
    layer = plan.base_layer_values * value
    mapped = not place.on_gpu and working.stored_bytes(plan.base_config) == value
    return {
        **_libraries(phase if phase in LIBRARY_BYTES else "train", config, place),
        ledger.HIDDEN: Part("host", hidden),
        LAYER: Part("device", 0 if mapped else layer),
        ACTIVATIONS: Part("device", working.one_layer_bytes(plan.base_sizes, config, value)),
    }


def _logits(plan: Plan, config: RunConfig, copies: int) -> Part:
    return Part("device", working.logit_bytes(plan, config, copies))


def _libraries(phase: str, config: RunConfig, place: Place) -> Parts:
    eight_bits = config.base_precision == "int8" or config.moments == "8bit"
    # Once imported, a library stays for the phases that follow.
    host = LIBRARY_BYTES[phase] + BITSANDBYTES_BYTES * (eight_bits and phase != "calibrate")
    host += DEEPSPEED_BYTES * (place.zero is not None) + CUDA_HOST_BYTES * place.on_gpu
    return {ledger.LIBRARIES: Part("host", host), ledger.CONTEXT: Part("device", CUDA_CONTEXT_BYTES)}


def _kept_by_allocator(moment: str, config: RunConfig, activation_bytes: int) -> int:
    alone = config.gradient_accumulation_steps == 1
    if moment in ("forward", "backward"):
        among_small = config.residency == "device" and config.record_dtype == "bfloat16"
        share = SMALL_PIECES_SHARE if among_small else PIECES_SHARE
        pieces = PIECES_BYTES + int(share * activation_bytes) * (not config.gradient_checkpointing)
        return min(pieces, BIRTH_BYTES) if alone else pieces
    return ALLOCATOR_BYTES.get(moment, 0) + BIRTH_BYTES * (alone and moment == "sweep")


def _settled(parts: Parts, place: Place, kept_bytes: int) -> Parts:
    """With what allocators keep, and everything at home."""
    on_device = sum(parts[name].num_bytes for name in WORKING_PARTS if name in parts and parts[name].home == "device")
    slack = Part("device", int(DEVICE_SLACK * on_device)) if place.on_gpu else Part("host", kept_bytes)
    return place.settle(parts | {ALLOCATOR: slack})


def _larger(one: Parts, other: Parts, place: Place) -> Parts:
    """Of two states that follow each other, the one that takes more; of each memory its own where there are two."""
    if not place.on_gpu:
        return max(one, other, key=lambda parts: sum(p.num_bytes for p in parts.values() if p.home != "disk"))
    found: Parts = {}
    for homes in (("device",), ("host", "pinned"), ("disk",)):
        there = ({name: part for name, part in parts.items() if part.home in homes} for parts in (one, other))
        found |= max(there, key=lambda parts: sum(part.num_bytes for part in parts.values()))
    return found
