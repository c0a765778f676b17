"""One run, opened once and passed down: its settings, and everything that follows from them before any work."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder, resolve_base
from pcscale.common.errors import RequestError
from pcscale.common.topology import ALONE, Group, Topology
from pcscale.config.schema import RunConfig
from pcscale.data.text import describe
from pcscale.data.tokens import load_tokenizer
from pcscale.distributed.settings import EngineSettings, read_engine_settings
from pcscale.families.plan import Plan
from pcscale.families.widths import make_plan
from pcscale.projection.checkpoint import check_checkpoint
from pcscale.run.folder import RunFolder, check_output
from pcscale.run.manifest import Manifest
from pcscale.training.state import check_batch
from pcscale.training.teacher_cache import TeacherCache, open_cache
from pcscale.training.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A run whose request was found to be right.

    Attributes:
        folder: where its results lie; nothing has been written there yet.
        group: the processes of the run.
        engine: DeepSpeed's settings; None: one process without it.
        source: the base's folder and name.
        base: the base, mapped, or under ZeRO.
        device: this rank's GPU, or the host's processor.
        checkpoint: the one that it goes on from, with its manifest; None: the run begins.
        cache: the teacher targets that it learns from; None: none, or the base teaches live.
    """

    config: RunConfig
    folder: RunFolder
    group: Group
    engine: EngineSettings | None
    source: BaseFolder
    base: MappedBase
    plan: Plan
    device: torch.device
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: tuple[Path, Manifest] | None
    cache: TeacherCache | None

    @property
    def manifest(self) -> Manifest | None:
        """The checkpoint's; None: the run begins."""
        return self.checkpoint[1] if self.checkpoint else None

    @property
    def is_first(self) -> bool:
        """True on the rank that writes the run folder."""
        return self.group.topology.is_first

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's own forward pass: without a GPU bfloat16 saves no time in it."""
        return torch.bfloat16 if self.device.type == "cuda" and self.config.bf16 else torch.float32

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that the compressed model is held and run in."""
        return torch.bfloat16 if self.config.bf16 else torch.float32

    @cached_property
    def sequences_per_step(self) -> int:
        """Sequences that a step sees, over all ranks."""
        return self.config.sequences_per_step * self.group.topology.world_size


def open_run(
    config: RunConfig,
    resume: bool,
    engine: EngineSettings | None = None,
    group: Group = ALONE,
    checkpoint: Path | None = None,
) -> Run:
    """Check a request and open what it names; nothing is written and no weight is read.

    Args:
        resume: whether the output folder may hold a run that is gone on with.
        checkpoint: the last one of that run; None: there is none.

    Raises:
        RequestError: with the first thing that is wrong.
    """
    check_trackers(config.report_to)
    folder = RunFolder(Path(config.output).expanduser())
    check_output(folder, config, resume)
    manifest = Manifest.read(checkpoint) if checkpoint else None
    if engine is not None and group is not ALONE:
        from pcscale.distributed.engine import check_settings

        check_settings(engine)
    source = resolve_base(config.base)
    base = _open_base(source, manifest, config, engine, group)
    plan = make_plan(base.family, base.config, config)
    if checkpoint and manifest:
        check_checkpoint(manifest, plan, config.method, base)
        batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        check_batch(checkpoint, batch, accumulation, Topology.launched().world_size)
    cache = None
    if config.distill is not None and config.distill.cache is not None and not _is_complete(manifest, config):
        cache = open_cache(config.distill, config.sequence_length, base, manifest)
    tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
    for sources in (config.data.train, config.data.validation or []):
        describe(sources)
    device = torch.device(group.device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    going_on = (checkpoint, manifest) if checkpoint and manifest else None
    return Run(config, folder, group, engine, source, base, plan, device, tokenizer, going_on, cache)


def read_engine(config: RunConfig) -> EngineSettings | None:
    """The settings of DeepSpeed for the processes that were started; None: one process without it.

    Raises:
        RequestError: several and no DeepSpeed file, a file that contradicts run.yaml, or no deepspeed.
    """
    world_size = Topology.launched().world_size
    if config.deepspeed is None:
        if world_size > 1:
            raise RequestError(
                f"started on {world_size} processes, and run.yaml names no DeepSpeed file. "
                "Set deepspeed, for instance to zero1."
            )
        return None
    engine = read_engine_settings(config.deepspeed, config, world_size)
    if find_spec("deepspeed") is None:
        raise RequestError("deepspeed needs the package deepspeed. Run `pip install 'pcscale[deepspeed]'`.")
    return engine


def _is_complete(manifest: Manifest | None, config: RunConfig) -> bool:
    return manifest is not None and manifest.step >= config.max_steps


def _open_base(
    source: BaseFolder, manifest: Manifest | None, config: RunConfig, engine: EngineSettings | None, group: Group
) -> MappedBase:
    expected = manifest.base_fingerprints if manifest else None
    if config.base_home != "zero" or engine is None or group is ALONE:
        return MappedBase(source, expected)
    from pcscale.distributed.zero_base import ZeroBase

    return ZeroBase(source, expected, engine.zero, group)
