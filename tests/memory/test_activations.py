"""Predicted activations against what torch keeps for the backward pass of stock models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pcscale.families.plan import Plan
from pcscale.memory.working import activation_bytes, layer_activation_bytes
from pcscale.model.loss import NextTokenLoss
from tests.memory.plans import settings, written_plan
from tests.tiny import CASES

LAYER_TOLERANCE = 0.02
"""Of one layer."""
WHOLE_TOLERANCE = 0.05
"""Of a whole model: beside its layers there are token ids and the rotation's angles, the same at any width."""
BATCH, TOKENS = 2, 48
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 480,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
}
CUT = (144, 320)
"""Hidden and intermediate size: all widths differ, so that a mistaken one shows."""
FORMS = [(False, torch.float32), (True, torch.bfloat16)]
FORM_NAMES = ["float32", "bfloat16"]


def wide_plan(folder: Path, family: str, tied: bool, layers: int) -> Plan:
    sizes = {**WIDE, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    return written_plan(folder / f"{layers}", family, CUT, **sizes)


def compressed_model(plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """What stock transformers makes of the compressed model's config."""
    config = AutoConfig.for_model(**plan.config)
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config).to(dtype).train()


def saved_bytes(model: PreTrainedModel) -> int:
    """What a forward pass of the training loss keeps for the backward pass, and the hidden states that the loss is
    given, which are there until it is done. Each block of memory counts once, parameters not at all."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # Held, so that no other takes its address.
        return tensor

    def keep_result(module: torch.nn.Module, given: Any, result: Any) -> None:
        keep(result.last_hidden_state)

    model.base_model.register_forward_hook(keep_result)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = NextTokenLoss(model)(torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 300)
    found = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return found


@pytest.mark.parametrize(("bf16", "dtype"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_layer_keeps_what_is_predicted(
    family: str, tied: bool, bf16: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    plans = [wide_plan(tmp_path, family, tied, layers) for layers in (2, 3)]
    two, three = (saved_bytes(compressed_model(plan, dtype)) for plan in plans)
    config = settings(bf16=bf16, per_device_train_batch_size=BATCH, sequence_length=TOKENS)
    predicted = layer_activation_bytes(plans[0], config)
    assert predicted == layer_activation_bytes(plans[1], config)
    assert predicted == pytest.approx(three - two, rel=LAYER_TOLERANCE)


@pytest.mark.parametrize(("bf16", "dtype"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_model_keeps_what_is_predicted(
    family: str, tied: bool, bf16: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    plan = wide_plan(tmp_path, family, tied, 3)
    config = settings(bf16=bf16, per_device_train_batch_size=BATCH, sequence_length=TOKENS)
    found = saved_bytes(compressed_model(plan, dtype))
    assert activation_bytes(plan, config) == pytest.approx(found, rel=WHOLE_TOLERANCE)


@pytest.mark.parametrize(("bf16", "dtype"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_with_checkpointing_a_model_keeps_the_inputs_of_its_layers(
    family: str, tied: bool, bf16: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """One layer comes back in the backward pass, after what is counted here."""
    plan = wide_plan(tmp_path, family, tied, 8)
    model = compressed_model(plan, dtype)
    # As training does (jobs/run.py): transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    config = settings(bf16=bf16, per_device_train_batch_size=BATCH, sequence_length=TOKENS, gradient_checkpointing=True)
    predicted = activation_bytes(plan, config) - layer_activation_bytes(plan, config)
    assert predicted == pytest.approx(saved_bytes(model), rel=WHOLE_TOLERANCE)
