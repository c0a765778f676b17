"""What tests run on: two-layer random checkpoints of every family, and made-up text."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CASES = tuple((family, tied) for family in FAMILIES for tied in (True, False))
"""Every family with its embeddings tied and untied, for parametrisation."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}


def build_base(
    folder: Path,
    family: str = "llama",
    tied: bool = True,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    tokenizer: bool = False,
    **config_changes: Any,
) -> Path:
    """Write a small random stock checkpoint and return its folder.

    Args:
        max_shard_size: small (`20KB`) for several shards with an index; None: one file.
        tokenizer: also write a byte-level tokenizer, whose end-of-text token the config then names.
        config_changes: config.json keys that differ from `SIZES`.
    """
    settings = {**SIZES, "tie_word_embeddings": tied, **config_changes}
    if tokenizer:
        settings |= _build_tokenizer(folder, settings["vocab_size"])
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    _randomise(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    return folder


@torch.no_grad()
def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Values with which a forgotten norm, bias or index shows."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(0.1 * noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.05 * noise)
        else:
            parameter.copy_(1 + 0.2 * noise)


def _build_tokenizer(folder: Path, vocab_size: int) -> dict[str, int | None]:
    from tests.data.small_tokenizer import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


_PLACES = ("harbour", "orchard", "workshop", "valley", "library")
_PEOPLE = ("the miller", "a sailor", "my aunt", "the clerk", "an old gardener", "the twins")
_VERBS = ("carried", "painted", "counted", "repaired", "forgot", "weighed", "admired")
_THINGS = ("lantern", "basket", "ladder", "letter", "clock", "kettle", "map", "drum")
_QUALITIES = ("small", "heavy", "broken", "bright", "quiet", "green")
_LINKS = ("Later", "In the morning", "After the rain", "Nobody knew why, but", "As always,")


def write_text(path: Path, num_words: int, seed: int) -> Path:
    """Write `num_words` words of made-up sentences: each paragraph stays with one place and two things."""
    chance = random.Random(seed)
    words: list[str] = []
    while len(words) < num_words:
        place, things = chance.choice(_PLACES), chance.sample(_THINGS, 2)
        paragraph: list[str] = []
        for _ in range(chance.randint(3, 6)):
            link = f"{chance.choice(_LINKS)} " if chance.random() < 0.4 else ""
            quality = f"{chance.choice(_QUALITIES)} " if chance.random() < 0.6 else ""
            end = f" in the {place}" if chance.random() < 0.5 else ""
            clause = f"{chance.choice(_PEOPLE)} {chance.choice(_VERBS)} the {quality}{chance.choice(things)}{end}."
            paragraph += (link + (clause if link else clause[0].upper() + clause[1:])).split()
        paragraph[-1] += "\n\n"
        words += paragraph
    text = " ".join(words[:num_words]).replace("\n\n ", "\n\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path
