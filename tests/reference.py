"""The slow obvious version of Projected Compression: everything in memory, dense projections, autograd, torch's AdamW.

Nothing here uses the package or its family tables: weights are told apart by their names, written out below.

Legend: O, I base sizes; o, i compressed sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Weights = dict[str, torch.Tensor]
Kept = dict[str, torch.Tensor]
"""`residual`, and `ffn.<layer>` of each layer."""

SLICES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "model.embed_tokens.weight": lambda w, residual, ffn: w[:, residual],
    "input_layernorm.weight": lambda w, residual, ffn: w[residual],
    "self_attn.q_proj.weight": lambda w, residual, ffn: w[:, residual],
    "self_attn.k_proj.weight": lambda w, residual, ffn: w[:, residual],
    "self_attn.v_proj.weight": lambda w, residual, ffn: w[:, residual],
    "self_attn.o_proj.weight": lambda w, residual, ffn: w[residual, :],
    "self_attn.q_proj.bias": lambda w, residual, ffn: w,
    "self_attn.k_proj.bias": lambda w, residual, ffn: w,
    "self_attn.v_proj.bias": lambda w, residual, ffn: w,
    "self_attn.o_proj.bias": lambda w, residual, ffn: w[residual],
    "self_attn.q_norm.weight": lambda w, residual, ffn: w,
    "self_attn.k_norm.weight": lambda w, residual, ffn: w,
    "post_attention_layernorm.weight": lambda w, residual, ffn: w[residual],
    "mlp.gate_proj.weight": lambda w, residual, ffn: w[ffn][:, residual],
    "mlp.up_proj.weight": lambda w, residual, ffn: w[ffn][:, residual],
    "mlp.down_proj.weight": lambda w, residual, ffn: w[residual][:, ffn],
    "mlp.gate_proj.bias": lambda w, residual, ffn: w[ffn],
    "mlp.up_proj.bias": lambda w, residual, ffn: w[ffn],
    "mlp.down_proj.bias": lambda w, residual, ffn: w[residual],
    "model.norm.weight": lambda w, residual, ffn: w[residual],
    "lm_head.weight": lambda w, residual, ffn: w[:, residual],
}
"""What pruning leaves of each weight."""

SIDES = {
    "model.embed_tokens.weight": (None, "residual"),
    "self_attn.q_proj.weight": (None, "residual"),
    "self_attn.k_proj.weight": (None, "residual"),
    "self_attn.v_proj.weight": (None, "residual"),
    "self_attn.o_proj.weight": ("residual", None),
    "mlp.gate_proj.weight": ("ffn", "residual"),
    "mlp.up_proj.weight": ("ffn", "residual"),
    "mlp.down_proj.weight": ("residual", "ffn"),
    "lm_head.weight": (None, "residual"),
}
"""Which sides of each matrix are projected, out before in; what is not listed is no matrix."""


def hard_pruned(base: Weights, kept: Kept) -> Weights:
    """The base's weights at the kept indices, sliced by hand."""
    pruned = {}
    for name, weight in base.items():
        layer, short = _split(name)
        ffn = kept[f"ffn.{layer}"] if layer is not None else kept["residual"]
        pruned[name] = SLICES[short](weight, kept["residual"], ffn)
    return pruned


def _split(name: str) -> tuple[str | None, str]:
    """`model.layers.1.mlp.up_proj.weight` → `1`, `mlp.up_proj.weight`."""
    if not name.startswith("model.layers."):
        return None, name
    layer, _, short = name.removeprefix("model.layers.").partition(".")
    return layer, short


def stock(config: dict[str, Any], weights: Weights | None = None) -> PreTrainedModel:
    """The stock float32 model of a config.json, in training mode, with the given weights copied in."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **values), dtype=torch.float32
    ).train()
    if weights is not None:
        loaded = model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
        assert not loaded.unexpected_keys
        assert set(loaded.missing_keys) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
        model.tie_weights()
    return model


@dataclass(frozen=True)
class Rates:
    """AdamW's settings, and the norm that gradients are clipped to."""

    lr: float = 3e-3
    aux_lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 2.0
    max_grad_norm: float = 0.5


@dataclass
class Matrix:
    """A base matrix with its dense projections S + D, and what is trained of them as autograd leaves."""

    W_OI: torch.Tensor
    S_oO: torch.Tensor | None  # None: this side keeps its size
    S_Ii: torch.Tensor | None
    out: list[torch.Tensor]
    """Leaves of D_out: `[D]`, or `[U, V]` with D = V U; empty: this side keeps its size."""
    in_: list[torch.Tensor]
    """Leaves of D_in: `[D]`, or `[U, V]` with D = U V."""
    aux_oi: torch.Tensor
    """The change of aux since the start."""
    aux_start_oi: torch.Tensor

    @classmethod
    def start(
        cls,
        W_OI: torch.Tensor,
        kept_out: torch.Tensor | None,
        kept_in: torch.Tensor | None,
        seen_OI: torch.Tensor | None = None,
        U_rO: torch.Tensor | None = None,
        U_Ir: torch.Tensor | None = None,
    ) -> "Matrix":
        """The hard-pruned start.

        Args:
            seen_OI: what training sees in place of W; aux starts where the kept entries are W's all the same.
            U_rO, U_Ir: make D a product of two factors, the other of which begins at zero.
        """
        O, I = W_OI.shape
        # Who keeps every index keeps the size: such a side has no projection.
        kept_out = None if kept_out is None or len(kept_out) == O else kept_out
        kept_in = None if kept_in is None or len(kept_in) == I else kept_in
        S_oO = None if kept_out is None else torch.eye(O)[kept_out]
        S_Ii = None if kept_in is None else torch.eye(I)[:, kept_in]
        out, in_ = [], []
        if S_oO is not None:
            out = [torch.zeros_like(S_oO)] if U_rO is None else [U_rO.clone(), torch.zeros(len(S_oO), len(U_rO))]
        if S_Ii is not None:
            in_ = (
                [torch.zeros_like(S_Ii)] if U_Ir is None else [U_Ir.clone(), torch.zeros(U_Ir.shape[1], S_Ii.shape[1])]
            )
        seen_OI = W_OI if seen_OI is None else seen_OI
        lost = W_OI - seen_OI
        lost = lost if kept_out is None else lost[kept_out]
        lost = lost if kept_in is None else lost[:, kept_in]
        matrix = cls(seen_OI, S_oO, S_Ii, out, in_, torch.zeros_like(lost), lost)
        for leaf in (*out, *in_, matrix.aux_oi):
            leaf.requires_grad_(True)
        return matrix

    @property
    def factors(self) -> list[torch.Tensor]:
        """The U of both sides, if D is a product."""
        return [side[0] for side in (self.out, self.in_) if len(side) == 2]

    @property
    def deltas(self) -> list[torch.Tensor]:
        """The leaves that decay: D, or V."""
        return [side[-1] for side in (self.out, self.in_) if side]

    def compose(self) -> torch.Tensor:
        w_xx = self.W_OI
        if self.S_oO is not None:
            D_oO = self.out[0] if len(self.out) == 1 else self.out[1] @ self.out[0]
            w_xx = (self.S_oO + D_oO) @ w_xx
        if self.S_Ii is not None:
            D_Ii = self.in_[0] if len(self.in_) == 1 else self.in_[0] @ self.in_[1]
            w_xx = w_xx @ (self.S_Ii + D_Ii)
        return w_xx + (self.aux_start_oi + self.aux_oi)


@dataclass
class Reference:
    """One compression in memory.

    Args:
        config: the compressed model's config.json.
        base: every base weight by name.
        kept: the kept indices.
    """

    config: dict[str, Any]
    base: Weights
    kept: Kept
    rates: Rates
    seen: Weights = field(default_factory=dict)
    """What training sees in place of some base weights, such as 8-bit ones."""
    factors: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = field(default_factory=dict)
    """`U_rO` and `U_Ir` of the matrices whose D are products."""
    norms: list[float] = field(default_factory=list)
    """Of each step's gradients of the compressed weights, before clipping."""

    def __post_init__(self) -> None:
        self.model = stock(self.config)
        self.matrices: dict[str, Matrix] = {}
        self.direct: Weights = {}
        pruned = hard_pruned(self.base, self.kept)
        for name, weight in self.base.items():
            layer, short = _split(name)
            if short in SIDES:
                sides = [f"ffn.{layer}" if side == "ffn" else side for side in SIDES[short]]
                kept_out, kept_in = (None if side is None else self.kept[side] for side in sides)
                U_rO, U_Ir = self.factors.get(name, (None, None))
                self.matrices[name] = Matrix.start(weight.float(), kept_out, kept_in, self.seen.get(name), U_rO, U_Ir)
            else:
                self.direct[name] = pruned[name].float().clone().requires_grad_(True)
        rates = self.rates
        matrices = self.matrices.values()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [delta for matrix in matrices for delta in matrix.deltas], "lr": rates.lr},
                {"params": [U for matrix in matrices for U in matrix.factors], "lr": rates.lr, "weight_decay": 0.0},
                {"params": [matrix.aux_oi for matrix in matrices], "lr": rates.aux_lr},
                {"params": list(self.direct.values()), "lr": rates.aux_lr, "weight_decay": 0.0},
            ],
            betas=rates.betas,
            eps=rates.eps,
            weight_decay=rates.weight_decay,
        )

    def composed(self) -> Weights:
        """Every compressed weight, part of the autograd graph."""
        return {
            name: self.matrices[name].compose() if name in self.matrices else self.direct[name] for name in self.base
        }

    def step(self, micro_batches: Sequence[torch.Tensor]) -> None:
        composed = self.composed()
        weights = {name: weight.detach().requires_grad_(True) for name, weight in composed.items()}
        for ids_BT in micro_batches:
            output = torch.func.functional_call(
                self.model, weights, (ids_BT,), {"labels": ids_BT, "use_cache": False}, tie_weights=True
            )
            (output.loss / len(micro_batches)).backward()
        self.norms.append(torch.nn.utils.clip_grad_norm_(list(weights.values()), self.rates.max_grad_norm).item())
        self.optimizer.zero_grad()
        for name, weight in weights.items():
            composed[name].backward(weight.grad)
        self.optimizer.step()


def reference_steps(
    config: dict[str, Any], base: Weights, kept: Kept, steps: Sequence[Sequence[torch.Tensor]], rates: Rates
) -> Weights:
    """The composed weights after one optimizer step for each list of micro batches `[B, T]`."""
    reference = Reference(config, base, kept, rates)
    for micro_batches in steps:
        reference.step(micro_batches)
    return {name: weight.detach() for name, weight in reference.composed().items()}
