"""The metrics trackers behind `report_to`: every metrics row goes to each of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.storage.hashing import fingerprint

Log = Callable[[dict[str, Any]], None]


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def log(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])

    return log, writer.close


def _wandb(folder: Path) -> tuple[Log, Callable[[], None]]:
    import wandb  # pyright: ignore[reportMissingImports]

    folder = folder.resolve()
    run_id = fingerprint(str(folder).encode())[:16]  # Two runs may be in folders of one name.
    run = wandb.init(dir=folder, project="pcscale", name=folder.name, resume="allow", id=run_id)
    return lambda row: run.log(row, step=row["step"]), run.finish


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is absent, before any work."""
    for name in names:
        if find_spec(name) is None:
            raise RequestError(
                f"report_to names {name}, which is not installed. Run `pip install {name}` or remove it."
            )


@contextmanager
def open_trackers(names: Sequence[str], folder: Path) -> Iterator[list[Log]]:
    """Open these trackers on a run folder, and close them after the block; yield where each takes rows."""
    opened = [OPENERS[name](folder) for name in names]
    try:
        yield [log for log, _ in opened]
    finally:
        for _, close in opened:
            close()
