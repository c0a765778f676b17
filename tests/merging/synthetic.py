"""Large checkpoints without training: random base shards and records, written by the safetensors library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pcscale.base.int8 import Int8Base
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.projection.layout import value_shapes
from pcscale.run.folder import BASE_CACHE_NAME
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.hashing import fingerprint_file
from tests.merging.trained import BASE_NAME, open_base

_PATTERN_VALUES = 2**20


def write_checkpoint(
    folder: Path, widths: tuple[int, int], rank: int | None = None, int8: bool = False, **config: Any
) -> Plan:
    """Write `folder/base`, a bfloat16 Llama, and `folder/step-00000001`, as training would, but without moments.

    Args:
        widths: the compressed model's residual and ffn sizes.
        rank: of D; None: D is kept whole.
        int8: as if it was trained on 8-bit codes, whose file is gone.
        config: the sizes of the base.
    """
    base_folder, checkpoint = folder / "base", folder / "step-00000001"
    base_folder.mkdir(parents=True)
    (checkpoint / "records").mkdir(parents=True)
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **config}
    (base_folder / "config.json").write_text(json.dumps(values))
    plan = Plan(family_of(values, "config.json"), values, *widths)
    pattern = 0.02 * torch.randn(_PATTERN_VALUES, generator=torch.Generator().manual_seed(0))

    def filled(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return pattern.repeat(-(-count // _PATTERN_VALUES))[:count].view(shape)

    save_file({w.name: filled(w.base_shape).bfloat16() for w in plan.weights}, base_folder / "model.safetensors")
    outer = {f"kept.{name}": torch.arange(size - kept, size) for name, size, kept in plan.kept_axes()}
    outer |= {f"direct.{w.name}": filled(w.shape) for w in plan.weights if not w.is_matrix}
    save_file(outer, checkpoint / OUTER_NAME)
    for planned in plan.matrices:
        record = {name: filled(shape) for name, shape in value_shapes(planned, rank).items()}
        save_file(record, checkpoint / record_file(planned.name))
    files = [OUTER_NAME, *(record_file(planned.name) for planned in plan.matrices)]
    base = open_base(base_folder)
    codes = Int8Base(base, folder / BASE_CACHE_NAME).coded_fingerprints if int8 else {}
    (folder / BASE_CACHE_NAME).unlink(missing_ok=True)
    Manifest(
        step=1,
        method="projected",
        base_name=BASE_NAME,
        base_revision=None,
        base_config=values,
        base_fingerprints=base.check_all(),
        hidden_size=widths[0],
        intermediate_size=widths[1],
        files={name: fingerprint_file(checkpoint / name) for name in files},
        projection_rank=rank,
        coded_fingerprints=codes,
    ).write(checkpoint)
    return plan
