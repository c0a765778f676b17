"""A byte-level BPE tokenizer small enough to be trained inside a test."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A river runs through the valley, and the valley runs to the sea.",
    "She sells sea shells by the sea shore.",
]


def build_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """Write a tokenizer to `folder`. It covers every byte, so 257 entries are the least: 256 bytes and EOS, id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
