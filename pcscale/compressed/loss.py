"""The training loss in chunks: the full `[tokens, vocab]` logits never exist.

Legend: B batch, T tokens of a sequence, H residual size, N tokens, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_CHUNK_VALUES = 2**23
"""Logits that exist at a time: 32 MiB in float32."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed at a time."""
    return max(1, LOGIT_CHUNK_VALUES // vocab_size)


class NextTokenLoss(nn.Module):
    """A stock causal model with its loss: token ids in, mean cross entropy out.

    The head is called as a module inside this one, chunk by chunk, and recomputed in the backward pass.

    Args:
        model: a stock causal model; its parameters are this module's parameters.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        # A plain reference: registered twice, the head's parameters would have two names.
        self._head: tuple[nn.Module] = (head,)
        self._chunk = chunk_tokens(model.config.vocab_size)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The mean next-token loss in nats over B × (T - 1) tokens, a float32 scalar."""
        hidden_BTH = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_NH = hidden_BTH[:, :-1].flatten(0, 1)
        target_N = ids_BT[:, 1:].flatten()
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        for part in zip(hidden_NH.split(self._chunk), target_N.split(self._chunk), strict=True):
            # Without gradients there is nothing to recompute.
            total = total + (
                checkpoint(self._sum, *part, use_reentrant=False) if torch.is_grad_enabled() else self._sum(*part)
            )
        return total / len(target_N)

    def _sum(self, hidden_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        logits_NV: Any = self._head[0](hidden_NH)
        return F.cross_entropy(logits_NV.float(), target_N, reduction="sum")
