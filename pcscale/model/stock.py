"""The stock transformers classes behind a config.json, built without weights. Imports transformers when called."""

from typing import TYPE_CHECKING

import torch

from pcscale.common.errors import RequestError
from pcscale.families.spec import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def stock_config(config: Config) -> "PretrainedConfig":
    """The config object of the stock class.

    Raises:
        RequestError: the class refuses the values.
    """
    from transformers import AutoConfig

    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        return AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # The classes validate with exceptions of many types.
        reason = " ".join(str(error).split())
        raise RequestError(f"config.json: the stock '{config['model_type']}' class refuses it: {reason}") from None


def empty_model(config: Config) -> "PreTrainedModel":
    """The stock causal model with parameters on the meta device and real buffers. Memory: buffers only."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(stock_config(config), dtype=torch.float32)
    return model.eval()


def fill(model: "PreTrainedModel", tensors: dict[str, torch.Tensor]) -> None:
    """Give an empty model its parameters, without a copy; a tied head becomes the embedding again."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, f"the family's table lacks {missing}"
