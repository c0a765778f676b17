"""ProjectedAdamW: the optimizer whose step is the projection sweep.

To the outside it is an ordinary optimizer over an ordinary model. Inside, every projected weight is visited once per
step: its base weight is fetched, its gradient pulled back to D_out, D_in and aux, those are updated, the new compressed
weight is composed and published, and all of it is let go before the next matrix. Norms and biases (and, for hard
pruning, everything) get plain AdamW.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from pcscale.common.errors import RequestError
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.importance.select import KeptIndices
from pcscale.projection import algebra
from pcscale.projection.adamw import update
from pcscale.projection.record import MatrixRecord, Trained


class Base(Protocol):
    """What the sweep needs of a frozen base."""

    def tensor(self, name: str) -> torch.Tensor: ...

    def prefetch(self, names: list[str]) -> None: ...


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW on the projections of a frozen base, for a stock model at the compressed size.

    The model must hold the start already (`pcscale.selection_start`). Gradients arrive in `parameter.grad` as always;
    clip them, accumulate them and schedule `group["lr"]` as with any optimizer.

    Args:
        model: the compressed model; its parameters are named as in the plan.
        plan: the base's and the compressed shapes.
        base: where base weights are read from.
        kept: the kept indices of the start.
        lr: rate of D_out and D_in.
        aux_lr: rate of aux, norms and biases; None: `lr`. It follows a scheduler in the same ratio to `lr`.
        betas, eps: AdamW's.
        weight_decay: decoupled decay of D_out, D_in and aux; with `project=False` of the matrices.
        project: False trains the start directly, without the base: the hard-pruning control arm.

    Memory: three float32 values for each trainable one, and while a matrix is visited about three more for that matrix.

    Raises:
        RequestError: the model's parameters are not those of the plan, or a rate is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        base: Base,
        kept: KeptIndices,
        lr: float = 1.5e-4,
        aux_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        project: bool = True,
    ) -> None:
        if lr <= 0 or (aux_lr is not None and aux_lr < 0):
            raise RequestError(f"lr is {lr} and aux_lr {aux_lr}: expected a positive lr, and no negative aux_lr.")
        parameters = dict(model.named_parameters())
        self.plan, self.base, self.project = plan, base, project
        # A copy: a checkpoint that is read brings its own.
        self.kept = {name: indices.clone() for name, indices in kept.items()}
        self.updates = 0
        self._planned: list[PlannedWeight] = list(plan.weights)
        self._parameters = [_matching_parameter(planned, parameters) for planned in self._planned]
        # Records are not `optimizer.state`: torch, Accelerate and the Trainer cast, move and pickle what is there.
        self.records: dict[str, MatrixRecord] = {}
        self.direct: dict[str, Trained] = {}
        """What is trained without a projection; its value is the parameter itself where that is float32."""
        groups: dict[str, list[nn.Parameter]] = {"projected": [], "matrices": [], "vectors": []}
        for planned, parameter in zip(self._planned, self._parameters, strict=True):
            if planned.is_matrix and project:
                self.records[planned.name] = MatrixRecord.fresh(planned, self.kept, parameter.device)
                groups["projected"].append(parameter)
            else:
                self.direct[planned.name] = Trained.starting_at(parameter.detach().float())
                groups["matrices" if planned.is_matrix else "vectors"].append(parameter)
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One sweep: pull back, update and compose in one visit per matrix. Parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        for position, (planned, parameter) in enumerate(zip(self._planned, self._parameters, strict=True)):
            if parameter.grad is None:
                continue
            group = group_of[id(parameter)]
            if planned.name in self.records:
                self._prefetch_next(position)
                self._visit(planned.name, parameter, group)
            else:
                rate = group["lr"] * group["aux_ratio"]
                self._update(self.direct[planned.name], parameter.grad.float(), group, rate)
                publish(parameter, self.direct[planned.name].value)
        self.updates += 1
        return loss

    def _visit(self, name: str, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        record = self.records[name]
        W_OI = self.base.tensor(name).to(parameter.device, torch.float32)
        assert parameter.grad is not None
        gradients = algebra.pull_back(W_OI, record.projection, parameter.grad.float())
        for part, trained in record.parts.items():
            rate = group["lr"] * (group["aux_ratio"] if part == "aux" else 1.0)
            self._update(trained, getattr(gradients, part), group, rate)
        del gradients
        publish(parameter, algebra.compose(W_OI, record.projection))

    def _update(self, trained: Trained, gradient: torch.Tensor, group: dict[str, Any], rate: float) -> None:
        update(trained, gradient, self.updates, rate, group["betas"], group["eps"], group["weight_decay"])

    def _prefetch_next(self, position: int) -> None:
        following = (planned.name for planned in self._planned[position + 1 :] if planned.name in self.records)
        name = next(following, None)
        if name is not None:
            self.base.prefetch([name])

    @torch.no_grad()
    def compose_all(self) -> None:
        """Publish every weight from its record: what a resumed run does before its first step."""
        for planned, parameter in zip(self._planned, self._parameters, strict=True):
            if planned.name in self.records:
                W_OI = self.base.tensor(planned.name).to(parameter.device, torch.float32)
                publish(parameter, algebra.compose(W_OI, self.records[planned.name].projection))
            else:
                publish(parameter, self.direct[planned.name].value)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the groups' settings; records are written by `pcscale.save_state`."""
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave; records are read by `pcscale.load_state`."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "updates"})
        self.updates = int(state_dict["updates"])


def publish(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Make a new weight the model's, rounded to the parameter's dtype."""
    if value.data_ptr() != parameter.data_ptr():
        parameter.copy_(value)


def _matching_parameter(planned: PlannedWeight, parameters: dict[str, nn.Parameter]) -> nn.Parameter:
    parameter = parameters.get(planned.name)
    if parameter is None or tuple(parameter.shape) != planned.shape:
        found = "is absent" if parameter is None else f"has shape {list(parameter.shape)}"
        raise RequestError(
            f"the model's {planned.name} {found}, the plan expects {list(planned.shape)}. "
            "Build the model from the same plan."
        )
    return parameter
