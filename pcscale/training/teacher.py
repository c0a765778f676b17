"""The frozen base as a teacher: a step's batches go through it layer by layer, or were given to it before the run."""

from collections.abc import Iterable
from pathlib import Path
from shlex import quote

import torch

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.ledger import TEACHER, ledger, placement_of
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES
from pcscale.common.topology import Topology
from pcscale.config.schema import DistillConfig, RunConfig
from pcscale.data.loader import sequences_seen
from pcscale.model.loss import Distillation
from pcscale.training.teacher_cache import Place, TeacherCache, sequence_key


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
            ledger.keep(self, TEACHER, placement_of(device), head_VH.nbytes)
        self.distillation = Distillation(settings.weight, settings.temperature, head_VH)

    @property
    def read_bytes(self) -> int:
        """Of the base's weights, so far."""
        return self._model.read_bytes

    def says(self, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Of each batch `[B, T]` what `NextTokenLoss` takes, on the host."""
        settings, said = self._settings, []
        for hidden in self._model.hidden_states(batches, None):
            if settings.top_k is None:
                said += [(hidden_BTH,) for hidden_BTH in hidden]
            else:
                said += self._model.most_likely(hidden, settings.top_k, settings.temperature)
        return said


class CachedTeacher:
    """What the base has said before, found by the token ids of a sequence.

    Args:
        cache: where it is kept.
        settings: of run.yaml; `top_k` is the cache's or less.
        sequences: token ids `[T]` of every sequence that will be asked for.
        more: the command that adds what is missing, for errors.
        check: compare the cache's files with their fingerprints first.

    Raises:
        RequestError: a file of the cache is missing or was changed, or it lacks some of the sequences.

    Memory: some 180 bytes a sequence, and what is said of the step's tokens, on the host; the cache is file-backed.
    """

    def __init__(
        self, cache: TeacherCache, settings: DistillConfig, sequences: Iterable[torch.Tensor], more: str, check: bool
    ) -> None:
        assert settings.top_k is not None
        if check:
            cache.check(f"Remove it and make it again: {more}")
        self._cache, self._top_k = cache, settings.top_k
        self._places: dict[bytes, Place | None] = dict.fromkeys(map(sequence_key, sequences))
        for key, place in cache.places():
            if key in self._places:
                self._places[key] = place
        missing = sum(place is None for place in self._places.values())
        if missing:
            raise RequestError(
                f"distill.cache {cache.folder} lacks {missing:,} of the {len(self._places):,} sequences that this run "
                f"trains on. Add them: {more}"
            )
        ledger.keep(self, TEACHER, "host", CACHED_SEQUENCE_BYTES * len(self._places))
        self.distillation = Distillation(settings.weight, settings.temperature)
        self.read_bytes = 0

    def says(self, batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Of each batch `[B, T]` the most likely tokens, int32 `[B, T, k]`, and logarithms, float32, on the host."""
        said = []
        for ids_BT in batches:
            top_BTk = torch.empty(*ids_BT.shape, self._top_k, dtype=torch.int32)
            log_p_BTk = torch.empty(top_BTk.shape)
            for row, ids_T in enumerate(ids_BT):
                place = self._places[sequence_key(ids_T)]
                assert place is not None
                # Copied at once: a view keeps its shard open.
                top_Tk, log_p_Tk = self._cache.said(place, self._top_k)
                top_BTk[row], log_p_BTk[row] = top_Tk, log_p_Tk
                self.read_bytes += top_Tk.nbytes + log_p_Tk.nbytes
            said.append((top_BTk, log_p_BTk))
        return said


AnyTeacher = Teacher | CachedTeacher


def find_taught(
    cache: TeacherCache, config: RunConfig, train_NT: torch.Tensor, topology: Topology, run_yaml: Path
) -> CachedTeacher:
    """The teacher of a run, with every sequence that the run will train on.

    Args:
        run_yaml: the run's settings, for the command that adds what is missing.

    Raises:
        RequestError: a file of the cache is missing or was changed, or it lacks some of the sequences.
    """
    distill = config.distill
    assert distill is not None
    count = config.max_steps * config.sequences_per_step * topology.world_size
    seen = sequences_seen(len(train_NT), config.seed, count)
    more = f"pcscale teach {quote(str(run_yaml))} --tokens {train_NT.numel()}"
    if distill.top_k != cache.manifest.top_k:
        more += f" --top-k {cache.manifest.top_k}"
    in_bf16 = cache.manifest.dtype == "bfloat16"
    if in_bf16 != config.bf16:
        more += f" bf16={str(in_bf16).lower()}"
        if config.gradient_dtype == "bfloat16":  # Refused without bf16.
            more += " gradient_dtype=float32"
    check = topology.local_rank == 0  # Once a host.
    # One by one: together they would be a second copy of the text.
    teacher = CachedTeacher(cache, distill, (train_NT[row] for row in seen.numpy()), more, check)
    console.say(f"teacher: {len(seen):,} sequences found in {cache.folder}")
    return teacher
