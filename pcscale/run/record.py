"""The record of a run: everything that its files hold, written part by part and read as one typed value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pcscale.common.errors import RequestError
from pcscale.config.load import load_run_config
from pcscale.config.schema import RunConfig
from pcscale.run.documents import RESTORE, Count, Number, Seconds, read_document
from pcscale.run.folder import RunFolder
from pcscale.run.metrics import MetricsRow, read_metrics

PLAN_KEYS = (
    *("base", "compressed", "trainable", "flops", "moved", "written_bytes_per_step", "communicated_bytes_per_step"),
    *("peak", "phases", "alternatives"),
)
MERGE_KEYS = ("bytes_written", "shards", "checkpoint")


@dataclass(frozen=True)
class ModelResult:
    """Held-out results of a model.

    Attributes:
        loss: mean next-token loss. Units: nats a token.
        bits_per_byte: total loss over the text's UTF-8 bytes. Units: bits a byte.
        tokens: tokens that were predicted.
        parameters: the model's size, tied embeddings counted once.
    """

    loss: Number
    perplexity: Number
    bits_per_byte: Number
    tokens: Count
    parameters: Annotated[Count, Field(gt=0)]
    tokens_per_second: Number


@dataclass(frozen=True)
class GeneratedText:
    """A prompt of held-out text, and how the compressed model goes on."""

    prompt: str
    compressed: str


@dataclass(frozen=True)
class Evaluation:
    """The contents of evaluation.json; None: the run has not got there."""

    base: ModelResult | None = None
    start: ModelResult | None = None
    compressed: ModelResult | None = None
    sample: GeneratedText | None = None

    @property
    def models(self) -> dict[str, ModelResult]:
        """The results there are, by model."""
        results = {"base": self.base, "start": self.start, "compressed": self.compressed}
        return {name: result for name, result in results.items() if result is not None}


@dataclass
class Peaks:
    """The highest memory of each kind, and all that was written to disks. None: not there, or not told. Units: bytes.

    Attributes:
        host_unique: memory that would be free if the process ended.
        device, device_reserved: of torch's allocator, held and reserved, with the device's context.
    """

    host_anonymous: Count | None = None
    host_file: Count | None = None
    host_unique: Count | None = None
    pinned: Count | None = None
    device: Count | None = None
    device_reserved: Count | None = None
    written: Count = 0


@dataclass
class Usage:
    """Time and highest memory of a phase, or of a stage of it. Units: seconds, bytes.

    Attributes:
        components: by `host` and `device` and component, each one's own highest; of working memory, which is a
            difference, the value at the time when most was held there.
        most: by `host` and `device`, the sum at that time.
        stages: usage of each stage by its name; empty: the phase has none.
    """

    seconds: Seconds = 0.0
    peak: Peaks = field(default_factory=Peaks)
    components: dict[str, dict[str, Count]] = field(default_factory=lambda: {"host": {}, "device": {}})
    most: dict[str, Count] = field(default_factory=dict)
    stages: dict[str, "Usage"] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """The machine that figures were measured on. Units: bytes."""

    cpu: str
    cores: Count
    gpu: str | None
    memory_bytes: Count


@dataclass(frozen=True)
class MemoryLimits:
    """The memory that a run could use; None: no limit is known. Units: bytes."""

    host_bytes: Count | None
    host_source: str
    device_bytes: Count | None


@dataclass(frozen=True)
class RunUsage:
    """The contents of usage.json."""

    phases: dict[str, Usage]
    machine: Machine
    limits: MemoryLimits


@dataclass(frozen=True)
class Sample:
    """Memory held at one time. Units: seconds since the run began, bytes by component."""

    seconds: Seconds
    phase: str
    stage: str | None
    host: dict[str, Count]
    device: dict[str, Count]

    @property
    def total(self) -> int:
        """Host and device together."""
        return sum(self.host.values()) + sum(self.device.values())


@dataclass(frozen=True)
class MemorySamples:
    """The contents of memory.json, in the order of time."""

    samples: list[Sample]


@dataclass(frozen=True)
class RunRecord:
    """A run as far as it has got.

    Attributes:
        settings_text: run.yaml as it stands in the folder.
        plan: plan.json, which has `PLAN_KEYS` at least; None: the run is not planned yet.
        merge: merge.json, which has `MERGE_KEYS` at least; None: nothing is merged yet.
        usage: None: nothing is measured yet.
        samples: memory over time; empty: none were kept.
    """

    path: Path
    config: RunConfig
    settings_text: str
    steps: list[MetricsRow]
    plan: dict[str, Any] | None
    evaluation: Evaluation
    merge: dict[str, Any] | None
    usage: RunUsage | None
    samples: list[Sample]

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """The record of a run folder, in which only run.yaml and metrics.jsonl must be there.

        Raises:
            RequestError: the folder is absent, is no run folder, or a file in it is broken.
        """
        folder = RunFolder(path)
        if not path.is_dir():
            raise RequestError(f"{path} is not a folder. Name the output folder of a run.")
        for file in (folder.settings, folder.metrics):
            if not file.is_file():
                raise RequestError(
                    f"{path} is not a run folder: it has no {file.name}, expected run.yaml and metrics.jsonl. "
                    "Name the output folder of a run whose training has begun."
                )
        memory = read_document(folder.memory, MemorySamples, "Restore or remove the file: a report does without it.")
        return cls(
            path=path,
            config=load_run_config(folder.settings),
            settings_text=folder.settings.read_text(encoding="utf-8"),
            steps=read_metrics(folder.metrics),
            plan=_read_keys(folder.plan, PLAN_KEYS),
            evaluation=read_document(folder.evaluation, Evaluation) or Evaluation(),
            merge=_read_keys(folder.merge_result, MERGE_KEYS),
            usage=read_document(folder.usage, RunUsage),
            samples=memory.samples if memory else [],
        )


def _read_keys(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """A document that is kept as it is, with its keys checked."""
    document = read_document(path, dict[str, Any])
    missing = [key for key in keys if document is not None and key not in document]
    if missing:
        raise RequestError(f"{path} has no '{missing[0]}'. {RESTORE}")
    return document
