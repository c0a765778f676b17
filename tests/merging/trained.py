"""Tiny checkpoints from real training: a few steps of the optimizer on random tokens, written by `save_state`."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.families.plan import Plan
from pcscale.families.widths import plan_widths
from pcscale.merging.merge import MergeResult, merge
from pcscale.model.compressed import build_compressed
from pcscale.projection.checkpoint import save_state
from pcscale.projection.layout import RecordFormat
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.folder import BASE_CACHE_NAME
from tests.optimizers import PUBLISHED_FORMAT, build_optimizer

HIDDEN, FFN = 24, 40
"""Widths that no other axis of the tiny bases has, so that a mistaken axis shows."""
STEPS = 3
BASE_NAME = "acme/tiny"
_RATE = 2e-2  # Three such steps move every weight far beyond any rounding.
REPOSITORY = Path(__file__).parents[2]

Train = Callable[..., "TrainedRun"]

COMPACT: dict[str, dict[str, Any]] = {
    "bfloat16 records": {"form": RecordFormat("bfloat16")},
    "8-bit moments": {"form": RecordFormat(moments="8bit")},
    "low rank": {"form": RecordFormat(rank=5)},
    "8-bit base": {"int8": True},
    "all of them": {"form": RecordFormat("bfloat16", "8bit", 5), "int8": True, "weight_decay": 0.1},
}
"""What `train_and_save` takes for runs in few bits."""


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint, the base it was trained on, and the live model it was written from."""

    base_folder: Path
    checkpoint: Path
    plan: Plan
    model: PreTrainedModel
    optimizer: ProjectedAdamW

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The live model's weights by name, a tied head left out."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def copy(self, folder: Path) -> "TrainedRun":
        """The same with a base and a checkpoint of its own, to be changed."""
        base, checkpoint = folder / "base", folder / self.checkpoint.name
        shutil.copytree(self.base_folder, base)
        shutil.copytree(self.checkpoint, checkpoint)
        return dataclasses.replace(self, base_folder=base, checkpoint=checkpoint)

    def change_manifest(self, **changes: Any) -> None:
        path = self.checkpoint / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def open_base(folder: Path) -> MappedBase:
    """The base of a checkpoint, opened anew."""
    return MappedBase(BaseFolder(folder, BASE_NAME, None))


def train_and_save(
    base_folder: Path,
    checkpoint: Path,
    method: str = "projected",
    trainer: dict[str, Any] | None = None,
    seed: int = 0,
    form: RecordFormat = PUBLISHED_FORMAT,
    int8: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train `STEPS` steps of a float32 model and write the checkpoint.

    Args:
        int8: train on 8-bit codes of the base, which lie where a run keeps them: two folders above the checkpoint.
        settings: of the optimizer.
    """
    base = open_base(base_folder)
    plan = plan_widths(base.family, base.config, HIDDEN, FFN)
    kept = select(plan, random_scores(plan, seed))
    model = build_compressed(plan, start_tensors(plan, Start(kept), base.tensor), torch.device("cpu"), torch.float32)
    frozen = base
    if int8:
        cache = checkpoint.parents[1] / BASE_CACHE_NAME
        cache.parent.mkdir(parents=True, exist_ok=True)
        frozen = Int8Base(base, cache)
    settings = {"lr": _RATE, "project": method == "projected", "form": form, **settings}
    optimizer = build_optimizer(model, plan, frozen, Start(kept), **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids_BT = torch.randint(plan.config["vocab_size"], (2, 12), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    save_state(checkpoint, STEPS, optimizer, trainer)
    return TrainedRun(base_folder, checkpoint, plan, model.eval(), optimizer)


def merge_run(run: TrainedRun, output: Path, base_folder: Path | None = None, **changes: Any) -> MergeResult:
    """`merge` with room for everything, or with `changes` of its arguments."""
    arguments = {"max_shard_bytes": 10**9, "max_memory_bytes": 2**31, **changes}
    return merge(run.checkpoint, open_base(base_folder or run.base_folder), output, **arguments)


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(folder: Path) -> list[str]:
    """What a user sees in a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def run_python(
    *arguments: str | Path, environment: dict[str, str] | None = None, timeout_seconds: int = 120
) -> subprocess.CompletedProcess[str]:
    """A new interpreter in the repository's root, with these variables beside ours, to its end."""
    command = [sys.executable, *map(str, arguments)]
    everything = {**os.environ, **(environment or {})}
    return subprocess.run(
        command, cwd=REPOSITORY, env=everything, capture_output=True, text=True, timeout=timeout_seconds
    )
