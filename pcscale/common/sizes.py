"""Sizes that code with torch and predictions without it share: blocks, chunks and budgets, each typed once."""

QUANTISED_BLOCK = 256
"""Values of an 8-bit tensor that share one scale."""
LOGIT_CHUNK_VALUES = 2**23
"""Most logits of the compressed model, or of the base, that exist at a time: 32 MiB in float32."""
HIDDEN_BUDGET_BYTES = 2**29
"""Most bytes of hidden states that wait on the host in a layer-major pass; batches that do not fit take another."""
MERGE_BLOCK = 1024
"""Rows or columns that a merge composes at a time, whatever the matrix's size."""
CACHED_PROBABILITY_BYTES = 2
"""Bytes of a probability's logarithm in a teacher's cache."""
CACHED_SEQUENCE_BYTES = 180
"""Memory for one sequence's key and address in a teacher's cache (tests/training/test_teacher_cache.py)."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed at a time."""
    return max(1, LOGIT_CHUNK_VALUES // vocab_size)


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token id in a teacher's cache."""
    return 2 if vocab_size <= 2**16 else 4
