"""Bases with real shapes and random weights, made where a benchmark needs them."""

import json
from pathlib import Path
from typing import Any

import torch

from pcscale.common.console import console
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.merging.layout import lay_out
from pcscale.storage.index import INDEX_NAME
from pcscale.storage.writer import ShardWriter, TensorShape

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
"""The shape of Llama-3.2-1B."""
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""The shape of Llama-3.1-8B."""
SMOLLM2_HALF = {"hidden_size": 360, "intermediate_size": 1024}
"""Half of SmolLM2-135M's parameters."""
PUBLISHED_START = {"start": "selection", "importance": "activation"}
_NOISE = 2**24


def noise(scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(_NOISE, generator=generator) * scale).bfloat16()


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Repeat `values` until the tensor is full."""
    for part in tensor.view(-1).split(len(values)):
        part.copy_(values[: len(part)])


def make_base(folder: Path, config: dict[str, Any], shard_bytes: int = 5 * 10**9) -> int:
    """Write a checkpoint folder in bfloat16; returns the size of its shards. Norm weights are one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = Plan(family_of(config, "benchmark"), config, config["hidden_size"], config["intermediate_size"])
    shards = lay_out(whole, {planned.name: torch.bfloat16 for planned in whole.weights}, shard_bytes)
    values = noise(0.02)
    with console.progress("make base", len(shards), "shards") as progress:
        for shard in shards:
            shapes: dict[str, TensorShape] = {
                planned.name: (torch.bfloat16, planned.shape) for planned in shard.weights
            }
            with ShardWriter(folder / shard.name, shapes) as writer:
                for planned in shard.weights:
                    fill(writer[planned.name], values if planned.is_matrix else torch.ones(1, dtype=torch.bfloat16))
            progress.advance(1)
    if len(shards) > 1:
        weight_map = {planned.name: shard.name for shard in shards for planned in shard.weights}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
