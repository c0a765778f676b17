"""ProjectedAdamW: the optimizer whose step is the projection sweep.

To the outside it is an ordinary optimizer over an ordinary model. Inside, every projected weight is visited once per
step: its base weight and its record are fetched, its gradient is pulled back to D_out, D_in and aux, those are updated,
the new compressed weight is composed and published, and all of it is let go. Norms and biases (and, for hard pruning,
everything) get plain AdamW.

Legend: O, I base sizes; o, i compressed sizes; b a block of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pcscale.base.weight import FrozenWeight
from pcscale.common.errors import RequestError
from pcscale.common.ledger import DIRECT, ROTATION, ledger, placement_of
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.projection import algebra
from pcscale.projection.adamw import AdamW, update
from pcscale.projection.engine import Engine, LocalEngine
from pcscale.projection.layout import (
    AUX,
    AUX_START,
    DELTA_IN,
    DELTA_OUT,
    PUBLISHED_FORMAT,
    RecordFormat,
    check_rank,
    row_blocks,
)
from pcscale.projection.owners import sweep_rounds
from pcscale.projection.record import FixedSides, FixedTensors, Trained
from pcscale.projection.residency import ON_DEVICE, Residency
from pcscale.projection.rounding import noise_key
from pcscale.projection.starts import Start, random_factors, rebuilds, start_aux
from pcscale.projection.store import Base, RecordStore, Visit

_FACTORS = (DELTA_OUT[1], DELTA_IN[1])
"""U of a D of low rank: V alone decays, which makes U V decay once."""


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW on the projections of a frozen base, for a stock model at the compressed size.

    The model must hold the start already (`pcscale.start_tensors`). Gradients arrive in `parameter.grad` as always;
    clip them, accumulate them and schedule `group["lr"]` as with any optimizer.

    Args:
        model: the compressed model; its parameters are named as in the plan.
        plan: the base's and the compressed shapes.
        base: where base weights are read from.
        start: what training begins with; where a checkpoint is loaded, its `fixed` tensors are enough (with a
            weight_decay and a start that rebuilds channels, say `aux_start` in `form` as well).
        lr: rate of D_out and D_in.
        rates_per_matrix: divide a D's rate by what its entries are multiplied with on their way into the weight, where
            that is more than 1: for D_in the mean norm of the base weight's rows, for D_out of its columns. A step of
            Adam then moves the weights of all matrices by about as much.
        aux_lr: rate of aux, norms and biases; None: `lr`. It follows a scheduler in the same ratio to `lr`.
        betas, eps: AdamW's.
        weight_decay: decoupled decay of D_out, D_in and aux towards their start; with `project=False` of the matrices.
        project: False trains the start directly, without the base: the hard-pruning control arm.
        form: the precision and rank of records.
        residency: where records live.
        gradient_home: `cpu` accumulates gradients in host memory, out of `parameter.grad`; clip and clear them with
            `clip_grad_norm_` and `zero_grad` of this optimizer.
        engine: who holds the model's weights and gradients; None: this process, whole. With several ranks each has the
            records of the matrices that it owns.
        compute_dtype: of the products, which accumulate in float32; None: the model's on a GPU, float32 elsewhere.
        seed: of stochastic rounding, and of the U of a low rank.

    Memory: of records what `residency` says; and while a matrix is visited its gradients and products, in the dtype of
    the products.

    Raises:
        RequestError: the model's parameters are not those of the plan, a rate or the rank is out of range.
        BudgetError, RunError: the residency's budget, or its disk, is too small.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        base: Base,
        start: Start,
        lr: float = 1.5e-4,
        aux_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rates_per_matrix: bool = False,
        project: bool = True,
        form: RecordFormat = PUBLISHED_FORMAT,
        residency: Residency = ON_DEVICE,
        gradient_home: str = "device",
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
        engine: Engine | None = None,
    ) -> None:
        if lr <= 0 or (aux_lr is not None and aux_lr < 0):
            raise RequestError(f"lr is {lr} and aux_lr {aux_lr}: expected a positive lr, and no negative aux_lr.")
        named = dict(model.named_parameters())
        self.plan, self.base, self.project, self.seed = plan, base, project, seed
        self.updates = 0
        self._rates_per_matrix = rates_per_matrix
        self._divisors: dict[str, tuple[float, float]] = {}
        """Of the rates of D_out and D_in, by matrix; the base does not change."""
        parameters = {planned.name: _matching_parameter(planned, named) for planned in plan.weights}
        self.engine: Engine = engine or LocalEngine(parameters, gradient_home)
        self.compute_dtype = compute_dtype or (
            self.engine.dtype if self.engine.device.type == "cuda" else torch.float32
        )
        projected = [planned for planned in plan.weights if planned.is_matrix and project]
        check_rank(projected, form.rank)
        moved = bool(base.coded_fingerprints or start.rebuilt)
        form = replace(form, aux_start=form.aux_start or (weight_decay > 0 and moved))
        topology = self.engine.topology
        self._rounds = sweep_rounds(projected, form.rank, topology.world_size)
        # Records are not `optimizer.state`: torch, Accelerate and the Trainer cast, move and pickle what is there.
        self.records = RecordStore(
            projected, self._rounds, topology.rank, form, start.fixed, base, residency, self.engine.device
        )
        self._position = {planned.name: position for position, planned in enumerate(projected)}
        """Of every projected matrix, whoever owns it."""
        ledger.keep(self, ROTATION, placement_of(self.engine.device), _dense_bytes(self.records.fixed))
        for planned in projected:
            self._create(planned, start)
        self.direct: dict[str, Trained] = {}
        """What is trained without a projection, on every rank; its value is the parameter itself where that is whole
        and float32."""
        groups: dict[str, list[nn.Parameter]] = {"projected": [], "matrices": [], "vectors": []}
        self._role: dict[str, str] = {}
        for planned in plan.weights:
            if planned.name not in self._position:
                self.direct[planned.name] = Trained.starting_at(
                    self.engine.value(planned.name).to(self.engine.device, torch.float32)
                )
            role = "projected" if planned.name in self._position else "matrices" if planned.is_matrix else "vectors"
            self._role[planned.name] = role
            groups[role].append(parameters[planned.name])
        ledger.keep(self, DIRECT, placement_of(self.engine.device), self._direct_bytes())
        decay = {"projected": weight_decay, "matrices": weight_decay, "vectors": 0.0}
        aux_ratio = 1.0 if aux_lr is None else aux_lr / lr
        super().__init__(
            [
                {"params": members, "role": role, "weight_decay": decay[role]}
                for role, members in groups.items()
                if members
            ],
            {"lr": lr, "betas": tuple(betas), "eps": eps, "aux_ratio": aux_ratio},
        )

    @property
    def fixed(self) -> FixedTensors:
        """What S is made of; a checkpoint that is loaded brings its own values."""
        return self.records.fixed

    def _create(self, planned: PlannedWeight, start: Start) -> None:
        """Make this rank's record of a matrix at the start; all ranks read the base together where they must."""
        name, base = planned.name, self.base
        mine = name in self.records
        weight = base.weight(name) if rebuilds(planned, start) and (mine or base.collective) else None
        if not mine:
            return

        def stored(rows: slice) -> torch.Tensor:
            assert weight is not None
            values = weight.rows(torch.float32, rows.start, rows.stop)
            lost = base.lost(name, rows)
            return values if lost is None else values + lost.to(values.device)

        def lost(rows: slice) -> torch.Tensor:
            found = base.lost(name, rows)
            assert found is not None
            return found

        key = noise_key(self.seed, 0, self._position[name], 0)
        values = random_factors(planned, self.records.form.rank, key)
        aux = start_aux(
            planned,
            start,
            FixedSides.of(planned, self.fixed),
            lost if base.coded_fingerprints else None,
            None if weight is None else stored,
            self.engine.device,
        )
        if aux is not None:
            values |= {AUX: aux, AUX_START: aux}
        self.records.home.create(name, values)

    def _direct_bytes(self) -> int:
        """Moments of what is trained without a projection, and its values where they are not the parameters."""
        return sum(
            tensor.nbytes
            for name, trained in self.direct.items()
            for _, tensor in trained.tensors(name)
            if tensor.data_ptr() != self.engine.value(name).data_ptr()
        )

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before."""
        return self.engine.clip_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.engine.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One sweep: pull back, update and compose in one visit per matrix. Parameters without a gradient stay.

        Raises:
            RunError: a record could not be read or written. Those before it have been updated: go on from a checkpoint.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reached = set(self.engine.reached())
        turns = [turn for turn in self._rounds if not reached.isdisjoint(turn)]
        groups = {group["role"]: group for group in self.param_groups}
        with tf32_products(), self.records.visits(turns, True) as visits:
            for turn, visit in zip(turns, visits, strict=True):
                G_oi = self.engine.fetch(turn)
                if visit is not None and G_oi is not None:
                    self._visit(visit, G_oi, groups["projected"])
                del G_oi
                self.engine.publish(turn)
        for name, trained in self.direct.items():
            if name in reached:
                group = groups[self._role[name]]
                gradient = self.engine.gradient(name).to(self.engine.device, torch.float32)
                update(trained, gradient, self._settings(group, group["lr"] * group["aux_ratio"]))
                self.engine.replace(name, trained.value)
        self.updates += 1
        return loss

    def _visit(self, visit: Visit, G_oi: torch.Tensor, group: dict[str, Any]) -> None:
        name, record = visit.planned.name, visit.record
        for number, (part, gradient) in enumerate(self._pulled_back(visit, G_oi)):
            rate = group["lr"] * group["aux_ratio"] if part == AUX else self._rate(visit, part, group["lr"])
            settings = self._settings(group, rate, 0.0 if part in _FACTORS else None)
            start = record.aux_start if part == AUX else None
            key = noise_key(self.seed, self.updates + 1, self._position[name], number)
            update(record.parts[part], gradient, settings, key, start)
            del gradient
        self._compose(visit)

    def _rate(self, visit: Visit, part: str, rate: float) -> float:
        """Of a factor of D."""
        if not self._rates_per_matrix:
            return rate
        name = visit.planned.name
        if name not in self._divisors:
            self._divisors[name] = _mean_norms(visit.weight, visit.planned)
        of_columns, of_rows = self._divisors[name]
        return rate / max(1.0, of_columns if part in DELTA_OUT else of_rows)

    def _pulled_back(self, visit: Visit, G_oi: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of every trainable value by name, each let go before the next is asked for.

        Where the out side keeps its size the blocks of rows are independent, and what they give to D_in adds up:
        neither the base weight nor its gradient exists whole in the dtype of the products.
        """
        record = visit.record
        projection = record.projection(self.compute_dtype)
        totals: list[torch.Tensor] = []
        for rows in row_blocks(visit.planned):
            W_bI = visit.weight.rows(self.compute_dtype, rows.start, rows.stop)
            G_bi = G_oi[rows].to(self.engine.device, self.compute_dtype)
            pulled = algebra.pull_back(W_bI, projection, G_bi)
            factors = [*pulled.out, *pulled.in_]
            del W_bI, G_bi, pulled
            totals = [total.add_(part) for total, part in zip(totals, factors, strict=True)] if totals else factors
            del factors
        del projection
        names = [part for part in record.parts if part != AUX]
        for part in names:
            yield part, totals.pop(0)
        yield AUX, G_oi

    def _compose(self, visit: Visit) -> None:
        place_oi = self.engine.place(visit.planned.name)
        projection = visit.record.projection(self.compute_dtype)
        for rows in row_blocks(visit.planned):
            W_bI = visit.weight.rows(self.compute_dtype, rows.start, rows.stop)
            part = replace(projection, aux=projection.aux[rows])
            place_oi[rows] = algebra.compose(W_bI, part)

    def _settings(self, group: dict[str, Any], rate: float, weight_decay: float | None = None) -> AdamW:
        decay = group["weight_decay"] if weight_decay is None else weight_decay
        return AdamW(self.updates, rate, group["betas"], group["eps"], decay)

    @torch.no_grad()
    def compose_all(self) -> None:
        """Publish every weight from its record: what a resumed run does before its first step."""
        with tf32_products(), self.records.visits(self._rounds, False) as visits:
            for turn, visit in zip(self._rounds, visits, strict=True):
                if visit is not None:
                    self._compose(visit)
                self.engine.publish(turn)
        for name, trained in self.direct.items():
            self.engine.replace(name, trained.value)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the groups' settings; records are written by `pcscale.save_state`."""
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave; records are read by `pcscale.load_state`."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "updates"})
        self.updates = int(state_dict["updates"])


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32: without it they take some fifteen times as long as bfloat16."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _mean_norms(weight: FrozenWeight, planned: PlannedWeight) -> tuple[float, float]:
    """The mean norms of a base weight's columns and of its rows."""
    squares_I: torch.Tensor | float = 0.0
    of_rows = 0.0
    for rows in row_blocks(planned):
        W_bI = weight.rows(torch.float32, rows.start, rows.stop)
        of_rows += torch.linalg.vector_norm(W_bI, dim=1).sum().item()
        squares_I = squares_I + W_bI.square().sum(0)
    assert isinstance(squares_I, torch.Tensor)
    return squares_I.sqrt().mean().item(), of_rows / planned.base_shape[0]


def _dense_bytes(fixed: FixedTensors) -> int:
    return sum(tensor.nbytes for tensor in fixed.values() if tensor.is_floating_point())


def _matching_parameter(planned: PlannedWeight, parameters: dict[str, nn.Parameter]) -> nn.Parameter:
    parameter = parameters.get(planned.name)
    # ZeRO-3 empties a parameter and says elsewhere what shape it had.
    shape = None if parameter is None else tuple(getattr(parameter, "ds_shape", parameter.shape))
    if parameter is None or shape != planned.shape:
        found = "is absent" if shape is None else f"has shape {list(shape)}"
        raise RequestError(
            f"the model's {planned.name} {found}, the plan expects {list(planned.shape)}. "
            "Build the model from the same plan."
        )
    return parameter
