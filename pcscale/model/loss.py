"""The training loss in chunks: the full `[tokens, vocab]` logits never exist, neither the model's nor the teacher's.

Legend: B batch, T tokens of a sequence, H residual size, N tokens, V vocabulary, k most likely tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pcscale.common.sizes import chunk_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distillation:
    """The teacher's share of the loss: `(1 - weight) CE + weight temperature² KL(teacher ‖ model)` at a temperature.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """

    weight: float
    temperature: float
    head_VH: torch.Tensor | None = None  # the teacher's, if its whole distribution counts; None: its most likely tokens


class NextTokenLoss(nn.Module):
    """A stock causal model with its loss: token ids in, mean cross entropy out, mixed with a teacher's divergence.

    The head is called as a module inside this one, chunk by chunk, and recomputed in the backward pass.
    """

    def __init__(self, model: "PreTrainedModel", distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model = model
        self._distillation = distillation
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        # A plain reference: registered twice, the head's parameters would have two names.
        self._head: tuple[nn.Module] = (head,)
        self._chunk = chunk_tokens(model.config.vocab_size)

    def forward(self, ids_BT: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        """The mean next-token loss in nats over B × (T - 1) tokens, a float32 scalar.

        Args:
            teacher: its targets for every token of the batch (`training/teacher.py`): its last hidden states
                `[B, T, H]`, or ids and logarithms of its most likely tokens `[B, T, k]`; nothing: cross entropy alone.
        """
        hidden_BTH = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_NH = hidden_BTH[:, :-1].flatten(0, 1)
        target_N = ids_BT[:, 1:].flatten()
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        targets = [values[:, :-1].flatten(0, 1) for values in teacher]
        for part in zip(*(values.split(self._chunk) for values in (hidden_NH, target_N, *targets)), strict=True):
            # Without gradients there is nothing to recompute.
            total = total + (
                checkpoint(self._sum, *part, use_reentrant=False) if torch.is_grad_enabled() else self._sum(*part)
            )
        return total / len(target_N)

    def _sum(self, hidden_NH: torch.Tensor, target_N: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        logits_NV: Any = self._head[0](hidden_NH).float()
        entropy = F.cross_entropy(logits_NV, target_N, reduction="sum")
        if not teacher or self._distillation is None:
            return entropy
        weight, temperature = self._distillation.weight, self._distillation.temperature
        log_q_NV = (logits_NV / temperature).log_softmax(-1)
        if self._distillation.head_VH is None:
            diverged = top_divergence(log_q_NV, *teacher)
        else:
            log_p_NV = (F.linear(teacher[0], self._distillation.head_VH).float() / temperature).log_softmax(-1)
            diverged = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
        return (1 - weight) * entropy + weight * temperature**2 * diverged


def top_divergence(log_q_NV: torch.Tensor, ids_Nk: torch.Tensor, log_p_Nk: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ model) over the teacher's most likely tokens and one event for all others, summed over tokens.

    q are the model's probabilities, p the teacher's, among all tokens; `ids_Nk` are its most likely ones.
    """
    log_q_Nk, log_p_Nk = log_q_NV.gather(-1, ids_Nk.long()), log_p_Nk.float()
    # Sums that round to one leave others a probability of zero, whose logarithm is not finite.
    others_q_N, others_p_N = ((-logs.logsumexp(-1).clamp_max(-_LEAST).expm1()).log() for logs in (log_q_Nk, log_p_Nk))
    of_top = (log_p_Nk.exp() * (log_p_Nk - log_q_Nk)).sum()
    return of_top + (others_p_N.exp() * (others_p_N - others_q_N)).sum()


_LEAST = 1e-6
"""Least probability that float32 can leave to all tokens that are not among the most likely."""
