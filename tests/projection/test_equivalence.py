"""Proof 3: optimizer steps of the sweep against the slow obvious steps in memory, and against torch's AdamW."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pcscale.model.loss import NextTokenLoss
from pcscale.projection.algebra import compose
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.training.step import training_step
from tests.projection.parts import ALL_CASES, Compression, TinyBase, case_folder, copies, token_batches
from tests.reference import Rates, Reference, Weights, reference_steps, stock

RATES = Rates()
STEPS = 4
FLOAT32_TOLERANCE = 1e-3
"""Of a weight's movement in those steps. AdamW divides a gradient by its own size, so that the rounding of a gradient
close to zero shows in full: an update of the other sign would be an error of 1."""
BFLOAT16_TOLERANCE = 0.2
"""Of the records' movement, as a root mean square: forward, backward and published weights round to 8 bits, and AdamW
moves an entry whose gradient is all rounding as far as any other."""


def steps_of(accumulation: int, steps: int = STEPS) -> list[list[torch.Tensor]]:
    batches = token_batches(steps * accumulation)
    return [batches[step * accumulation : (step + 1) * accumulation] for step in range(steps)]


def train(model: PreTrainedModel, optimizer: ProjectedAdamW, steps: list[list[torch.Tensor]]) -> list[float]:
    """The package's own steps; returns the gradients' norms before clipping."""
    loss = NextTokenLoss(model)
    return [
        training_step(loss, optimizer, micro_batches, len(micro_batches), RATES.max_grad_norm).grad_norm
        for micro_batches in steps
    ]


def assert_moved_alike(found: Weights, expected: Weights, start: Weights, tolerance: float) -> None:
    assert found.keys() == expected.keys() == start.keys()
    for name, weight in found.items():
        movement = (expected[name] - start[name]).abs().max()
        assert movement > 0, name
        assert (weight - expected[name]).abs().max() <= tolerance * movement, name


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("family", "tied", "biased"), ALL_CASES)
def test_steps_are_those_of_the_reference(
    family: str, tied: bool, biased: bool, accumulation: int, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(case_folder(family, tied, biased, tiny_base, tmp_path))
    model = compression.model()
    start, steps = copies(model), steps_of(accumulation)
    norms = train(model, compression.optimizer(model), steps)
    reference = Reference(compression.plan.config, compression.weights, compression.kept, RATES)
    for micro_batches in steps:
        reference.step(micro_batches)
    assert min(norms) > RATES.max_grad_norm, "clipping has something to do"
    assert norms == pytest.approx(reference.norms, rel=FLOAT32_TOLERANCE)
    expected = {name: weight.detach() for name, weight in reference.composed().items()}
    assert_moved_alike(copies(model), expected, start, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("widths", [{"hidden_size": 32}, {"intermediate_size": 48}], ids=["ffn alone", "hidden alone"])
def test_steps_with_one_axis_cut_are_those_of_the_reference(widths: dict[str, int], tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", True), **widths)
    model = compression.model()
    start, steps = copies(model), steps_of(1)
    train(model, compression.optimizer(model), steps)
    expected = reference_steps(compression.plan.config, compression.weights, compression.kept, steps, RATES)
    assert_moved_alike(copies(model), expected, start, FLOAT32_TOLERANCE)


def test_records_are_the_leaves_of_the_reference(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", False))
    model, steps = compression.model(), steps_of(1)
    optimizer = compression.optimizer(model)
    train(model, optimizer, steps)
    reference = Reference(compression.plan.config, compression.weights, compression.kept, RATES)
    for micro_batches in steps:
        reference.step(micro_batches)
    assert optimizer.records.keys() == reference.matrices.keys()
    for name, record in optimizer.records.items():
        matrix = reference.matrices[name]
        leaves = {"delta_out": matrix.out, "delta_in": matrix.in_, "aux": [matrix.aux_oi]}
        present = {part: leaf for part, own in leaves.items() for leaf in own}
        assert record.parts.keys() == present.keys()
        for part, leaf in present.items():
            state = reference.optimizer.state[leaf]
            for found, expected in (
                (record.parts[part].value, leaf.detach()),
                (record.parts[part].exp_avg, state["exp_avg"]),
                (record.parts[part].exp_avg_sq, state["exp_avg_sq"]),
            ):
                assert (found - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max(), (name, part)


@pytest.mark.parametrize(("family", "tied", "biased"), ALL_CASES)
def test_the_control_arm_is_torch_adamw_on_the_stock_model(
    family: str, tied: bool, biased: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(case_folder(family, tied, biased, tiny_base, tmp_path))
    model, steps = compression.model(), steps_of(2)
    start = copies(model)
    optimizer = compression.optimizer(model, project=False)
    assert not optimizer.records
    train(model, optimizer, steps)
    control = stock(compression.plan.config, start)
    matrices = [parameter for parameter in control.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in control.parameters() if parameter.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": RATES.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=RATES.lr,
        betas=RATES.betas,
        eps=RATES.eps,
    )
    for micro_batches in steps:
        for ids_BT in micro_batches:
            (control(ids_BT, labels=ids_BT, use_cache=False).loss / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), RATES.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
    assert_moved_alike(copies(model), copies(control), start, FLOAT32_TOLERANCE)


def test_a_bfloat16_model_has_float32_gradients_and_records(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("qwen2", True))
    model = compression.model(torch.bfloat16)
    optimizer = compression.optimizer(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for ids_BT in token_batches(2):
        NextTokenLoss(model)(ids_BT).backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    optimizer.step()
    values = [tensor for record in optimizer.records.values() for tensor in record.tensors().values()]
    values += [tensor for name, trained in optimizer.direct.items() for _, tensor in trained.tensors(name)]
    assert {value.dtype for value in values} == {torch.float32}


def test_gradients_of_a_bfloat16_model_accumulate_without_rounding(tiny_base: TinyBase) -> None:
    """A bfloat16 sum of ones stops growing at 256."""
    compression = Compression.of(tiny_base("llama", True))
    weight = compression.model(torch.bfloat16).model.norm.weight
    for _ in range(1000):
        weight.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight.grad, 1000))


def test_a_bfloat16_model_holds_the_rounded_composed_weights(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("qwen2", True))
    model = compression.model(torch.bfloat16)
    optimizer = compression.optimizer(model)
    train(model, optimizer, steps_of(1))
    for name, parameter in model.named_parameters():
        if name in optimizer.records:
            whole = compose(compression.weights[name], optimizer.records[name].projection())
        else:
            whole = optimizer.direct[name].value
        assert not torch.equal(whole, whole.bfloat16().float()), "there is something to round"
        assert torch.equal(parameter, whole.bfloat16())


def test_bfloat16_steps_stay_close_to_float32_steps(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", False))
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = compression.model(dtype)
        optimizer = compression.optimizer(model)
        train(model, optimizer, steps_of(2))
        moved[dtype] = torch.cat(
            [part.value.flatten() for record in optimizer.records.values() for part in record.parts.values()]
        )
    whole, rounded = moved[torch.float32], moved[torch.bfloat16]
    assert (rounded - whole).norm() <= BFLOAT16_TOLERANCE * whole.norm()
    assert not torch.equal(rounded, whole)


def test_activation_checkpointing_leaves_the_gradients_alone(tiny_base: TinyBase) -> None:
    compression, ids_BT = Compression.of(tiny_base("llama", True)), token_batches(1)[0]
    plain, checkpointed = compression.model(), compression.model()
    # transformers 5.23 renamed it.
    enable = (
        getattr(checkpointed, "activation_checkpointing_enable", None) or checkpointed.gradient_checkpointing_enable
    )
    enable()
    calls = {plain: 0, checkpointed: 0}
    for model in (plain, checkpointed):

        def count(*_: object, model: PreTrainedModel = model) -> None:
            calls[model] += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        NextTokenLoss(model)(ids_BT).backward()
    assert calls == {plain: 1, checkpointed: 2}, "the layer is computed again"
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=FLOAT32_TOLERANCE, atol=1e-8)
