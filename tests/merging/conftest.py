"""Checkpoints and merged folders that tests only read, made once a session."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.merging.trained import Train, TrainedRun, merge_run, train_and_save
from tests.tiny import build_base

LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
"""Position embeddings that a config with defaults would lose."""
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
FURNITURE = {
    "chat_template.jinja": CHAT_TEMPLATE,
    "generation_config.json": '{"max_new_tokens": 7, "temperature": 0.6, "do_sample": true}',
    "LICENSE.txt": "Do what you like.\n",
    "NOTICE": "Made of nothing.\n",
    "README.md": "---\nlanguage: [en, de]\nlicense: mit\n---\n\n# The base\n",
    "training_args.bin": "not the compressed model's",
    "pytorch_model.bin": "a second copy of the base",
    "notes.txt": "nobody else's business",
}
"""Files beside a published model's weights: the last three are not the compressed model's."""
TRAINER = {
    "step": 3,
    "tokens": 72_000,
    "loss": 4.25,
    "eval_loss": 4.5,
    "settings": {
        "base": "acme/tiny",
        "keep": 0.72,
        "data": {"train": ["prose/*.txt", "more.jsonl"], "validation": None},
        "learning_rate": 1.5e-4,
    },
}
"""What the training loop leaves of a run, as far as the card shows it."""


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread; on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`trained(family, tied, method, dtype of the base)`: a checkpoint to be read only."""

    @cache
    def build(family: str, tied: bool, method: str, dtype: torch.dtype) -> TrainedRun:
        folder = tmp_path_factory.mktemp("trained")
        base = build_base(folder / "base", family, tied, dtype=dtype)
        return train_and_save(base, folder / "checkpoints" / "step-00000003", method)

    def get(
        family: str = "llama", tied: bool = True, method: str = "projected", dtype: torch.dtype = torch.float32
    ) -> TrainedRun:
        return build(family, tied, method, dtype)

    return get


@pytest.fixture(scope="session")
def run(trained: Train) -> TrainedRun:
    """One checkpoint, where the family does not matter."""
    return trained("llama", False)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedRun, Path]:
    """A base with everything that a published model has, its run with a trainer.json, and the merged folder."""
    folder = tmp_path_factory.mktemp("furnished")
    base = build_base(
        folder / "base", "qwen3", tied=True, dtype=torch.bfloat16, max_shard_size="20KB", tokenizer=True, **LONG_ROPE
    )
    for name, text in FURNITURE.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text, encoding="utf-8")
    run = train_and_save(base, folder / "step-00000003", trainer=TRAINER)
    merge_run(run, folder / "merged", max_shard_bytes=20_000)
    return run, folder / "merged"
