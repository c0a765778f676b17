"""A base with codes, and what bitsandbytes makes of it."""

from pathlib import Path

import bitsandbytes.functional
import pytest
import torch

from pcscale.base.int8 import Int8Base
from pcscale.run.folder import BASE_CACHE_NAME
from tests.projection.parts import Compression, open_base
from tests.tiny import build_base

WIDE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24, "vocab_size": 1300}
"""A vocabulary above 1024 and no multiple of 256, which is what rows are coded, decoded and compared in."""
NARROW = {"hidden_size": 72, "intermediate_size": 120}
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, read only."""
    return build_base(tmp_path_factory.mktemp("wide") / "base", "llama", True, **WIDE)


@pytest.fixture(scope="package")
def compression(folder: Path) -> Compression:
    return Compression.of(folder, **NARROW)


@pytest.fixture(scope="package")
def coded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Int8Base:
    """Read only; copy its cache to change it."""
    return Int8Base(open_base(folder), tmp_path_factory.mktemp("coded") / BASE_CACHE_NAME)


def seen_by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """A matrix after bitsandbytes' own way there and back."""
    return bitsandbytes.functional.dequantize_blockwise(
        *bitsandbytes.functional.quantize_blockwise(weight.float(), blocksize=256)
    )


def whole(base: Int8Base, name: str) -> torch.Tensor:
    return base.weight(name).rows(torch.float32)
