"""The run folder: the names of all its files, and whether a new run may begin there or an old one go on."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.common.files import (
    TEMPORARY_PREFIX,
    read_json,
    readable_os_errors,
    temporary_beside,
    write_json,
    write_text,
)
from pcscale.config.load import check_values, dump_run_config, read_values
from pcscale.config.schema import RunConfig
from pcscale.run.token_file import TOKENS_NAME

BASE_CACHE_NAME = "base-int8.safetensors"
STEP_PREFIX = "step-"
FREE_TO_CHANGE = frozenset(
    {
        "base",  # named anew, it must still be the same base: its fingerprints tell
        *("output", "max_steps", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints", "max_skipped_steps"),
        *("max_memory", "memory_snapshot", "max_shard_size", "report_to", "gradient_checkpointing"),
        "trust_remote_code",
        # how a step's sequences are shared out; how many there are stays (state.check_batch)
        *("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"),
        # where things live changes no number
        *("residency", "base_home", "gradient_home", "pinned_memory"),
    }
)
"""Settings that a resumed run may have otherwise; every other one would make it another run."""


class RunFolder:
    """The paths inside a run folder.

    Attributes:
        rebuilt: kept ffn channels with the dropped ones rebuilt into them, until training has begun with it.
        residency: files of the records while a run with residency disk is training.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "run.yaml"
        self.plan = path / "plan.json"
        self.tokens = path / TOKENS_NAME
        self.scores = path / "scores.safetensors"
        self.rebuilt = path / "rebuilt.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.evaluation = path / "evaluation.json"
        self.merge_result = path / "merge.json"
        self.usage = path / "usage.json"
        self.memory = path / "memory.json"
        self.memory_snapshot = path / "memory_snapshot.pickle"
        self.report = path / "report.json"
        self.page = path / "report.html"
        self.plots = path / "plots"
        self.merged = path / "merged"
        self.checkpoints = path / "checkpoints"
        self.residency = path / "residency"
        self.base_cache = path / BASE_CACHE_NAME

    @property
    def begun(self) -> bool:
        """True where there is work that a new run would lose; settings, plan and tokens are made again in no time."""
        return any(path.exists() for path in (self.scores, self.metrics, self.checkpoints))

    def begin(self, config: RunConfig) -> None:
        """Make the folder of a run that begins or goes on, clear what an interrupted one left, and write run.yaml."""
        with readable_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in list(self.path.rglob(f"{TEMPORARY_PREFIX}*")):
                # An interrupted merge goes on from its staging folder; everything else is written anew.
                if leftover != temporary_beside(self.merged) and self.merged not in leftover.parents:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        write_text(self.settings, dump_run_config(config))

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.checkpoints / f"{STEP_PREFIX}{step:08d}"

    def saved_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending. What is visible is whole, so the last is the one to resume."""
        names = [path.name for path in self.checkpoints.glob(f"{STEP_PREFIX}*")]
        return sorted(int(name.removeprefix(STEP_PREFIX)) for name in names if name[len(STEP_PREFIX) :].isdigit())

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint; None: there is none yet."""
        steps = self.saved_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def clear_results(self) -> None:
        """Forget the results of a run without a checkpoint: it begins anew, maybe on other text."""
        results = (self.tokens, self.scores, self.rebuilt, self.metrics, self.evaluation)
        for path in (*results, self.merge_result, self.usage, self.memory):
            path.unlink(missing_ok=True)

    def forget_merged(self) -> None:
        """Forget how good the merged model is, since training goes on: what is merged then is another one."""
        found = read_json(self.evaluation)
        write_json(self.evaluation, {key: found[key] for key in found if key not in ("compressed", "sample")})

    def records_of(self, rank: int) -> Path:
        """The folder in which a rank keeps the records that live in files."""
        return self.residency / f"rank-{rank}"

    def clear_residency(self) -> None:
        """Remove the records' files of a run that was killed and goes on from a checkpoint."""
        shutil.rmtree(self.residency, ignore_errors=True)

    def clear_records(self, rank: int) -> None:
        """Remove the records' files of a rank that has ended; a checkpoint holds what is worth keeping of them."""
        shutil.rmtree(self.records_of(rank), ignore_errors=True)
        with suppress(OSError):  # Until the last rank's are gone.
            self.residency.rmdir()

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest checkpoints. One that is being removed is no longer visible as a checkpoint."""
        for step in self.saved_steps()[:-keep]:
            doomed = self.checkpoints / f"{TEMPORARY_PREFIX}removed"
            shutil.rmtree(doomed, ignore_errors=True)
            self.checkpoint(step).rename(doomed)
            shutil.rmtree(doomed)


def check_output(folder: RunFolder, config: RunConfig, resume: bool) -> None:
    """Refuse an output that this run must not write into.

    Raises:
        RequestError: the folder holds something else, a run that `--resume` was not asked for, or a run with other
            settings.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is a file. Name a new folder as output.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not folder.settings.exists():
        found = next(path.iterdir()).name
        raise RequestError(f"{path} holds {found} and is no run folder. Name a new folder as output.")
    if not folder.begun:
        return
    if not resume:
        raise RequestError(
            f"{path} already holds a run. Add --resume to go on with it, or name a new folder as output."
        )
    before = _bound(check_values(read_values(folder.settings), str(folder.settings)))
    for key, value in _bound(config).items():
        if value != before[key]:
            raise RequestError(
                f"{key} is {value!r}, the run in {path} began with {before[key]!r}. "
                "Put it back, or name a new folder as output."
            )


def _bound(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run this one; a teacher's folder may lie elsewhere, since its hashes tell it."""
    values = config.model_dump(exclude=set(FREE_TO_CHANGE))
    if values["distill"] is not None:
        values["distill"]["cache"] = values["distill"]["cache"] is not None
    return values
