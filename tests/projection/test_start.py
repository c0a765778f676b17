"""Proof 2: step 0 is the hard-pruned model to the last bit, for every family."""

from pathlib import Path

import pytest
import torch

from pcscale.projection.starts import Start, start_tensors
from tests.projection.parts import ALL_CASES, Compression, TinyBase, case_folder, copies, token_batches
from tests.reference import hard_pruned, stock
from tests.tiny import build_base


@pytest.mark.parametrize(("family", "tied", "biased"), ALL_CASES)
def test_step_0_is_the_hard_pruned_stock_model_to_the_last_bit(
    family: str, tied: bool, biased: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(case_folder(family, tied, biased, tiny_base, tmp_path))
    pruned = stock(compression.plan.config, hard_pruned(compression.weights, compression.kept))
    expected = dict(pruned.named_parameters())
    model = compression.model()
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    optimizer = compression.optimizer(model)
    with torch.no_grad():
        for planned in compression.plan.matrices:
            found[planned.name].fill_(torch.nan)
    optimizer.compose_all()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids_BT = token_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, pruned(ids_BT).logits)


@pytest.mark.parametrize("widths", [{"hidden_size": 32}, {"intermediate_size": 48}], ids=["ffn alone", "hidden alone"])
def test_a_side_that_keeps_its_size_is_left_whole(widths: dict[str, int], tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("qwen2", False), **widths)
    expected = hard_pruned(compression.weights, compression.kept)
    model = compression.model()
    compression.optimizer(model).compose_all()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_the_start_of_a_bfloat16_base_is_composed_to_its_very_values(tmp_path: Path) -> None:
    compression = Compression.of(build_base(tmp_path, dtype=torch.bfloat16))
    start = start_tensors(compression.plan, Start(compression.kept), compression.base.tensor)
    expected = hard_pruned(compression.weights, compression.kept)
    assert {tensor.dtype for tensor in start.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in start.items())
    model = compression.model()
    before = copies(model)
    compression.optimizer(model).compose_all()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(before[name], expected[name].float()) for name in before)
