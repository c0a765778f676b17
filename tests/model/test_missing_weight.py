"""A checkpoint that lacks a weight is refused; transformers alone would go on with random values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcscale.common.errors import RequestError
from pcscale.model.compressed import load_stock
from tests.tiny import build_base


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = build_base(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not in the weights"):
        load_stock(folder, torch.device("cpu"), torch.float32)
