"""A DeepSpeed file beside run.yaml: what run.yaml decides is filled in, what contradicts it is refused."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.config.files import resolve_deepspeed
from pcscale.config.schema import RunConfig

AUTO = "auto"
_OURS = {
    "optimizer": "pcscale is the optimizer",
    "scheduler": "pcscale sets the rates",
    "fp16": "pcscale runs in float32 or bfloat16",
    "bfloat16": "it is called bf16",
}
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_SECTIONS = ("zero_optimization", "bf16", "data_types")


@dataclass(frozen=True)
class EngineSettings:
    """The settings that DeepSpeed is started with: a file, with what run.yaml decides filled in."""

    file: str
    values: dict[str, Any]
    moved_to_stage_1: bool
    """True where bfloat16 was asked for at stage 0, whose float32 copies would overwrite what we set."""

    @property
    def zero(self) -> dict[str, Any]:
        """The section `zero_optimization`."""
        return self.values.get("zero_optimization", {})

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)


def read_engine_settings(file: str, config: RunConfig, world_size: int) -> EngineSettings:
    """Read the file that run.yaml's `deepspeed` names, a path or the name of one that pcscale brings.

    Raises:
        RequestError: the file contradicts run.yaml, or has a section for a thing that pcscale does itself.
    """
    path = resolve_deepspeed(file)
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise RequestError(f"{path} holds no settings: expected one JSON object.")
    for key in _SECTIONS:
        if not isinstance(settings.get(key, {}), dict):
            raise RequestError(f"{path}: {key} is {settings[key]!r}: expected an object of settings.")
    for key, reason in _OURS.items():
        if settings.get(key) and not (isinstance(settings[key], dict) and settings[key].get("enabled") is False):
            raise RequestError(f"{path}: {key} has no place here: {reason}. Remove it.")
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    decided: dict[tuple[str, ...], tuple[Any, str]] = {
        ("train_micro_batch_size_per_gpu",): (micro, "per_device_train_batch_size"),
        ("gradient_accumulation_steps",): (accumulation, "gradient_accumulation_steps"),
        ("train_batch_size",): (micro * accumulation * world_size, "the batch of a step, over all ranks,"),
        ("gradient_clipping",): (config.max_grad_norm, "max_grad_norm"),
        ("bf16", "enabled"): (config.bf16, "bf16"),
        ("data_types", "grad_accum_dtype"): (_SHORT[config.gradient_dtype], "gradient_dtype"),
    }
    filled = deepcopy(settings)
    for keys, (value, name) in decided.items():
        *outer, last = keys
        section = filled
        for key in outer:
            section = section.setdefault(key, {})
        found = section.get(last)
        if found not in (None, AUTO, value):
            raise RequestError(
                f"{path}: {'.'.join(keys)} is {found!r}, run.yaml has {name} {value!r}. "
                f'Remove it from the file, or set it to "{AUTO}".'
            )
        section[last] = value
    stage = filled.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise RequestError(f"{path}: zero_optimization.stage is {stage!r}: expected 0, 1, 2 or 3.")
    # A skipped step would leave DeepSpeed's offloaded gradients as they are for ever; pcscale skips them itself.
    filled["bf16"]["check_grad_overflow"] = False
    filled |= {
        # pcscale clips each gradient when it takes it: DeepSpeed clips too late for that, inside its step.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    moves = config.bf16 and stage == 0
    if moves:
        filled.setdefault("zero_optimization", {})["stage"] = 1
    return EngineSettings(file, filled, moves)
