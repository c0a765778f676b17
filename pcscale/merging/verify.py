"""The checks of a checkpoint and its merged model: bytes, one step, and logits."""

import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.families.hf_config import read_config, stored_dtype
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.merging.merge import trained_weights
from pcscale.model.compressed import build_compressed, load_stock
from pcscale.projection import algebra
from pcscale.projection.checkpoint import UPDATES, direct_name, read_fixed
from pcscale.projection.compression import Compression
from pcscale.projection.layout import AUX, DELTA_IN, DELTA_OUT
from pcscale.projection.record import FixedSide, FixedSides, MatrixRecord, Moment, Trained
from pcscale.projection.residency import State
from pcscale.projection.starts import Start
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.blockwise import Blockwise
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader

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
    outer = TensorReader(read_header(manifest.file(checkpoint, OUTER_NAME))[0])
    tensors: dict[str, torch.Tensor] = {}
    for planned in manifest.plan.weights:
        if record_file(planned.name) in manifest.files:
            record = _record(checkpoint, manifest, planned)
            tensors[planned.name] = algebra.compose(
                weights.weight(planned.name).rows(torch.float32), record.projection(torch.float32)
            )
        else:
            tensors[planned.name] = outer.tensor(direct_name(planned.name))
    return build_compressed(manifest.plan, tensors, torch.device("cpu"), torch.float32).eval()


def _record(checkpoint: Path, manifest: Manifest, planned: PlannedWeight) -> MatrixRecord:
    """A matrix's record in the checkpoint, mapped."""
    reader = TensorReader(read_header(manifest.file(checkpoint, record_file(planned.name)))[0])
    fixed = FixedSides.of(planned, read_fixed(checkpoint, manifest))
    return MatrixRecord.of(fixed, {name: reader.tensor(name) for name in reader.entries})


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
    probed = {(*planned.base_shape, *planned.shape): planned for planned in plan.matrices}.values()
    probed = tuple(planned for planned in probed if record_file(planned.name) in manifest.files)
    if not probed:
        return Check(_STEP_CHECK, 0, STEP_TOLERANCE)
    generator = torch.Generator().manual_seed(manifest.step)
    model = nn.Module()
    for planned in probed:
        _add_parameter(model, planned.name, torch.zeros(planned.shape))
    part = _PartOfPlan(plan.family, plan.base_config, plan.hidden_size, plan.intermediate_size, probed)
    compression = Compression(cast(Any, model), part, weights, Start(read_fixed(checkpoint, manifest)))
    state = State(projection_rank=manifest.projection_rank)
    optimizer = ProjectedAdamW(
        compression, _PROBE_RATE, aux_lr=_PROBE_RATE, weight_decay=0.0, projection_rates="uniform", state=state
    )
    optimizer.updates = int(TensorReader(read_header(checkpoint / OUTER_NAME)[0]).tensor(UPDATES))
    expected: dict[str, torch.Tensor] = {}
    for planned in probed:
        record = _in_float32(_record(checkpoint, manifest, planned))
        optimizer.records.residency.create(planned.name, record.tensors())
        G_oi = torch.randn(planned.shape, generator=generator)
        model.get_parameter(planned.name).grad = G_oi
        W_OI = weights.weight(planned.name).rows(torch.float32)
        expected[planned.name] = _in_memory_step(W_OI, record, G_oi, optimizer)
    optimizer.compose_all()
    before = {planned.name: model.get_parameter(planned.name).detach().clone() for planned in probed}
    optimizer.step()
    differences = [
        (model.get_parameter(name).detach() - w_oi).abs().max() / (w_oi - before[name]).abs().max()
        for name, w_oi in expected.items()
    ]
    worst = torch.stack(differences).max().item()  # A difference that is not a number stays one, and fails.
    return Check(_STEP_CHECK, worst, STEP_TOLERANCE)


def _add_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(model.named_children()):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.register_parameter(last, nn.Parameter(value))


def _in_float32(record: MatrixRecord) -> MatrixRecord:
    """A record with its values and moments in float32, in memory."""

    def whole(stored: Moment) -> torch.Tensor:
        return stored.decode() if isinstance(stored, Blockwise) else stored.to(torch.float32, copy=True)

    parts = {
        name: Trained(whole(part.value), whole(part.exp_avg), whole(part.exp_avg_sq))
        for name, part in record.parts.items()
    }
    return MatrixRecord(record.fixed, parts)


def _in_memory_step(
    W_OI: torch.Tensor, record: MatrixRecord, G_oi: torch.Tensor, optimizer: ProjectedAdamW
) -> torch.Tensor:
    """The weight after a step of torch's own AdamW on every trainable value as an autograd leaf."""
    leaves = {name: part.value.clone().requires_grad_() for name, part in record.parts.items()}
    adamw = torch.optim.AdamW(leaves.values(), lr=_PROBE_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for name, part in record.parts.items():
        assert isinstance(part.exp_avg, torch.Tensor)
        assert isinstance(part.exp_avg_sq, torch.Tensor)
        adamw.state[leaves[name]] = {
            "step": torch.tensor(float(optimizer.updates)),
            "exp_avg": part.exp_avg.clone(),
            "exp_avg_sq": part.exp_avg_sq.clone(),
        }

    def composed() -> torch.Tensor:
        p_out = _whole(record.fixed.out, [leaves[name] for name in reversed(DELTA_OUT) if name in leaves], 0)
        p_in = _whole(record.fixed.in_, [leaves[name] for name in DELTA_IN if name in leaves], 1)
        w_oi = W_OI if p_out is None else p_out @ W_OI
        return (w_oi if p_in is None else w_oi @ p_in) + leaves[AUX]

    composed().backward(G_oi)
    adamw.step()
    return composed().detach()


def _whole(side: FixedSide | None, factors: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    """The projection S + D as one matrix, D the product of its factors; None: the side keeps its size."""
    if side is None:
        return None
    delta, start = functools.reduce(torch.matmul, factors), side.start(torch.float32, dim)
    if side.basis is None:
        rows = torch.arange(len(start))
        selection = torch.zeros_like(delta)
        selection[(rows, start) if dim == 0 else (start, rows)] = 1.0
        start = selection
    return start + delta
