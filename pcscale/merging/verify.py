"""The checks of a checkpoint and its merged model: bytes, one step, and logits."""

import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.families.hf_config import read_config, stored_dtype
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.merging.merge import trained_weights
from pcscale.model.compressed import build_compressed, load_stock
from pcscale.projection import algebra
from pcscale.projection.checkpoint import DIRECT, UPDATES, read_fixed
from pcscale.projection.compression import Compression
from pcscale.projection.layout import AUX, DELTA_IN, DELTA_OUT, MOMENTS
from pcscale.projection.record import MatrixRecord, Moment, Trained, start_of
from pcscale.projection.residency import State
from pcscale.projection.starts import Start
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.blockwise import Blockwise
from pcscale.storage.reader import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_TOLERANCE = 1e-2
"""Allowed share of a step: the two steps round differently, and Adam divides by moments that may be tiny."""
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Allowed share of the largest logit, for the rounding of the merged dtype."""
_PROBE_RATE = 1e-3
_PROBE_TOKENS = 64
_STEP_CHECK = "streamed step, largest difference from the in-memory one (of the change)"


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed


def check_bytes(checkpoint: Path, base: MappedBase) -> tuple[Manifest, list[Check]]:
    """Hash every file of the checkpoint and every base weight again.

    Raises:
        RequestError: the first one that differs.
    """
    manifest = Manifest.read(checkpoint)
    for name in manifest.files:
        manifest.file(checkpoint, name)
    base.expect(manifest.base_fingerprints)
    base.check_all()
    return manifest, [Check("checkpoint files changed", 0, 0), Check("base weights changed", 0, 0)]


def check_models(checkpoint: Path, manifest: Manifest, base: MappedBase, merged: Path | None) -> list[Check]:
    """Compare merged with live logits (where there is a merged model), and a streamed step with an in-memory one.

    Memory: the compressed model in float32, twice with `merged`, and the records of one matrix of each shape.
    """
    with trained_weights(checkpoint, manifest, base, checkpoint) as weights:
        checks = [_check_logits(_live(checkpoint, manifest, weights), merged, manifest.step)] if merged else []
        return [*checks, _check_step(checkpoint, manifest, weights)]


@torch.no_grad()
def _live(checkpoint: Path, manifest: Manifest, weights: MappedBase | Int8Base) -> "PreTrainedModel":
    """The compressed model in float32, composed from the checkpoint."""
    outer = read_tensors(manifest.file(checkpoint, OUTER_NAME))
    tensors: dict[str, torch.Tensor] = {}
    for planned in manifest.plan.weights:
        if record_file(planned.name) in manifest.files:
            record = _record(checkpoint, manifest, planned)
            tensors[planned.name] = algebra.compose(
                weights.weight(planned.name).rows(torch.float32), record.projection(torch.float32)
            )
        else:
            tensors[planned.name] = outer[DIRECT + planned.name]
    return build_compressed(manifest.plan, tensors, torch.device("cpu"), torch.float32).eval()


def _record(checkpoint: Path, manifest: Manifest, planned: PlannedWeight) -> MatrixRecord:
    tensors = read_tensors(manifest.file(checkpoint, record_file(planned.name)))
    return MatrixRecord.of(planned, read_fixed(checkpoint, manifest), tensors)


@torch.no_grad()
def _check_logits(live: "PreTrainedModel", merged: Path, seed: int) -> Check:
    """Compare both models in float32, on random tokens."""
    model = load_stock(merged, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(live.config.vocab_size, (1, _PROBE_TOKENS), generator=generator)
    expected_BTV, found_BTV = live(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
    difference = ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()
    tolerance = LOGIT_TOLERANCE[stored_dtype(read_config(merged))]
    return Check("merged logits, largest difference from live ones (of the largest)", difference, tolerance)


@dataclass(frozen=True)
class _PartOfPlan(Plan):
    """The plan of a model that has only some of the weights."""

    part: tuple[PlannedWeight, ...] = ()

    @cached_property
    def weights(self) -> tuple[PlannedWeight, ...]:
        return self.part


def _check_step(checkpoint: Path, manifest: Manifest, weights: MappedBase | Int8Base) -> Check:
    """Compare a step of the sweep with one of autograd and torch's AdamW, for one matrix of each shape.

    Both begin with the checkpoint's values and moments, take the same random gradient, and go on in float32, so that
    the rounding of records does not count.
    """
    plan = manifest.plan
    with_record = (planned for planned in plan.matrices if record_file(planned.name) in manifest.files)
    probed = tuple({planned.shapes: planned for planned in with_record}.values())
    if not probed:
        return Check(_STEP_CHECK, 0, STEP_TOLERANCE)
    generator = torch.Generator().manual_seed(manifest.step)
    parameters = {planned.name: nn.Parameter(torch.zeros(planned.shape)) for planned in probed}
    model: Any = SimpleNamespace(named_parameters=parameters.items)
    part = _PartOfPlan(plan.family, plan.base_config, plan.hidden_size, plan.intermediate_size, probed)
    compression = Compression(model, part, weights, Start(read_fixed(checkpoint, manifest)))
    state = State(projection_rank=manifest.projection_rank)
    optimizer = ProjectedAdamW(
        compression, _PROBE_RATE, aux_lr=_PROBE_RATE, weight_decay=0.0, projection_rates="uniform", state=state
    )
    optimizer.updates = int(read_tensors(checkpoint / OUTER_NAME)[UPDATES])
    expected: dict[str, torch.Tensor] = {}
    for planned in probed:
        record = _in_float32(_record(checkpoint, manifest, planned))
        optimizer.records.create(planned.name, record.tensors())
        G_oi = torch.randn(planned.shape, generator=generator)
        parameters[planned.name].grad = G_oi
        W_OI = weights.weight(planned.name).rows(torch.float32)
        expected[planned.name] = _in_memory_step(W_OI, record, G_oi, optimizer)
    optimizer.compose_all()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    differences = [
        (parameters[name].detach() - w_oi).abs().max() / (w_oi - before[name]).abs().max()
        for name, w_oi in expected.items()
    ]
    worst = torch.stack(differences).max().item()  # A difference that is not a number stays one, and fails.
    return Check(_STEP_CHECK, worst, STEP_TOLERANCE)


def _in_float32(record: MatrixRecord) -> MatrixRecord:
    def whole(stored: Moment) -> torch.Tensor:
        return stored.decode() if isinstance(stored, Blockwise) else stored.to(torch.float32, copy=True)

    parts = {name: Trained(*map(whole, vars(part).values())) for name, part in record.parts.items()}
    return MatrixRecord(record.planned, record.fixed, parts)


def _in_memory_step(
    W_OI: torch.Tensor, record: MatrixRecord, G_oi: torch.Tensor, optimizer: ProjectedAdamW
) -> torch.Tensor:
    """The weight after a step of torch's own AdamW on every trainable value as an autograd leaf."""
    leaves = {name: part.value.clone().requires_grad_() for name, part in record.parts.items()}
    adamw = torch.optim.AdamW(leaves.values(), lr=_PROBE_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for name, part in record.parts.items():
        moments = {moment: getattr(part, moment).clone() for moment in MOMENTS}
        adamw.state[leaves[name]] = {"step": torch.tensor(float(optimizer.updates)), **moments}

    def composed() -> torch.Tensor:
        p_out = _whole(record, 0, [leaves[name] for name in reversed(DELTA_OUT) if name in leaves])
        p_in = _whole(record, 1, [leaves[name] for name in DELTA_IN if name in leaves])
        w_oi = W_OI if p_out is None else p_out @ W_OI
        return (w_oi if p_in is None else w_oi @ p_in) + leaves[AUX]

    composed().backward(G_oi)
    adamw.step()
    return composed().detach()


def _whole(record: MatrixRecord, dim: int, factors: list[torch.Tensor]) -> torch.Tensor | None:
    """The projection S + D of one side as one matrix, D the product of its factors; None: the side keeps its size."""
    start = start_of(record.planned, record.fixed, dim)
    if start is None:
        return None
    delta = functools.reduce(torch.matmul, factors)
    if start.ndim == 1:
        selection = torch.eye(record.planned.base_shape[dim])[start]
        start = selection if dim == 0 else selection.T
    return start + delta
