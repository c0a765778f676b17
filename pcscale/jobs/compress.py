"""The whole job: plan → calibrate → train → merge → evaluate → report, in one run folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.calibration.collect import collect_scores, read_rebuilt, read_scores, write_rebuilt, write_scores
from pcscale.calibration.select import select
from pcscale.common.allocator import release_between_stages, release_freed
from pcscale.common.console import console
from pcscale.common.files import read_json, write_json
from pcscale.common.ledger import ledger
from pcscale.common.ranks import on_every_rank, on_first_rank
from pcscale.common.topology import ALONE, Group, Topology
from pcscale.common.units import parse_bytes
from pcscale.config.schema import TEXT_FREE, RunConfig
from pcscale.data.text import describe
from pcscale.data.tokens import TokenSets, count_text_bytes, load_tokenizer, prepare_tokens, wanted_sequences
from pcscale.evaluation.perplexity import HeldOut, evaluate_base, evaluate_model
from pcscale.jobs.fit import check_fit, check_requests, predict, say_plan, try_merge
from pcscale.jobs.processes import check_processes, processes, reported_once
from pcscale.jobs.run import Setup, build_training_parts, prepare
from pcscale.memory.limits import device_in_use, device_limit, host_in_use, host_limit
from pcscale.memory.process import machine
from pcscale.memory.series import Series
from pcscale.memory.tracker import Tracker, Usage, allocator_snapshot
from pcscale.memory.watchdog import Watchdog
from pcscale.merging.merge import merge
from pcscale.model.compressed import load_stock
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.persist import read_fixed
from pcscale.projection.starts import Start, make_start
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.reporting.report import write_report
from pcscale.run.folder import RunFolder, check_output, cut_metrics, open_run
from pcscale.run.manifest import Manifest
from pcscale.training.loop import Training, evaluate_now, train
from pcscale.training.state import TrainingState, check_batch, check_checkpoint, check_text, load_checkpoint
from pcscale.training.teacher import CachedTeacher, Teacher, find_taught
from pcscale.training.teacher_cache import TeacherCache, open_cache
from pcscale.training.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_PROMPT_TOKENS = 24
SAMPLE_NEW_TOKENS = 48


def compress(config: RunConfig, resume: bool = False, dry_run: bool = False, force: bool = False) -> dict[str, Any]:
    """Run the job that the settings describe.

    Args:
        resume: go on with the run in the output folder; where there is none, begin one.
        dry_run: check base, data, widths and output, and return the plan; nothing is written.
        force: begin also what is predicted not to fit.

    Returns:
        What report.json holds; with `dry_run` what plan.json would hold.

    Raises:
        RequestError: the request is wrong; found before anything is written where it can be.
        BudgetError: the run does not fit the memory or the disk that there is, or the merge's cap is too small.
        RunError: the run failed.
        Interrupted: the user asked to stop.
    """
    config = config.resolved()
    folder = RunFolder(Path(config.output).expanduser())
    if dry_run:
        reported_once(lambda: check_processes(config))
        begun = _begin(config, resume, force, folder.latest_checkpoint(), ALONE, dry_run)
        say_plan(begun.document, begun.setup, config, folder)
        return begun.document
    with processes(config) as group:
        # One rank looks, since two hosts may see a folder that they share at different times.
        checkpoint = on_first_rank(group, folder.latest_checkpoint)
        begun = on_every_rank(group, lambda: _begin(config, resume, force, checkpoint, group))
        return _go_on(begun, config, resume)


@dataclass(frozen=True)
class _Begun:
    """A run whose request was found to be right; nothing has been written yet."""

    setup: Setup
    tokenizer: "PreTrainedTokenizerBase"
    document: dict[str, Any]
    checkpoint: Path | None
    manifest: Manifest | None
    cache: TeacherCache | None


def _begin(
    config: RunConfig, resume: bool, force: bool, checkpoint: Path | None, group: Group, dry_run: bool = False
) -> _Begun:
    check_trackers(config)
    folder = RunFolder(Path(config.output).expanduser())
    check_output(folder, config, resume)
    manifest = Manifest.read(checkpoint) if checkpoint else None
    setup = prepare(config, manifest.base_fingerprints if manifest else None, group)
    if checkpoint and manifest:
        check_checkpoint(manifest, setup.plan, config.method, setup.base)
        check_batch(checkpoint, config, Topology.launched().world_size)
    cache = open_cache(config, setup.base, manifest)
    tokenizer = load_tokenizer(setup.source.folder, config.trust_remote_code)
    for sources in (config.data.train, config.data.validation or []):
        describe(sources)
    if not dry_run and group.topology.is_first:
        folder.clear_residency()
    check_requests(setup, config, folder)
    document = predict(setup, config)
    check_fit(document, setup, config, folder, force)
    return _Begun(setup, tokenizer, document, checkpoint, manifest, cache)


def _go_on(begun: _Begun, config: RunConfig, resume: bool) -> dict[str, Any]:
    """Everything after the checks: the first rank writes the run folder; all of them train."""
    group, checkpoint, manifest = begun.setup.group, begun.checkpoint, begun.manifest
    folder = on_first_rank(group, lambda: open_run(config, resume))
    run = _Run(config, folder, begun.setup, begun.tokenizer, begun.cache)

    def first_results() -> None:
        if not checkpoint:
            folder.clear_results()
        write_json(folder.plan, begun.document)
        say_plan(begun.document, begun.setup, config, folder)
        try_merge(begun.setup, config, folder)
        run.prepare_tokens()

    # The other ranks find the tokens that the first one has prepared.
    on_first_rank(group, first_results)
    on_every_rank(group, lambda: None if group.topology.is_first else run.prepare_tokens())
    on_every_rank(group, run.find_taught)
    if checkpoint and manifest:
        on_every_rank(group, lambda: check_text(checkpoint, run.tokens.fingerprint))
        start = Start(read_fixed(checkpoint, manifest))
    else:
        run.with_base(run.calibrate)
        start = run.start()
    if not on_first_rank(group, lambda: "base" in run.evaluation()):
        run.with_base(run.evaluate_base)
    run.train(start, checkpoint, manifest)
    on_first_rank(group, run.merge)
    on_first_rank(group, run.evaluate_merged)
    return on_first_rank(group, lambda: write_report(folder.path))


@dataclass
class _Run:
    """The parts of one job, each of which leaves its result in the run folder."""

    config: RunConfig
    folder: RunFolder
    setup: Setup
    tokenizer: "PreTrainedTokenizerBase"
    cache: TeacherCache | None = None
    cached_teacher: CachedTeacher | None = None

    def __post_init__(self) -> None:
        phases = read_json(self.folder.usage)["phases"] if self.folder.usage.exists() else {}
        self.limits = {"host": (host_limit(), host_in_use), "device": (device_limit(), device_in_use)}
        self.tracker = Tracker(
            {name: Usage.read(values) for name, values in phases.items()},
            Series.read(self.folder.memory),
            Watchdog(self.limits) if self.setup.group.topology.local_rank == 0 else None,
        )
        self.tokens: TokenSets

    def prepare_tokens(self) -> None:
        config = self.config
        wanted = wanted_sequences(config, self.setup.group.topology.world_size)
        vocab_size = self.setup.base.config["vocab_size"]
        self.tokens = prepare_tokens(config, self.tokenizer, self.folder.path, wanted, vocab_size)
        console.say(
            f"data: {self.tokens.train_NT.numel():,} training tokens, "
            f"{self.tokens.validation_MT.numel():,} held-out tokens"
        )

    def find_taught(self) -> None:
        """Find in the cache, where the run has one, every sequence that it will train on."""
        if self.cache is not None:
            topology, settings = self.setup.group.topology, self.folder.settings
            self.cached_teacher = find_taught(self.cache, self.config, self.tokens.train_NT, topology, settings)

    def with_base(self, work: Callable[[], None]) -> None:
        """Do what only the first rank need do, on all ranks where they read the base together."""
        if self.setup.base.collective:
            work()
        else:
            on_first_rank(self.setup.group, work)

    def calibrate(self) -> None:
        config, setup = self.config, self.setup
        with self._phase("calibrate"):
            batches = calibration_batches(self.tokens.train_NT, config)
            scores = collect_scores(
                setup.plan, setup.base, config.importance, batches, config.seed, setup.device, setup.base_dtype
            )
            tokens = sum(batch.numel() for batch in batches) if config.importance not in TEXT_FREE else 0
            if setup.group.topology.is_first:
                write_scores(self.folder.scores, scores, config.importance, tokens)
            if config.rebuilds:
                path = self.folder.rebuilt if setup.group.topology.is_first else None
                kept = select(setup.plan, scores)
                write_rebuilt(path, setup.plan, setup.base, kept, batches, setup.device, setup.base_dtype)

    def start(self) -> Start:
        """What training begins with, the same on all ranks."""
        setup, config, folder = self.setup, self.config, self.folder

        def make() -> Start:
            return make_start(config.start, setup.plan, read_scores(folder.scores), setup.base.tensor, rebuilt={})

        # Where the ranks read the base together all of them make it, and the first one's counts.
        start = setup.group.gather(make())[0] if setup.base.collective else on_first_rank(setup.group, make)
        rebuilt = on_every_rank(setup.group, lambda: read_rebuilt(folder.rebuilt)) if config.rebuilds else {}
        return replace(start, rebuilt={**start.rebuilt, **rebuilt})

    @property
    def held_out(self) -> HeldOut:
        ids_MT = self.tokens.validation_MT
        return HeldOut(ids_MT, count_text_bytes(ids_MT[:, 1:].flatten(), self.tokenizer))

    def evaluate_base(self) -> None:
        setup, batch = self.setup, self.config.per_device_train_batch_size
        with self._phase("evaluate"):
            result = evaluate_base(
                setup.base, setup.plan.base_parameters, self.held_out, batch, setup.device, setup.base_dtype
            )
        self._add_evaluation("base", asdict(result))
        console.say(f"base: held-out loss {result.loss:.4f}")

    def train(self, start: Start, checkpoint: Path | None, manifest: Manifest | None) -> None:
        config = self.config
        if manifest and manifest.step >= config.max_steps:
            console.say(f"training is complete at step {manifest.step}")
            on_first_rank(self.setup.group, lambda: cut_metrics(self.folder.metrics, manifest.step))
            return
        on_first_rank(self.setup.group, self.folder.forget_merged)
        try:
            with (
                self._phase("train"),
                allocator_snapshot(self.folder.memory_snapshot if config.memory_snapshot else None),
            ):
                # Held until the phase has been measured: the ledger strikes it out before its memory is given back.
                training = self._train(start, checkpoint, manifest)
            del training
        finally:
            self.folder.clear_records(self.setup.group.topology.rank)
        release_freed()

    def _train(self, start: Start, checkpoint: Path | None, manifest: Manifest | None) -> Training:
        config, group = self.config, self.setup.group
        torch.manual_seed(config.seed)
        with ledger.during("start"):
            training = self._build(start, checkpoint, manifest)
            on_first_rank(group, lambda: self.folder.rebuilt.unlink(missing_ok=True))
            release_between_stages(training.optimizer.engine.device)
        if not checkpoint and "start" not in self.evaluation():
            self._evaluate_start(training)
        if group.topology.is_first:
            cut_metrics(self.folder.metrics, training.state.step)
        train(training)
        training.optimizer.engine.stop()
        return training

    def _build(self, start: Start, checkpoint: Path | None, manifest: Manifest | None) -> Training:
        """Model and optimizer at their start, or where the checkpoint left them."""
        config, setup, group = self.config, self.setup, self.setup.group
        expected_codes = manifest.coded_fingerprints if manifest else None
        teacher = self.cached_teacher
        if config.distill is not None and teacher is None:
            teacher = Teacher(setup.base, config.distill, setup.device, setup.base_dtype)
        distillation = teacher and teacher.distillation

        def build() -> tuple[NextTokenLoss, ProjectedAdamW]:
            return build_training_parts(setup, config, start, self.folder, expected_codes, distillation)

        if config.base_precision == "int8" and group.topology.world_size > 1:
            # The first rank codes the base for all hosts.
            on_first_rank(group, lambda: Int8Base(setup.base, self.folder.base_cache, expected_codes))
        # Where the ranks read the base together, one that fails cannot wait for the others.
        loss_module, optimizer = build() if setup.base.collective else on_every_rank(group, build)
        per_step = config.sequences_per_step * group.topology.world_size
        state = TrainingState(data=self.tokens.fingerprint, sequences_per_step=per_step)
        if checkpoint and manifest:
            state = load_checkpoint(checkpoint, manifest, optimizer)
            state.sequences_per_step = per_step
            console.say(f"resuming at step {state.step}")
        return Training(
            config=config,
            folder=self.folder,
            base=setup.base,
            group=group,
            loss_module=optimizer.engine.start(loss_module),
            optimizer=optimizer,
            train_NT=self.tokens.train_NT,
            validation_MT=self.tokens.validation_MT,
            state=state,
            teacher=teacher,
        )

    def _evaluate_start(self, training: Training) -> None:
        started = time.monotonic()
        loss = evaluate_now(training, "evaluate start")
        result = self.held_out.result(loss, self.setup.plan.parameters, time.monotonic() - started)
        self._add_evaluation("start", asdict(result))
        console.say(f"start ({self.config.start}): held-out loss {result.loss:.4f}")

    def merge(self) -> None:
        config = self.config
        checkpoint = self.folder.latest_checkpoint()
        assert checkpoint is not None
        done = read_json(self.folder.merge_result) if self.folder.merge_result.exists() else {}
        if self.folder.merged.exists() and done.get("checkpoint") == checkpoint.name:
            return
        with self._phase("merge"):
            result = merge(
                checkpoint,
                lambda expected: MappedBase(self.setup.source, expected),
                self.folder.merged,
                parse_bytes(config.max_shard_size),
                parse_bytes(config.max_memory),
                resume=True,
                replace=True,
            )
        write_json(self.folder.merge_result, asdict(result) | {"checkpoint": checkpoint.name})

    def evaluate_merged(self) -> None:
        with self._phase("evaluate"):
            model = load_stock(self.folder.merged, self.setup.device, self.setup.model_dtype)
            batch = self.config.per_device_train_batch_size
            result = evaluate_model(model, self.held_out, batch, "evaluate compressed")
            self._add_evaluation("compressed", asdict(result))
            prompt = self.tokens.validation_MT[0, :SAMPLE_PROMPT_TOKENS].long()[None].to(self.setup.device)
            output = model.generate(  # pyright: ignore[reportCallIssue]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=SAMPLE_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            written = output[0, prompt.shape[1] :]
            sample = {
                "prompt": self.tokenizer.decode(prompt[0], skip_special_tokens=True),
                "compressed": self.tokenizer.decode(written, skip_special_tokens=True),
            }
            self._add_evaluation("sample", sample)

    def evaluation(self) -> dict[str, Any]:
        return read_json(self.folder.evaluation) if self.folder.evaluation.exists() else {}

    def _add_evaluation(self, name: str, result: dict[str, Any]) -> None:
        if self.setup.group.topology.is_first:
            write_json(self.folder.evaluation, self.evaluation() | {name: result})

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Measure the block and leave the figures in usage.json, also when it fails."""
        try:
            with self.tracker.phase(name):
                yield
        finally:
            if self.setup.group.topology.is_first:
                phases = {name: usage.document() for name, usage in self.tracker.phases.items()}
                (host, _), (device, _) = self.limits["host"], self.limits["device"]
                limits = {
                    "host_bytes": host.num_bytes,
                    "host_source": host.source,
                    "device_bytes": device.num_bytes,
                }
                write_json(self.folder.usage, {"phases": phases, "machine": machine(), "limits": limits})
                self.tracker.series.write(self.folder.memory)


def calibration_batches(train_NT: torch.Tensor, config: RunConfig) -> list[torch.Tensor]:
    """Token batches `[B, T]`: sequences spread evenly over the training text, at most `calibration_tokens`."""
    count = max(1, min(len(train_NT), config.calibration_tokens // config.sequence_length))
    chosen = torch.linspace(0, len(train_NT) - 1, count).round().long()
    return list(train_NT[chosen].split(config.per_device_train_batch_size))
