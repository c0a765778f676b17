"""The frozen base as a teacher: all micro batches of a step go through it layer by layer, each weight read once."""

import torch

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.common.ledger import TEACHER, home_of, ledger
from pcscale.compressed.loss import Distillation
from pcscale.config.schema import DistillConfig


class Teacher:
    """What the base says of the tokens that the compressed model is trained on.

    Args:
        base: the frozen base.
        settings: of run.yaml.
        device: where its layers run.
        dtype: what they run in.

    Memory: one layer, what it says of the step's tokens on the host (hidden states, or its most likely tokens), and
    where its whole distribution counts its head on the device.
    """

    def __init__(self, base: MappedBase, settings: DistillConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._settings = LayerMajorModel(base, device, dtype), settings
        head_VH = self._model.head() if settings.top_k is None else None
        if head_VH is not None:
            ledger.keep(self, TEACHER, home_of(device), head_VH.nbytes)
        self.distillation = Distillation(settings.weight, settings.temperature, head_VH)

    def says(self, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Of each batch `[B, T]` what `NextTokenLoss` takes, on the host."""
        settings, said = self._settings, []
        for hidden in self._model.hidden_states(batches, None):
            if settings.top_k is None:
                said += [(hidden_BTH,) for hidden_BTH in hidden]
            else:
                said += self._model.most_likely(hidden, settings.top_k, settings.temperature)
        return said
