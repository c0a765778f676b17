"""The tokenizer and the token sets that the tests of tokens have."""

from tests.data.conftest import prepare, tokenizer, tokenizer_folder

__all__ = ["prepare", "tokenizer", "tokenizer_folder"]
