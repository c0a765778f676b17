"""The whole job: plan → calibrate → train → merge → evaluate → report, in one run folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.calibration.collect import collect_scores, read_rebuilt, read_scores, write_rebuilt, write_scores
from pcscale.calibration.select import select
from pcscale.common.allocator import release_between_stages, release_freed
from pcscale.common.console import console
from pcscale.common.files import read_json, write_json
from pcscale.common.ledger import ledger
from pcscale.common.ranks import on_every_rank, on_first_rank
from pcscale.common.topology import ALONE
from pcscale.common.units import parse_bytes
from pcscale.config.schema import TEXT_FREE, RunConfig
from pcscale.data.tokens import TokenSets, count_text_bytes, prepare_tokens
from pcscale.evaluation.perplexity import HeldOut, evaluate_base, evaluate_model
from pcscale.jobs.build import open_training, teacher_of
from pcscale.jobs.fit import check_fit, check_requests, predict, say_plan, try_merge
from pcscale.jobs.processes import processes, reported_once
from pcscale.jobs.run import Run, open_run, read_engine
from pcscale.memory.limits import device_in_use, device_limit, host_in_use, host_limit
from pcscale.memory.measure import MemoryMeter, Series, allocator_snapshot
from pcscale.memory.process import machine
from pcscale.memory.watchdog import Watchdog
from pcscale.merging.merge import merge
from pcscale.model.compressed import load_stock
from pcscale.projection.checkpoint import read_fixed
from pcscale.projection.starts import Start, make_start
from pcscale.reporting.report import write_report
from pcscale.run.documents import read_document, write_document
from pcscale.run.folder import RunFolder
from pcscale.run.metrics import cut_metrics
from pcscale.run.record import Evaluation, GeneratedText, MemoryLimits, ModelResult, RunUsage
from pcscale.training.loop import Training, evaluate_now, train
from pcscale.training.state import check_text
from pcscale.training.teacher import CachedTeacher

SAMPLE_PROMPT_TOKENS = 24
SAMPLE_NEW_TOKENS = 48


def compress(config: RunConfig, resume: bool = False, dry_run: bool = False, force: bool = False) -> dict[str, Any]:
    """Run the job that the settings describe.

    Args:
        resume: go on with the run in the output folder; where there is none, begin one.
        dry_run: check base, data, widths and output, and return the plan; nothing is written.
        force: begin also what is predicted not to fit.

    Returns:
        The contents of report.json; with `dry_run` those that plan.json would have.

    Raises:
        RequestError: the request is wrong; found before anything is written where it can be.
        BudgetError: the run does not fit the memory or the disk that there is, or the merge's cap is too small.
        RunError: the run failed.
        Interrupted: the user asked to stop.
    """
    config = config.resolved()
    folder = RunFolder(Path(config.output).expanduser())
    engine = reported_once(lambda: read_engine(config))
    if dry_run:
        run = open_run(config, resume, engine, ALONE, folder.latest_checkpoint())
        document = _check(run, force)
        say_plan(document, run)
        return document
    with processes(engine) as group:
        # One rank looks, since two hosts may see a folder that they share at different times.
        checkpoint = on_first_rank(group, folder.latest_checkpoint)

        def begin() -> tuple[Run, dict[str, Any]]:
            run = open_run(config, resume, engine, group, checkpoint)
            if run.is_first:
                run.folder.clear_residency()
            return run, _check(run, force)

        run, document = on_every_rank(group, begin)
        on_first_rank(group, lambda: run.folder.begin(config))
        return _Job(run).finish(document)


def _check(run: Run, force: bool) -> dict[str, Any]:
    """The run's plan, after it was found to fit."""
    check_requests(run)
    document = predict(run)
    check_fit(document, run, force)
    return document


class _Job:
    """The parts of one run, each of which leaves its result in the run folder."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.folder, self.group = run, run.config, run.folder, run.group
        usage = read_document(self.folder.usage, RunUsage)
        self.limits = {"host": (host_limit(), host_in_use), "device": (device_limit(), device_in_use)}
        self.meter = MemoryMeter(
            usage.phases if usage else {},
            Series.read(self.folder.memory),
            Watchdog(self.limits) if self.group.topology.local_rank == 0 else None,
        )
        self.tokens: TokenSets
        self.cached_teacher: CachedTeacher | None = None

    def finish(self, document: dict[str, Any]) -> dict[str, Any]:
        """Everything after the checks: the first rank writes the run folder; all of them train."""
        run, group = self.run, self.group

        def first_results() -> None:
            if not run.checkpoint:
                self.folder.clear_results()
            write_json(self.folder.plan, document)
            say_plan(document, run)
            try_merge(run)
            self.prepare_tokens()

        # The other ranks find the tokens that the first one has prepared.
        on_first_rank(group, first_results)
        on_every_rank(group, lambda: None if run.is_first else self.prepare_tokens())
        self.cached_teacher = on_every_rank(group, lambda: teacher_of(run, self.tokens))
        if run.checkpoint:
            path, manifest = run.checkpoint
            on_every_rank(group, lambda: check_text(path, self.tokens.fingerprint))
            start = Start(read_fixed(path, manifest), moves_aux=self.config.rebuilds)
        else:
            self.with_base(self.calibrate)
            start = self.start()
        if not on_first_rank(group, lambda: self.evaluation().base is not None):
            self.with_base(self.evaluate_base)
        self.train(start)
        on_first_rank(group, self.merge)
        on_first_rank(group, self.evaluate_merged)
        return on_first_rank(group, lambda: write_report(self.folder.path))

    def prepare_tokens(self) -> None:
        config = self.config
        wanted = config.wanted_sequences(self.group.topology.world_size)
        vocab_size = self.run.base.config["vocab_size"]
        self.tokens = prepare_tokens(config, wanted, vocab_size, self.run.tokenizer, self.folder.path)
        console.info(
            f"data: {self.tokens.train_NT.numel():,} training tokens, "
            f"{self.tokens.validation_MT.numel():,} held-out tokens"
        )

    def with_base(self, work: Callable[[], None]) -> None:
        """Do work of the first rank, on all ranks where they read the base together."""
        if self.run.base.collective:
            work()
        else:
            on_first_rank(self.group, work)

    def calibrate(self) -> None:
        config, run = self.config, self.run
        with self._phase("calibrate"):
            batches = calibration_batches(
                self.tokens.train_NT,
                config.calibration_tokens // config.sequence_length,
                config.per_device_train_batch_size,
            )
            scores = collect_scores(
                run.plan, run.base, config.importance, batches, config.seed, run.device, run.base_dtype
            )
            tokens = sum(batch.numel() for batch in batches) if config.importance not in TEXT_FREE else 0
            if run.is_first:
                write_scores(self.folder.scores, scores, config.importance, tokens)
            if config.rebuilds:
                path = self.folder.rebuilt if run.is_first else None
                kept = select(run.plan, scores)
                write_rebuilt(path, run.plan, run.base, kept, batches, run.device, run.base_dtype)

    def start(self) -> Start:
        """The start of training, the same on all ranks."""
        run, config, folder = self.run, self.config, self.folder

        def make() -> Start:
            return make_start(config.start, run.plan, read_scores(folder.scores), run.base.tensor, rebuilt={})

        # Where the ranks read the base together all of them make it, and the first one's counts.
        start = self.group.gather(make())[0] if run.base.collective else on_first_rank(self.group, make)
        rebuilt = on_every_rank(self.group, lambda: read_rebuilt(folder.rebuilt)) if config.rebuilds else {}
        return replace(start, rebuilt={**start.rebuilt, **rebuilt})

    @property
    def held_out(self) -> HeldOut:
        ids_MT = self.tokens.validation_MT
        return HeldOut(ids_MT, count_text_bytes(ids_MT[:, 1:].flatten(), self.run.tokenizer))

    def evaluate_base(self) -> None:
        run, batch = self.run, self.config.per_device_train_batch_size
        with self._phase("evaluate"):
            result = evaluate_base(run.base, run.plan.base_parameters, self.held_out, batch, run.device, run.base_dtype)
        self._add_evaluation(base=result)
        console.info(f"base: held-out loss {result.loss:.4f}")

    def train(self, start: Start) -> None:
        config, manifest = self.config, self.run.manifest
        if manifest and manifest.step >= config.max_steps:
            console.info(f"training is complete at step {manifest.step}")
            on_first_rank(self.group, lambda: cut_metrics(self.folder.metrics, manifest.step))
            return
        on_first_rank(self.group, self.folder.forget_merged)
        snapshot = self.folder.memory_snapshot if config.memory_snapshot else None
        try:
            with self._phase("train"), allocator_snapshot(snapshot):
                # Held until the phase has been measured: the ledger strikes it out before its memory is given back.
                training = self._train(start)
            del training
        finally:
            self.folder.clear_records(self.group.topology.rank)
        release_freed()

    def _train(self, start: Start) -> Training:
        torch.manual_seed(self.config.seed)
        with ledger.during("start"):
            training = open_training(self.run, start, self.tokens, self.cached_teacher)
            on_first_rank(self.group, lambda: self.folder.rebuilt.unlink(missing_ok=True))
            release_between_stages(training.engine.device)
        if not self.run.checkpoint and self.evaluation().start is None:
            self._evaluate_start(training)
        if self.run.is_first:
            cut_metrics(self.folder.metrics, training.state.step)
        train(training)
        training.engine.release()
        return training

    def _evaluate_start(self, training: Training) -> None:
        started = time.monotonic()
        loss = evaluate_now(training, "evaluate start")
        result = self.held_out.result(loss, self.run.plan.parameters, time.monotonic() - started)
        self._add_evaluation(start=result)
        console.info(f"start ({self.config.start}): held-out loss {result.loss:.4f}")

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
                MappedBase(self.run.source),
                self.folder.merged,
                parse_bytes(config.max_shard_size),
                parse_bytes(config.max_memory),
                resume=True,
                replace=True,
            )
        write_json(self.folder.merge_result, asdict(result) | {"checkpoint": checkpoint.name})

    def evaluate_merged(self) -> None:
        run, tokenizer = self.run, self.run.tokenizer
        with self._phase("evaluate"):
            model = load_stock(self.folder.merged, run.device, run.model_dtype)
            batch = self.config.per_device_train_batch_size
            result = evaluate_model(model, self.held_out, batch, "evaluate compressed")
            self._add_evaluation(compressed=result)
            prompt = self.tokens.validation_MT[0, :SAMPLE_PROMPT_TOKENS].long()[None].to(run.device)
            output = model.generate(  # pyright: ignore[reportCallIssue]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=SAMPLE_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            written = output[0, prompt.shape[1] :]
            sample = GeneratedText(
                prompt=str(tokenizer.decode(prompt[0], skip_special_tokens=True)),
                compressed=str(tokenizer.decode(written, skip_special_tokens=True)),
            )
            self._add_evaluation(sample=sample)

    def evaluation(self) -> Evaluation:
        return read_document(self.folder.evaluation, Evaluation) or Evaluation()

    def _add_evaluation(self, **results: ModelResult | GeneratedText) -> None:
        if self.run.is_first:
            write_document(self.folder.evaluation, replace(self.evaluation(), **results))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Measure the block and leave the figures in usage.json, also when it fails."""
        try:
            with self.meter.phase(name):
                yield
        finally:
            if self.run.is_first:
                (host, _), (device, _) = self.limits["host"], self.limits["device"]
                limits = MemoryLimits(host.num_bytes, host.source, device.num_bytes)
                write_document(self.folder.usage, RunUsage(self.meter.phases, machine(), limits))
                self.meter.series.write(self.folder.memory)


def calibration_batches(train_NT: torch.Tensor, count: int, batch_size: int) -> list[torch.Tensor]:
    """Token batches `[B, T]`: `count` sequences at most, spread evenly over the training text."""
    chosen = torch.linspace(0, len(train_NT) - 1, max(1, min(len(train_NT), count))).round().long()
    return list(train_NT[chosen].split(batch_size))
