"""ProjectedAdamW as an optimizer among others: groups, schedules, absent gradients, state_dict, refusals."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight
from pcscale.common.errors import RequestError
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.layout import RecordFormat
from pcscale.projection.sweep import ProjectedAdamW
from tests.projection.parts import Compression, TinyBase, copies, token_batches
from tests.reference import Rates, Weights, stock

RATES = Rates()
FIRST_STEP_TOLERANCE = 1e-2
"""AdamW's first step moves an entry by its rate, less where its gradient is not far above epsilon."""


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


def backward(model: nn.Module, seed: int = 5) -> None:
    NextTokenLoss(model)(token_batches(1, seed=seed)[0]).backward()


def state_of(optimizer: ProjectedAdamW) -> Weights:
    """Everything that training changes, copied."""
    records = {
        f"{name}: {part}": tensor.clone()
        for name, record in optimizer.records.items()
        for part, tensor in record.tensors().items()
    }
    direct = {part: tensor.clone() for name, own in optimizer.direct.items() for part, tensor in own.tensors(name)}
    return records | direct


def test_matrices_are_projected_and_vectors_are_not(compression: Compression) -> None:
    model = compression.model()
    projected, vectors = compression.optimizer(model).param_groups
    assert {group["role"]: group["weight_decay"] for group in (projected, vectors)} == {"projected": 2.0, "vectors": 0}
    assert all(parameter.ndim == 2 for parameter in projected["params"])
    assert all(parameter.ndim == 1 for parameter in vectors["params"])
    held = [id(parameter) for group in (projected, vectors) for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_the_control_arm_has_no_records_and_decays_matrices_alone(compression: Compression) -> None:
    optimizer = compression.optimizer(compression.model(), project=False)
    assert optimizer.records == {}
    assert {group["role"]: group["weight_decay"] for group in optimizer.param_groups} == {"matrices": 2.0, "vectors": 0}


def test_the_control_arm_never_reads_the_base(compression: Compression) -> None:
    model = compression.model()
    compression.base.fingerprints.clear()
    optimizer = compression.optimizer(model, project=False)
    backward(model)
    optimizer.step()
    optimizer.compose_all()
    assert compression.base.fingerprints == {}


def test_a_sweep_reads_every_base_matrix_once(compression: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    backward(model)
    read, original = [], compression.base.tensor
    monkeypatch.setattr(compression.base, "tensor", lambda name: read.append(name) or original(name))
    optimizer.step()
    assert read == [planned.name for planned in compression.plan.matrices]


def test_the_base_weights_are_left_as_they_were(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    backward(model)
    optimizer.step()
    for name, weight in compression.weights.items():
        assert torch.equal(compression.base.tensor(name), weight)


def test_without_a_gradient_nothing_of_a_parameter_changes(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    left_out = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"}
    backward(model, seed=6)
    parameters = dict(model.named_parameters())
    for name in left_out:
        parameters[name].grad = None
    weights, state = copies(model), state_of(optimizer)
    optimizer.step()
    assert {name for name, parameter in parameters.items() if torch.equal(parameter, weights[name])} == left_out
    still = {key.partition(":")[0] for key, tensor in state_of(optimizer).items() if torch.equal(tensor, state[key])}
    assert {name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq") for name in still} == left_out


def test_zero_gradients_leave_a_fresh_model_to_the_last_bit(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights, state = copies(model), state_of(optimizer)
    optimizer.step()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in state_of(optimizer).items())


def largest_moves(optimizer: ProjectedAdamW, start: Weights) -> dict[str, float]:
    """The largest change of any D, of any aux and of any norm."""
    deltas, auxes = [], []
    for record in optimizer.records.values():
        for part, trained in record.parts.items():
            (auxes if part == "aux" else deltas).append(trained.value.abs().max().item())
    norms = [(own.value - start[name]).abs().max().item() for name, own in optimizer.direct.items()]
    return {"D": max(deltas), "aux": max(auxes), "norms": max(norms)}


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_schedule_changes_both_rates_alike(compression: Compression, factor: float) -> None:
    model = compression.model()
    start = copies(model)
    optimizer = compression.optimizer(model, weight_decay=0.0)
    LambdaLR(optimizer, lambda step: factor)
    backward(model)
    optimizer.step()
    expected = {"D": RATES.lr, "aux": RATES.aux_lr, "norms": RATES.aux_lr}
    assert largest_moves(optimizer, start) == pytest.approx(
        {name: factor * rate for name, rate in expected.items()}, rel=FIRST_STEP_TOLERANCE
    )


def test_a_schedule_that_moves_on_is_followed(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 2)
    backward(model)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    state = state_of(optimizer)
    optimizer.step()
    values = {key for key in state if not key.endswith((".exp_avg", ".exp_avg_sq"))}
    found = state_of(optimizer)
    assert all(torch.equal(found[key], state[key]) for key in values)


def test_without_a_rate_of_its_own_aux_moves_as_the_projections_do(compression: Compression) -> None:
    model = compression.model()
    start = copies(model)
    optimizer = compression.optimizer(model, aux_lr=None, weight_decay=0.0)
    backward(model)
    optimizer.step()
    moves = largest_moves(optimizer, start)
    assert list(moves.values()) == pytest.approx([RATES.lr] * 3, rel=FIRST_STEP_TOLERANCE)


def test_a_closure_is_called_with_gradients_and_its_loss_returned(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    start = copies(model)
    loss, ids_BT = NextTokenLoss(model), token_batches(1)[0]

    def closure() -> float:
        value = loss(ids_BT)
        value.backward()
        return value.item()

    returned = optimizer.step(closure)
    assert returned == stock(compression.plan.config, start)(ids_BT, labels=ids_BT).loss.item()
    assert all(not torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def test_the_state_dict_holds_no_tensor(compression: Compression) -> None:
    model = compression.model()
    optimizer = compression.optimizer(model)
    backward(model)
    optimizer.step()
    state = optimizer.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {int, float, str, bool, type(None)}
    assert state["updates"] == 1
    assert state["state"] == {}


def test_a_state_dict_brings_updates_and_rates_back(compression: Compression) -> None:
    """Two optimizers whose records are the same take the same step, wherever their settings came from."""
    ends = []
    for loaded in (False, True):
        model = compression.model()
        optimizer = compression.optimizer(model)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        if loaded:
            state = copy.deepcopy(optimizer.state_dict())
            for group in optimizer.param_groups:
                group.update(lr=1.0, aux_ratio=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.0)
            optimizer.updates = 100
            optimizer.load_state_dict(state)
        backward(model, seed=6)
        optimizer.step()
        assert optimizer.updates == 2
        ends.append(copies(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_model_of_other_shapes_is_refused(compression: Compression) -> None:
    base_model = stock(compression.base.config)
    message = (
        "the model's model.embed_tokens.weight has shape [300, 32], the plan expects [300, 24]. "
        "Build the model from the same plan."
    )
    with pytest.raises(RequestError, match=re.escape(message)):
        compression.optimizer(base_model)


def test_a_model_of_other_names_is_refused(compression: Compression) -> None:
    message = (
        "the model's model.embed_tokens.weight is absent, the plan expects [300, 24]. "
        "Build the model from the same plan."
    )
    with pytest.raises(RequestError, match=re.escape(message)):
        compression.optimizer(NextTokenLoss(compression.model()))


def test_the_kept_indices_of_the_caller_stay_the_caller_s(compression: Compression) -> None:
    optimizer = compression.optimizer(compression.model())
    for name, indices in optimizer.fixed.items():
        assert torch.equal(indices, compression.kept[name])
        assert indices.data_ptr() != compression.kept[name].data_ptr()


@pytest.mark.parametrize("rank", [None, 8])
def test_rates_per_matrix_are_divided_by_what_a_projection_is_multiplied_with(
    rank: int | None, compression: Compression
) -> None:
    """Adam's first step moves every entry by its rate."""
    up, query = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    scaled = {name: weight * 20 if name == up else weight for name, weight in compression.weights.items()}
    rates = Rates(weight_decay=0.0)
    moved: dict[bool, Weights] = {}
    for per_matrix in (True, False):
        model = compression.model()
        base = Scaled(compression.base, up, 20.0)
        optimizer = compression.optimizer(
            model,
            rates,
            base=base,
            projection_rates="per_matrix" if per_matrix else "uniform",
            form=RecordFormat(rank=rank),
        )
        before = {name: values_of_parts(optimizer, name) for name in (up, query)}
        optimizer.compose_all()
        backward(model)
        optimizer.step()
        after = {name: values_of_parts(optimizer, name) for name in (up, query)}
        moved[per_matrix] = {
            f"{name} {part}": (after[name][part] - before[name][part]).abs().median()
            for name in before
            for part in before[name]
        }
    columns, rows = (torch.linalg.vector_norm(scaled[up], dim=dim).mean().item() for dim in (0, 1))
    assert min(columns, rows) > 1
    assert torch.linalg.vector_norm(scaled[query], dim=1).mean() < 1
    for name, uniform in moved[False].items():
        divisor = 1.0
        if name.startswith(up):
            divisor = columns if "delta_out" in name else rows if "delta_in" in name else 1.0
        assert moved[True][name].item() == pytest.approx(uniform.item() / divisor, rel=FIRST_STEP_TOLERANCE), name


class Scaled:
    """A base one of whose weights is larger."""

    placement, collective, coded_fingerprints = "disk", False, {}

    def __init__(self, base: MappedBase, name: str, factor: float) -> None:
        self._base, self._name, self._factor = base, name, factor

    def weight(self, name: str) -> FrozenWeight:
        return FrozenWeight(self._base.tensor(name) * (self._factor if name == self._name else 1.0))

    def lost(self, name: str, rows: slice) -> None:
        return None

    def prefetch(self, names: list[str]) -> None:
        pass


def values_of_parts(optimizer: ProjectedAdamW, name: str) -> Weights:
    return {part: trained.value.clone() for part, trained in optimizer.records[name].parts.items()}
