"""The compressed model: a stock transformers model at the sizes of a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pcscale.common.errors import RequestError
from pcscale.common.ledger import WEIGHTS, ledger, placement_of
from pcscale.families.plan import Plan
from pcscale.model.stock import empty_model, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_compressed(
    plan: Plan,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype | None = torch.float32,
) -> "PreTrainedModel":
    """A stock model in training mode with the given weights, every one of the plan's, copied to the device.

    Gradients of a bfloat16 model accumulate in `gradient_dtype`, where torch can; None: an engine sees to that.
    """
    model = empty_model(plan.config)
    ledger.keep(model, WEIGHTS, placement_of(device), plan.parameters * dtype.itemsize)
    fill(model, {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()})
    nn.Module.to(model, device)  # Buffers, such as rotary frequencies.
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        if dtype != torch.float32 and gradient_dtype is not None and hasattr(parameter, "grad_dtype"):
            parameter.grad_dtype = gradient_dtype
    return model.train()


def load_stock(folder: Path, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of a checkpoint folder, loaded by stock transformers as any user would.

    Raises:
        RequestError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        model, found = loaded
    except Exception as error:  # transformers and safetensors raise many types.
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"{folder}: stock transformers cannot load it: {reason}") from None
    if found["missing_keys"]:
        # transformers would go on with random values in their place.
        raise RequestError(f"{folder}: {min(found['missing_keys'])} is not in the weights. Copy the folder again.")
    nn.Module.to(model, device)
    ledger.keep(model, WEIGHTS, placement_of(device), sum(parameter.nbytes for parameter in model.parameters()))
    return model.eval()
