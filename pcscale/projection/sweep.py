"""ProjectedAdamW: the optimizer whose step is the projection sweep.

Every projected weight is visited once per step: its base weight and its record are read, its gradient is pulled back to
D_out, D_in and aux, those are updated, the new compressed weight is composed and published, and all of it is let go.
Norms and biases (and, for hard pruning, everything) get plain AdamW.

Legend: O, I base sizes; o, i compressed sizes; b a block of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pcscale.base.weight import FrozenWeight
from pcscale.common.errors import RequestError
from pcscale.common.ledger import DIRECT, ROTATION, ledger, placement_of
from pcscale.config import defaults
from pcscale.families.plan import PlannedWeight
from pcscale.projection import algebra
from pcscale.projection.adamw import AdamW, update
from pcscale.projection.compression import Compression
from pcscale.projection.engine import Engine, LocalEngine
from pcscale.projection.layout import AUX, AUX_START, DELTA_IN, DELTA_OUT, RecordFormat, check_rank, row_blocks
from pcscale.projection.owners import sweep_rounds
from pcscale.projection.record import Trained
from pcscale.projection.residency import State
from pcscale.projection.rounding import noise_key
from pcscale.projection.starts import Start, random_factors, rebuilds, start_aux
from pcscale.projection.store import RecordStore, Visit

_FACTORS = (DELTA_OUT[1], DELTA_IN[1])
"""U of a D of low rank: V alone decays, which makes U V decay once."""


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW on the projections of a frozen base, for a stock model at the compressed size.

    Gradients arrive in `parameter.grad` as always; clip them, accumulate them and schedule `group["lr"]` as with any
    optimizer. Defaults are those of run.yaml.

    Args:
        compression: model, plan, base and start, as `pcscale.prepare` makes them.
        lr: rate of D_out and D_in (with method hard_prune of everything); None: run.yaml's default for the method.
        aux_lr: rate of aux, norms and biases; None: three times `lr` (with hard_prune `lr`). It follows a scheduler in
            the same ratio to `lr`.
        weight_decay: decoupled decay of D_out, D_in and aux towards their start; with hard_prune of the matrices.
        projection_rates: `per_matrix` divides a D's rate by what its entries are multiplied with on their way into the
            weight, where that is more than 1: for D_in the mean norm of the base weight's rows, for D_out of its
            columns. A step of Adam then moves the weights of all matrices by about as much. `uniform`: one rate.
        state: how and where records are kept; None: whole and in float32 on the device.

    Memory: records as `state` says; and while a matrix is visited its gradients and products, in the dtype of the
    products: the model's on a GPU, float32 elsewhere.

    Raises:
        RequestError: the model's parameters are not those of the plan, a rate or the rank is out of range.
        BudgetError, RunError: the residency's budget, or its disk, is too small.
    """

    def __init__(
        self,
        compression: Compression,
        lr: float | None = None,
        aux_lr: float | None = None,
        betas: tuple[float, float] = defaults.BETAS,
        eps: float = defaults.EPSILON,
        weight_decay: float = defaults.WEIGHT_DECAY,
        projection_rates: Literal["per_matrix", "uniform"] = defaults.PROJECTION_RATES,
        state: State | None = None,
    ) -> None:
        method, state = compression.method, state or State()
        lr = defaults.learning_rate(method) if lr is None else lr
        aux_lr = defaults.aux_learning_rate(method, lr) if aux_lr is None else aux_lr
        if lr <= 0 or aux_lr < 0:
            raise RequestError(f"lr is {lr} and aux_lr {aux_lr}: expected a positive lr, and no negative aux_lr.")
        self.compression, self.plan, self.base = compression, compression.plan, compression.base
        self.projection_rates, self.seed = projection_rates, state.seed
        self.updates = 0
        self.project = method == "projected"
        """False: hard pruning trains everything directly."""
        self._divisors: dict[str, tuple[float, float]] = {}
        """Divisors of the rates of D_out and D_in, by matrix; the base does not change."""
        named = dict(compression.model.named_parameters())
        parameters = {planned.name: _matching_parameter(planned, named) for planned in self.plan.weights}
        self.engine: Engine = compression.engine or LocalEngine(parameters, state.gradient_home)
        self.compute_dtype = self.engine.dtype if self.engine.device.type == "cuda" else torch.float32
        self._open_records(compression.start, state, weight_decay)
        self.direct = self._open_direct()
        """Weights that are trained without a projection, on every rank; a value is the parameter itself where that is
        whole and float32."""
        groups: list[dict[str, Any]] = []
        for role, decay in (("projected", weight_decay), ("matrices", weight_decay), ("vectors", 0.0)):
            members = [parameters[planned.name] for planned in self.plan.weights if self._role(planned) == role]
            if members:
                groups.append({"params": members, "role": role, "weight_decay": decay})
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "aux_ratio": aux_lr / lr})

    def _open_records(self, start: Start, state: State, weight_decay: float) -> None:
        """Make the record of every matrix that this rank owns."""
        projected = [planned for planned in self.plan.weights if planned.is_matrix and self.project]
        check_rank(projected, state.projection_rank)
        moves_aux = bool(self.base.coded_fingerprints or start.rebuilt or start.moves_aux)
        form = RecordFormat(state.record_dtype, state.moments, state.projection_rank, weight_decay > 0 and moves_aux)
        topology = self.engine.topology
        self._rounds = sweep_rounds(projected, form.rank, topology.world_size)
        self._position = {planned.name: position for position, planned in enumerate(projected)}
        """Number of every projected matrix, whoever owns it."""
        # Records are not `optimizer.state`: torch, Accelerate and the Trainer cast, move and pickle what is there.
        self.records = RecordStore(
            projected, self._rounds, topology.rank, form, start.fixed, self.base, state, self.engine.device
        )
        self.fixed = self.records.fixed
        dense_bytes = sum(tensor.nbytes for tensor in self.fixed.values() if tensor.is_floating_point())
        ledger.keep(self, ROTATION, placement_of(self.engine.device), dense_bytes)
        for planned in projected:
            self._create(planned, start)

    def _open_direct(self) -> dict[str, Trained]:
        device = self.engine.device
        direct = {
            name: Trained.starting_at(self.engine.value(name).to(device, torch.float32))
            for name in (planned.name for planned in self.plan.weights if planned.name not in self._position)
        }
        # Moments, and values where they are not the parameters.
        num_bytes = sum(
            tensor.nbytes
            for name, trained in direct.items()
            for _, tensor in trained.tensors(name)
            if tensor.data_ptr() != self.engine.value(name).data_ptr()
        )
        ledger.keep(self, DIRECT, placement_of(device), num_bytes)
        return direct

    def _role(self, planned: PlannedWeight) -> str:
        if planned.name in self._position:
            return "projected"
        return "matrices" if planned.is_matrix else "vectors"

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

        values = random_factors(planned, self.records.form.rank, noise_key(self.seed, 0, self._position[name], 0))
        lost = partial(base.lost, name) if base.coded_fingerprints else None
        aux = start_aux(planned, start, self.fixed, lost, stored if weight else None, self.engine.device)
        if aux is not None:
            values |= {AUX: aux, AUX_START: aux}
        self.records.create(name, values)

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
        rounds = [sweep_round for sweep_round in self._rounds if not reached.isdisjoint(sweep_round)]
        groups = {group["role"]: group for group in self.param_groups}
        with tf32_products(), self.records.visits(rounds, True) as visits:
            for sweep_round, visit in zip(rounds, visits, strict=True):
                G_oi = self.engine.round_gradient(sweep_round)
                if visit is not None and G_oi is not None:
                    self._visit(visit, G_oi, groups["projected"])
                del G_oi
                self.engine.publish(sweep_round)
        for planned in self.plan.weights:
            name = planned.name
            if name in self.direct and name in reached:
                trained, group = self.direct[name], groups[self._role(planned)]
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
        """The rate of D, or of a factor of it."""
        if self.projection_rates == "uniform":
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
        new_oi = self.engine.destination(visit.planned.name)
        projection = visit.record.projection(self.compute_dtype)
        for rows in row_blocks(visit.planned):
            W_bI = visit.weight.rows(self.compute_dtype, rows.start, rows.stop)
            new_oi[rows] = algebra.compose(W_bI, replace(projection, aux=projection.aux[rows]))

    def _settings(self, group: dict[str, Any], rate: float, weight_decay: float | None = None) -> AdamW:
        decay = group["weight_decay"] if weight_decay is None else weight_decay
        return AdamW(self.updates, rate, group["betas"], group["eps"], decay)

    @torch.no_grad()
    def compose_all(self) -> None:
        """Publish every weight from its record, as a resumed run does before its first step."""
        with tf32_products(), self.records.visits(self._rounds, False) as visits:
            for sweep_round, visit in zip(self._rounds, visits, strict=True):
                if visit is not None:
                    self._compose(visit)
                self.engine.publish(sweep_round)
        for name, trained in self.direct.items():
            self.engine.replace(name, trained.value)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint for `pcscale.merge` and `pcscale.from_checkpoint`, in place of any that `folder` holds.

        It holds no base weight: the base is found by its name and hashes.

        Raises:
            RunError: the disk is full; nothing was replaced.
        """
        from pcscale.projection.checkpoint import save_state

        save_state(Path(folder), self.updates, self)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the groups' settings; records are written by `save_pretrained`."""
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave; records are read by `pcscale.from_checkpoint`."""
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
    """The mean norm of a base weight's columns, and that of its rows."""
    squares_I, of_rows = torch.zeros(()), 0.0
    for rows in row_blocks(planned):
        W_bI = weight.rows(torch.float32, rows.start, rows.stop)
        of_rows += torch.linalg.vector_norm(W_bI, dim=1).sum().item()
        squares_I = squares_I.to(W_bI.device) + W_bI.square().sum(0)
    return squares_I.sqrt().mean().item(), of_rows / planned.base_shape[0]


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
