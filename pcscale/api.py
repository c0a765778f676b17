"""The library: everything that `import pcscale` offers.

    import pcscale

    report = pcscale.compress("run.yaml", max_steps=500)               # the whole job, as the command does it

    c = pcscale.prepare("HuggingFaceTB/SmolLM2-135M", keep=0.5, text=batches)
    optimizer = pcscale.ProjectedAdamW(c)                               # c.model is a stock AutoModelForCausalLM
    ...                                                                 # any training loop
    optimizer.save_pretrained("checkpoint")
    pcscale.merge("checkpoint", "merged")

Messages go to the logger `pcscale`; progress is shown by the command line alone.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pcscale.base.held import HeldBase
from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.collect import collect_scores, read_rebuilt, write_rebuilt
from pcscale.calibration.select import select
from pcscale.common.errors import PcscaleError, RequestError
from pcscale.common.files import read_json
from pcscale.common.units import parse_bytes
from pcscale.config import defaults
from pcscale.config.load import check_settings, check_values, read_values
from pcscale.config.schema import TEXT_FREE, EvaluateSettings, PlanConfig, RunConfig
from pcscale.data.tokens import load_tokenizer, read_sequences
from pcscale.families.hf_config import read_config
from pcscale.families.registry import family_of
from pcscale.families.widths import make_plan
from pcscale.jobs.compress import calibration_batches
from pcscale.jobs.compress import compress as run_job
from pcscale.jobs.evaluate import evaluate as run_evaluation
from pcscale.memory.predict import Prediction
from pcscale.merging.merge import MergeResult, find_base
from pcscale.merging.merge import merge as run_merge
from pcscale.model.compressed import build_compressed
from pcscale.projection.checkpoint import load_state, read_fixed, record_format_of
from pcscale.projection.compression import Base, Compression, Method
from pcscale.projection.residency import State
from pcscale.projection.starts import Start, make_start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.folder import BASE_CACHE_NAME, RunFolder
from pcscale.run.manifest import TRAINER_NAME, Manifest
from pcscale.run.record import Evaluation, RunRecord
from pcscale.training.hf_trainer import ProjectionCallback

__all__ = [
    "Compression",
    "PcscaleError",
    "ProjectedAdamW",
    "ProjectionCallback",
    "RunConfig",
    "RunReport",
    "State",
    "compress",
    "evaluate",
    "from_checkpoint",
    "merge",
    "plan",
    "prepare",
]


@dataclass(frozen=True)
class RunReport:
    """The outcome of a finished run.

    Attributes:
        folder: the run's.
        document: the contents of report.json.
    """

    folder: Path
    document: dict[str, Any]

    @property
    def merged(self) -> Path:
        """The compressed model, an ordinary Hugging Face folder."""
        return RunFolder(self.folder).merged

    @property
    def evaluation(self) -> Evaluation:
        """Held-out results of base, start and compressed model."""
        return RunRecord.read(self.folder).evaluation


def compress(
    config: RunConfig | Mapping[str, Any] | str | Path, *, resume: bool = False, force: bool = False, **overrides: Any
) -> RunReport:
    """Run the whole job: plan, calibrate, train, merge, evaluate, report.

    Args:
        config: settings, a mapping of them, or the path of a run.yaml.
        resume: go on with the run in the output folder; where there is none, begin one.
        force: run also what is predicted not to fit.
        overrides: settings that replace those of `config`.

    Raises:
        PcscaleError: the request is wrong, does not fit, or the run failed.
    """
    if isinstance(config, RunConfig):
        values: Mapping[str, Any] = config.model_dump(exclude_unset=True)
    else:
        values = config if isinstance(config, Mapping) else read_values(Path(config))
    checked = check_values({**values, **overrides}, "compress")
    return RunReport(Path(checked.output).expanduser(), run_job(checked, resume=resume, force=force))


def plan(base: str | Path, **settings: Any) -> dict[str, Any]:
    """The plan of a run on one GPU: legal widths, parameters, FLOPs, predicted memory, bytes moved. Reads no weight.

    Args:
        base: checkpoint folder (config.json alone is enough) or Hub id.
        settings: of run.yaml, such as `keep`, `hidden_size` and `intermediate_size`, `residency`.

    Returns:
        The document that `pcscale plan --json` prints.
    """
    config = check_settings(PlanConfig, {"base": str(base), **settings}, "plan")
    source = resolve_base(config.base, config_only=True)
    base_config = read_config(source.folder)
    family = family_of(base_config, str(source.folder / "config.json"))
    return Prediction(make_plan(family, base_config, config), config).document(source.name)


def prepare(
    base: str | Path,
    *,
    keep: float | None = None,
    target_params: float | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    text: Sequence[torch.Tensor] | Sequence[str] | str = (),
    method: Method = "projected",
    start: str = defaults.START,
    importance: str = defaults.IMPORTANCE,
    calibration_tokens: int = defaults.CALIBRATION_TOKENS,
    sequence_length: int = defaults.SEQUENCE_LENGTH,
    base_home: Literal["disk", "cpu", "device"] = "disk",
    base_precision: Literal["stored", "int8"] = "stored",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Compression:
    """Plan a compression, calibrate on text, and build the compressed model at its start.

    Args:
        base: checkpoint folder or Hub id.
        keep, target_params, hidden_size, intermediate_size: the size, in one of run.yaml's three ways; half of the
            parameters where none is given.
        text: token ids as batches `[B, T]`, or files, globs or a Hub data set id, of which `calibration_tokens` in
            sequences of `sequence_length` are used. Not needed with importance `magnitude` or `random`.
        method, start, importance, base_home, base_precision: as in run.yaml.
        dtype: of the compressed model: float32 or bfloat16.
        device: of model, calibration and sweep; None: a GPU where there is one.
        seed: of random scores.

    Raises:
        PcscaleError: the base, the size, the text or a setting is not usable.

    Memory: calibration holds one layer of the base; the start's tensors beside the model that copies them.
    """
    sizes = {"keep": keep, "target_params": target_params, "hidden_size": hidden_size}
    sizes |= {"intermediate_size": intermediate_size, "sequence_length": sequence_length}
    values = {"base": str(base), "method": method, "start": start, "importance": importance, "seed": seed}
    values |= {"base_home": base_home, "base_precision": base_precision, "bf16": dtype == torch.bfloat16}
    config = check_settings(PlanConfig, {**values, **sizes, "calibration_tokens": calibration_tokens}, "prepare")
    mapped = MappedBase(resolve_base(config.base))
    where = _device(device)
    base_dtype = torch.bfloat16 if where.type == "cuda" and config.bf16 else torch.float32
    cut = make_plan(mapped.family, mapped.config, config)
    batches = _batches(text, mapped, config)
    scratch = Path(tempfile.mkdtemp(prefix="pcscale-"))
    try:
        scores = collect_scores(cut, mapped, config.importance, batches, seed, where, base_dtype)
        rebuilt = {}
        if config.rebuilds:
            write_rebuilt(scratch / "rebuilt", cut, mapped, select(cut, scores), batches, where, base_dtype)
            rebuilt = read_rebuilt(scratch / "rebuilt")
        begin = make_start(config.start, cut, scores, mapped.tensor, rebuilt)
        model = build_compressed(cut, start_tensors(cut, begin, mapped.tensor, where), where, dtype)
        frozen = _frozen(mapped, config.base_precision, config.base_home, where, scratch / BASE_CACHE_NAME)
        compression = Compression(model, cut, frozen, begin, method)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Files that are mapped as long as the compression lives.
    weakref.finalize(compression, shutil.rmtree, scratch, ignore_errors=True)
    return compression


def from_checkpoint(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    state: State | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Compression, ProjectedAdamW]:
    """Go on from a checkpoint: the compression as it was trained so far, and its optimizer with all of its state.

    The optimizer has the rates that it was made with; a scheduler and the position in the data are the caller's.

    Args:
        folder: a checkpoint that `save_pretrained` or a run wrote, or a run folder, whose last one is taken.
        base: the base; None: it is found by its name in the checkpoint. A base with other weights is refused.
        state: the residency from now on; the format of records is the checkpoint's.
        dtype: of the compressed model.

    Raises:
        PcscaleError: no such checkpoint, another base, or a file that was changed.
    """
    path = RunFolder(Path(folder)).latest_checkpoint() or Path(folder)
    manifest = Manifest.read(path)
    where, cut = _device(device), manifest.plan
    mapped = MappedBase(resolve_base(str(base)) if base else find_base(manifest), manifest.base_fingerprints)
    scratch = Path(tempfile.mkdtemp(prefix="pcscale-"))
    precision = "int8" if manifest.coded_fingerprints else "stored"
    frozen = _frozen(mapped, precision, "disk", where, scratch / BASE_CACHE_NAME)
    model = build_compressed(cut, {p.name: torch.zeros(p.shape) for p in cut.weights}, where, dtype)
    form = record_format_of(path, manifest)
    begin = Start(read_fixed(path, manifest), moves_aux=form.aux_start)
    compression = Compression(model, cut, frozen, begin, manifest.method)
    weakref.finalize(compression, shutil.rmtree, scratch, ignore_errors=True)
    made_with = read_json(path / TRAINER_NAME)["optimizer"]
    kept = {"record_dtype": form.dtype, "moments": form.moments, "projection_rank": form.rank}
    state = replace(state or State(), **kept, seed=made_with.pop("seed"))
    optimizer = ProjectedAdamW(compression, **{**made_with, "betas": tuple(made_with["betas"])}, state=state)
    load_state(path, optimizer)
    return compression, optimizer


def merge(
    checkpoint: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    *,
    max_shard_size: str | int = "5GB",
    max_memory: str | int = "2GiB",
    dtype: str | None = None,
    resume: bool = False,
) -> MergeResult:
    """Write the compressed model of a checkpoint as an ordinary Hugging Face folder, without ever holding a model.

    Args:
        checkpoint: a checkpoint, or a run folder, whose last one is taken.
        output: the folder to be; new or empty.
        base: the base; None: it is found by its name in the checkpoint. A base with other weights is refused.
        max_memory: cap on anonymous memory, beside 300 MiB of interpreter.
        dtype: float32, bfloat16 or float16; None: the base's.
        resume: keep the finished shards of an interrupted merge into the same folder.

    Raises:
        PcscaleError: no such checkpoint, another base, an output that holds something, or too little memory or disk.
    """
    path = RunFolder(Path(checkpoint)).latest_checkpoint() or Path(checkpoint)
    source = resolve_base(str(base)) if base else find_base(Manifest.read(path))
    sizes = parse_bytes(max_shard_size), parse_bytes(max_memory)
    return run_merge(path, MappedBase(source), Path(output), *sizes, dtype, resume)


def evaluate(
    model: str | Path,
    data: Sequence[str] | str,
    base: str | None = None,
    *,
    tokens: int = defaults.EVAL_TOKENS,
    sequence_length: int = defaults.SEQUENCE_LENGTH,
    batch_size: int = defaults.BATCH_SIZE,
) -> dict[str, Any]:
    """Held-out loss, perplexity, bits per byte, size and speed of a checkpoint folder, beside its base's where named.

    Args:
        data: files, globs or a Hub data set id.
        tokens: at most this many tokens of it.

    Returns:
        The document that `pcscale evaluate --json` prints.
    """
    sources = [data] if isinstance(data, str) else list(data)
    values = {"data": sources, "tokens": tokens, "sequence_length": sequence_length, "batch_size": batch_size}
    return run_evaluation(Path(model), base, check_settings(EvaluateSettings, values, "evaluate"))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _batches(
    text: Sequence[torch.Tensor] | Sequence[str] | str, base: MappedBase, config: PlanConfig
) -> list[torch.Tensor]:
    """Token batches to calibrate on."""
    if config.importance in TEXT_FREE:
        return []
    sources = [text] if isinstance(text, str) else list(text)
    batches = [batch for batch in sources if isinstance(batch, torch.Tensor)]
    if batches:
        return batches
    files = [source for source in sources if isinstance(source, str)]
    if not files:
        raise RequestError(
            "prepare calibrates on text: give token batches or files as `text`, "
            "or importance='magnitude' with start='selection'."
        )
    count = max(1, config.calibration_tokens // config.sequence_length)
    tokenizer = load_tokenizer(base.folder, trust_remote_code=False)
    ids_NT = read_sequences("text", files, tokenizer, config.sequence_length, count, base.config["vocab_size"])
    return calibration_batches(ids_NT, count, config.per_device_train_batch_size)


def _frozen(base: MappedBase, precision: str, home: str, device: torch.device, cache: Path) -> Base:
    """The base as the sweep reads it."""
    frozen = Int8Base(base, cache) if precision == "int8" else base
    return frozen if home == "disk" else HeldBase(frozen, device if home == "device" else torch.device("cpu"))
