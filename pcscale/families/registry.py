"""The supported families, listed by hand."""

from pcscale.common.errors import RequestError
from pcscale.families.decoder import LLAMA, MISTRAL, QWEN2, QWEN3
from pcscale.families.spec import Config, Family, check_config

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: Config, where: str) -> Family:
    """The family of a model, from its config.json, which errors call `where`.

    Raises:
        RequestError: the family is not supported, the weights are quantised, or the sizes are not usable.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        supported = ", ".join(f"{family.name} ({family.examples})" for family in FAMILIES.values())
        raise RequestError(f"{where}: model_type {model_type!r} is not supported. Supported: {supported}.")
    if config.get("quantization_config"):
        raise RequestError(f"{where}: the weights are quantised. Use the checkpoint in its full precision.")
    check_config(config, where, family.stated)
    return family
