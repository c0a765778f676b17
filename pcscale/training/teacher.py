"""The frozen base as a teacher: targets for a step's batches, from a layer-major pass or made before the run."""

from collections.abc import Iterable

import torch

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.ledger import TEACHER, ledger, placement_of
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES
from pcscale.config.schema import DistillConfig
from pcscale.model.loss import Distillation
from pcscale.training.teacher_cache import SequenceAddress, TeacherCache, sequence_key


class Teacher:
    """The live teacher: the base itself, run on `device` over the tokens that the compressed model is trained on.

    Memory: one layer, the targets of the step's tokens on the host (hidden states, or its most likely tokens), and
    where its whole distribution counts its head on the device.
    """

    def __init__(self, base: MappedBase, settings: DistillConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._settings = LayerMajorModel(base, device, dtype), settings
        head_VH = self._model.head() if settings.top_k is None else None
        if head_VH is not None:
            ledger.keep(self, TEACHER, placement_of(device), head_VH.nbytes)
        self.distillation = Distillation(settings.weight, settings.temperature, head_VH)

    @property
    def read_bytes(self) -> int:
        """Bytes of the base's weights that were read so far."""
        return self._model.read_bytes

    def targets(self, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """The targets of each batch `[B, T]`, as `NextTokenLoss` takes them, on the host."""
        settings, targets = self._settings, []
        for hidden in self._model.hidden_states(batches, None):
            if settings.top_k is None:
                targets += [(hidden_BTH,) for hidden_BTH in hidden]
            else:
                targets += self._model.most_likely(hidden, settings.top_k, settings.temperature)
        return targets


class CachedTeacher:
    """Targets that were made before the run, found by the token ids of a sequence.

    Args:
        settings: of run.yaml; `top_k` is the cache's or less.
        sequences: token ids `[T]` of every sequence that will be asked for.
        more: the command that adds what is missing, for errors.
        check: compare the cache's files with their fingerprints first.

    Raises:
        RequestError: a file of the cache is missing or was changed, or it lacks some of the sequences.

    Memory: some 180 bytes a sequence, and the targets of the step's tokens, on the host; the cache is file-backed.
    """

    def __init__(
        self, cache: TeacherCache, settings: DistillConfig, sequences: Iterable[torch.Tensor], more: str, check: bool
    ) -> None:
        assert settings.top_k is not None
        if check:
            cache.check(f"Remove it and make it again: {more}")
        self._cache, self._top_k = cache, settings.top_k
        self._addresses: dict[bytes, SequenceAddress | None] = dict.fromkeys(map(sequence_key, sequences))
        for key, address in cache.addresses():
            if key in self._addresses:
                self._addresses[key] = address
        missing = sum(address is None for address in self._addresses.values())
        if missing:
            raise RequestError(
                f"distill.cache {cache.folder} lacks {missing:,} of the {len(self._addresses):,} sequences that this "
                f"run trains on. Add them: {more}"
            )
        ledger.keep(self, TEACHER, "host", CACHED_SEQUENCE_BYTES * len(self._addresses))
        console.info(f"teacher: {len(self._addresses):,} sequences found in {cache.folder}")
        self.distillation = Distillation(settings.weight, settings.temperature)
        self.read_bytes = 0

    def targets(self, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """For each batch `[B, T]` the most likely tokens, int32 `[B, T, k]`, and logarithms, float32, on the host."""
        targets = []
        for ids_BT in batches:
            top_BTk = torch.empty(*ids_BT.shape, self._top_k, dtype=torch.int32)
            log_p_BTk = torch.empty(top_BTk.shape)
            for row, ids_T in enumerate(ids_BT):
                address = self._addresses[sequence_key(ids_T)]
                assert address is not None
                # Copied at once: a view keeps its shard open.
                top_Tk, log_p_Tk = self._cache.targets(address, self._top_k)
                top_BTk[row], log_p_BTk[row] = top_Tk, log_p_Tk
                self.read_bytes += top_Tk.nbytes + log_p_Tk.nbytes
            targets.append((top_BTk, log_p_BTk))
        return targets


AnyTeacher = Teacher | CachedTeacher
