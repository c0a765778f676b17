"""What a run folder holds, read once and checked: the input of every report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.config.load import load_run_config
from pcscale.config.schema import RunConfig

SETTINGS_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
_MAY_BE_NONE = ("loss", "grad_norm", "eval_loss")
_TOO_LARGE = 1e300  # JSON's integers may be past what a float holds
_WITHOUT_SERIES = "Restore the file, or delete it for a report without memory over time."


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl."""

    step: int
    """Counted from 1."""
    tokens: int
    """Tokens seen up to the end of this step. Units: tokens."""
    loss: float | None
    """Of this step's batch, before the update; None: the step was skipped. Units: nats per token."""
    learning_rate: float
    """The rate that this step used."""
    grad_norm: float | None
    """Before clipping; None: the step was skipped."""
    seconds: float
    """Wall time of this step. Units: seconds."""
    eval_loss: float | None
    """On held-out text; None: not evaluated after this step. Units: nats per token."""
    moved_bytes: int
    """Base weights and records moved to and from where the sweep works, and what a teacher read. Units: bytes."""
    skipped: bool
    """Loss or gradients were not finite, so nothing was updated."""


@dataclass(frozen=True)
class Sample:
    """One entry of memory.json: what was held at one time."""

    seconds: float
    """Since the run began. Units: seconds."""
    phase: str
    moment: str | None
    """The part of training that ran; None: between two, or another phase."""
    host: dict[str, int]
    """Units: bytes by component."""
    device: dict[str, int]
    """Empty: there is no device beside the host. Units: bytes by component."""


@dataclass(frozen=True)
class RunData:
    """A run as far as it has got."""

    run: Path
    config: RunConfig
    settings_text: str
    """run.yaml as it stands in the folder."""
    steps: tuple[Step, ...]
    plan: dict[str, Any] | None
    evaluation: dict[str, Any]
    """Some of `base`, `start`, `compressed` and `sample`; empty: nothing is evaluated yet."""
    merge: dict[str, Any] | None
    usage: dict[str, Any] | None
    memory: tuple[Sample, ...] | None
    """None: the run kept no series."""


def read_run(run: Path) -> RunData:
    """Read a run folder; only run.yaml and metrics.jsonl must be there.

    Raises:
        RequestError: the folder is absent, is no run folder, or a file in it is broken.
    """
    if not run.is_dir():
        raise RequestError(f"{run} is not a folder. Name the output folder of a run.")
    for name in (SETTINGS_FILE, METRICS_FILE):
        if not (run / name).is_file():
            raise RequestError(
                f"{run} is not a run folder: it has no {name}, expected {SETTINGS_FILE} and {METRICS_FILE}. "
                "Name the output folder of a run whose training has begun."
            )
    return RunData(
        run=run,
        config=load_run_config(run / SETTINGS_FILE),
        settings_text=(run / SETTINGS_FILE).read_text(encoding="utf-8"),
        steps=_read_steps(run / METRICS_FILE),
        plan=_read_document(run / "plan.json", ("base", "compressed", "trainable", "flops", "memory", "peak")),
        evaluation=_read_document(run / "evaluation.json", ()) or {},
        merge=_read_document(run / "merge.json", ("bytes_written", "shards")),
        usage=_read_document(run / "usage.json", ("phases", "machine")),
        memory=_read_memory(run / "memory.json"),
    )


def _read_document(path: Path, expected_keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file."""
    if not path.exists():
        return None
    document = read_json(path)
    if not isinstance(document, dict):
        raise RequestError(f"{path} holds a {type(document).__name__}, expected a JSON object. Restore the file.")
    missing = [key for key in expected_keys if key not in document]
    if missing:
        raise RequestError(f"{path} has no '{missing[0]}', expected {', '.join(expected_keys)}. Restore the file.")
    return document


def _read_memory(path: Path) -> tuple[Sample, ...] | None:
    """The series in `path`; None where there is no such file."""
    document = _read_document(path, ("samples",))
    if document is None:
        return None
    if not isinstance(document["samples"], list):
        kind = type(document["samples"]).__name__
        raise RequestError(f"{path} has a {kind} under 'samples', expected a list. {_WITHOUT_SERIES}")
    return tuple(_sample(value, f"{path} sample {number}") for number, value in enumerate(document["samples"], 1))


def _sample(value: Any, where: str) -> Sample:
    names = ("seconds", "phase", "moment", "host", "device")
    if not isinstance(value, dict) or any(name not in value for name in names):
        found = f"has only {', '.join(value) or 'nothing'}" if isinstance(value, dict) else f"is {value!r}"
        raise RequestError(f"{where} {found}, expected {', '.join(names)}. {_WITHOUT_SERIES}")
    sample = Sample(*(value[name] for name in names))
    if not is_number(sample.seconds):
        raise RequestError(f"{where}: seconds is {sample.seconds!r}, expected a number. {_WITHOUT_SERIES}")
    if not isinstance(sample.phase, str) or not isinstance(sample.moment, str | None):
        found = f"phase is {sample.phase!r} and moment {sample.moment!r}"
        raise RequestError(f"{where}: {found}, expected a name and a name or null. {_WITHOUT_SERIES}")
    for home, held in (("host", sample.host), ("device", sample.device)):
        if not isinstance(held, dict) or not all(is_number(num_bytes) for num_bytes in held.values()):
            raise RequestError(f"{where}: {home} is {held!r}, expected bytes by component. {_WITHOUT_SERIES}")
    return sample


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a number that can be counted with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _read_steps(path: Path) -> tuple[Step, ...]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(_step(json.loads(line)))
        except json.JSONDecodeError as error:
            # A process killed while it wrote leaves the last line cut; any other cut has no such excuse.
            if number < len(lines):
                raise RequestError(f"{path} line {number} is not JSON ({error}). Restore the file.") from None
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else "it is not a JSON object"
            raise RequestError(f"{path} line {number} is not a step: {problem}. Restore the file.") from None
        except ValueError as error:
            raise RequestError(f"{path} line {number} is not a step: {error}. Restore the file.") from None
    return tuple(steps)


def _step(value: Any) -> Step:
    step = Step(
        step=value["step"],
        tokens=value["tokens"],
        loss=value["loss"],
        learning_rate=value["learning_rate"],
        grad_norm=value["grad_norm"],
        seconds=value["seconds"],
        eval_loss=value.get("eval_loss"),
        moved_bytes=value.get("moved_bytes", 0),
        skipped=value.get("skipped", False),
    )
    for name, found in vars(step).items():
        if not (is_number(found) or name == "skipped" or (found is None and name in _MAY_BE_NONE)):
            raise ValueError(f"its {name} is {found!r}, expected a number")
    return step
