"""Whether a checkpoint and its merged model are what they claim: bytes, one step, weights and logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pcscale.base.mapped import MappedBase
from pcscale.checkpoint.manifest import Manifest
from pcscale.compressed.model import build_compressed, load_stock
from pcscale.families.hf_config import read_config, stored_dtype
from pcscale.projection.persist import read_kept, read_state
from pcscale.projection.record import MatrixRecord
from pcscale.projection.starts import selection_start
from pcscale.projection.sweep import ProjectedAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_TOLERANCE = 1e-2
"""The two steps round differently, and Adam divides by moments that may be tiny."""
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""The rounding of the merged dtype."""
_PROBE_RATE = 1e-3
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed


def check_bytes(
    checkpoint: Path, open_base: Callable[[dict[str, str]], MappedBase]
) -> tuple[Manifest, MappedBase, list[Check]]:
    """Hash every file of the checkpoint and every base weight again.

    Raises:
        RequestError: the first one that differs.
    """
    manifest = Manifest.read(checkpoint)
    for name in manifest.files:
        manifest.file(checkpoint, name)
    base = open_base(manifest.base_fingerprints)
    base.check_all()
    return manifest, base, [Check("checkpoint files changed", 0, 0), Check("base weights changed", 0, 0)]


def _live(checkpoint: Path, manifest: Manifest, base: MappedBase) -> tuple["PreTrainedModel", ProjectedAdamW]:
    """The live model in float32, composed from the checkpoint, and its optimizer. Memory: as in training."""
    plan, kept = manifest.plan, read_kept(checkpoint, manifest)
    start = selection_start(plan, kept, base.tensor)
    model = build_compressed(plan, start, torch.device("cpu"), torch.float32)
    optimizer = ProjectedAdamW(model, plan, base, kept, lr=_PROBE_RATE, project=manifest.method == "projected")
    read_state(optimizer, checkpoint, manifest)
    return model.eval(), optimizer


def check_models(checkpoint: Path, manifest: Manifest, base: MappedBase, merged: Path | None) -> list[Check]:
    """Merged against live logits (where there is a merged model), and a streamed against an in-memory step."""
    model, optimizer = _live(checkpoint, manifest, base)
    checks = [_check_logits(model, merged, manifest.step)] if merged else []
    return [*checks, _check_step(model, optimizer, base, manifest.step)]


@torch.no_grad()
def _check_logits(live: "PreTrainedModel", merged: Path, seed: int) -> Check:
    """Both models in float32, on random tokens."""
    model = load_stock(merged, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(live.config.vocab_size, (1, _PROBE_TOKENS), generator=generator)
    expected_BTV, found_BTV = live(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
    difference = ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()
    tolerance = LOGIT_TOLERANCE[stored_dtype(read_config(merged))]
    return Check("merged logits, largest difference from live ones (of the largest)", difference, tolerance)


def _check_step(model: nn.Module, optimizer: ProjectedAdamW, base: MappedBase, seed: int) -> Check:
    """One matrix of each shape takes a step on a random gradient, in the sweep and with autograd and torch's AdamW."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    expected: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for planned in optimizer.plan.matrices:
        shapes = (*planned.base_shape, *planned.shape)
        if planned.name in optimizer.records and shapes not in seen:
            seen.add(shapes)
            G_oi = torch.randn(planned.shape, generator=generator)
            parameters[planned.name].grad = G_oi
            W_OI = base.tensor(planned.name).float()
            expected[planned.name] = _in_memory_step(W_OI, optimizer.records[planned.name], G_oi, optimizer)
    before = {name: parameters[name].detach().clone() for name in expected}
    optimizer.step()
    differences = [
        (parameters[name].detach() - w_oi).abs().max() / (w_oi - before[name]).abs().max()
        for name, w_oi in expected.items()
    ]
    worst = torch.tensor([0.0, *differences]).max().item()  # A difference that is not a number stays one, and fails.
    return Check("streamed step, largest difference from the in-memory one (of the change)", worst, STEP_TOLERANCE)


def _in_memory_step(
    W_OI: torch.Tensor, record: MatrixRecord, G_oi: torch.Tensor, optimizer: ProjectedAdamW
) -> torch.Tensor:
    """The weight after a step that keeps every projection as an autograd leaf of torch's own AdamW."""
    leaves = {name: part.value.clone().requires_grad_() for name, part in record.parts.items()}
    adamw = torch.optim.AdamW(leaves.values(), lr=_PROBE_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for name, part in record.parts.items():
        adamw.state[leaves[name]] = {
            "step": torch.tensor(float(optimizer.updates)),
            "exp_avg": part.exp_avg.clone(),
            "exp_avg_sq": part.exp_avg_sq.clone(),
        }

    def composed() -> torch.Tensor:
        p_out = _whole(record.kept_out, leaves.get("delta_out"), 0)
        p_in = _whole(record.kept_in, leaves.get("delta_in"), 1)
        w_oi = W_OI if p_out is None else p_out @ W_OI
        return (w_oi if p_in is None else w_oi @ p_in) + leaves["aux"]

    composed().backward(G_oi)
    adamw.step()
    return composed().detach()


def _whole(kept: torch.Tensor | None, delta: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """The projection S + D as one matrix; None: the side keeps its size."""
    if kept is None or delta is None:
        return None
    rows = torch.arange(len(kept))
    selection = torch.zeros_like(delta)
    selection[(rows, kept) if dim == 0 else (kept, rows)] = 1.0
    return selection + delta
