"""Sizes that code with torch and predictions without it share: blocks, chunks and budgets, each typed once."""

QUANTISED_BLOCK = 256
"""Values of an 8-bit tensor that share one scale."""
LOGIT_CHUNK_VALUES = 2**23
"""Logits of the compressed model, or of the base, that exist at a time: 32 MiB in float32."""
HIDDEN_BUDGET_BYTES = 2**29
"""Hidden states that may wait on the host in one layer-major pass; more batches than fit take another pass."""
MERGE_BLOCK = 1024
"""Rows or columns that a merge composes at a time, whatever the matrix's size."""
CACHED_PROBABILITY_BYTES = 2
"""A logarithm of a probability in a teacher's cache."""
CACHED_SEQUENCE_BYTES = 180
"""The address of a sequence of a teacher's cache, with its key, in memory (tests/training/test_teacher_cache.py)."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed at a time."""
    return max(1, LOGIT_CHUNK_VALUES // vocab_size)


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token id in a teacher's cache."""
    return 2 if vocab_size <= 2**16 else 4
