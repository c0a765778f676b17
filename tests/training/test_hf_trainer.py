"""ProjectedAdamW under the Hugging Face Trainer."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.errors import RequestError
from pcscale.families.widths import plan_keep
from pcscale.model.compressed import build_compressed
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import Manifest
from pcscale.training.hf_trainer import ProjectionCallback
from tests.optimizers import build_optimizer
from tests.runs import World, leftovers


def _build(base_folder: Path, output: Path, max_steps: int, **changes: Any) -> tuple[Trainer, ProjectedAdamW]:
    base = MappedBase(resolve_base(str(base_folder)))
    plan = plan_keep(base.family, base.config, 0.5)
    kept = select(plan, random_scores(plan, seed=0))
    model = build_compressed(plan, start_tensors(plan, Start(kept), base.tensor), torch.device("cpu"), torch.float32)
    optimizer = build_optimizer(model, plan, base, Start(kept), lr=1e-3, aux_lr=1e-2, weight_decay=0.1)
    ids_NT = torch.randint(300, (64, 1), generator=torch.Generator().manual_seed(0)).expand(64, 12)
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 0.5,
        "save_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(output), **(settings | changes)),
        train_dataset=[{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_NT],
        optimizers=(optimizer, None),  # pyright: ignore[reportArgumentType]
        callbacks=[ProjectionCallback(optimizer)],
    )
    return trainer, optimizer


def _curve(trainer: Trainer) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(row[key] for key in keys) for row in trainer.state.log_history if "loss" in row]


def _state(optimizer: ProjectedAdamW) -> dict[str, torch.Tensor]:
    return {
        f"{name} {part}": value
        for name, record in optimizer.records.items()
        for part, value in record.tensors().items()
    }


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, ProjectedAdamW]:
    trainer, optimizer = _build(world.base, tmp_path_factory.mktemp("trainer"), max_steps=6)
    trainer.train()
    return trainer, optimizer


def test_a_resumed_trainer_gives_the_losses_of_one_that_was_not_stopped(
    world: World, tmp_path: Path, uninterrupted: tuple[Trainer, ProjectedAdamW]
) -> None:
    first, _ = _build(world.base, tmp_path, max_steps=3)
    first.train()
    resumed, optimizer = _build(world.base, tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    expected, expected_optimizer = uninterrupted
    assert _curve(resumed) == _curve(expected)
    assert [step for step, *_ in _curve(resumed)] == [1, 2, 3, 4, 5, 6]
    assert optimizer.updates == expected_optimizer.updates == 6
    for name, value in _state(expected_optimizer).items():
        assert torch.equal(_state(optimizer)[name], value), name


def test_training_under_the_trainer_lowers_the_loss(uninterrupted: tuple[Trainer, ProjectedAdamW]) -> None:
    losses = [loss for _, loss, *_ in _curve(uninterrupted[0])]
    assert losses[-1] < losses[0] - 0.5


def test_every_checkpoint_of_the_trainer_holds_a_whole_projection(
    uninterrupted: tuple[Trainer, ProjectedAdamW],
) -> None:
    output = Path(str(uninterrupted[0].args.output_dir))
    for step in (3, 6):
        folder = output / f"checkpoint-{step}" / "projection"
        manifest = Manifest.read(folder)
        assert manifest.step == step
        assert all(manifest.file(folder, name).is_file() for name in manifest.files)
    assert leftovers(output) == []


def test_the_trainers_own_optimizer_file_holds_no_record(uninterrupted: tuple[Trainer, ProjectedAdamW]) -> None:
    trainer, optimizer = uninterrupted
    saved = torch.load(Path(str(trainer.args.output_dir)) / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert saved["state"] == {}
    assert saved["updates"] == optimizer.updates


def test_resuming_without_the_projection_is_refused(world: World, tmp_path: Path) -> None:
    first, _ = _build(world.base, tmp_path, max_steps=3)
    first.train()
    folder = tmp_path / "checkpoint-3" / "projection"
    shutil.rmtree(folder)
    resumed, _ = _build(world.base, tmp_path, max_steps=6)
    with pytest.raises(RequestError) as error:
        resumed.train(resume_from_checkpoint=True)
    assert str(error.value) == (
        f"{folder} does not exist, so the projections cannot be resumed. Keep it in output_dir."
    )


def test_resuming_with_a_changed_projection_is_refused(world: World, tmp_path: Path) -> None:
    first, _ = _build(world.base, tmp_path, max_steps=3)
    first.train()
    path = tmp_path / "checkpoint-3" / "projection" / "outer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed, _ = _build(world.base, tmp_path, max_steps=6)
    with pytest.raises(RequestError, match=r"outer\.safetensors is not what was written"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("deepspeed", "world_size"), [("zero3.json", 1), ({"zero_optimization": {}}, 1), (None, 2)])
def test_deepspeed_and_more_processes_are_pointed_to_compress(
    deepspeed: Any, world_size: int, uninterrupted: tuple[Trainer, ProjectedAdamW]
) -> None:
    """DeepSpeed need not be installed to be refused, so the arguments are stand-ins."""
    arguments: Any = SimpleNamespace(deepspeed=deepspeed, world_size=world_size)
    optimizer = uninterrupted[1]
    with pytest.raises(RequestError) as error:
        ProjectionCallback(optimizer).on_init_end(arguments, TrainerState(), TrainerControl())
    assert str(error.value) == (
        "ProjectedAdamW runs under the Trainer on one process only. "
        "Use `pcscale compress` for DeepSpeed and more processes."
    )


def test_a_trainer_that_begins_needs_no_projection(
    tmp_path: Path, uninterrupted: tuple[Trainer, ProjectedAdamW]
) -> None:
    optimizer = uninterrupted[1]
    before = {name: value.clone() for name, value in _state(optimizer).items()}
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path))
    ProjectionCallback(optimizer).on_train_begin(arguments, TrainerState(), TrainerControl())
    assert all(torch.equal(value, before[name]) for name, value in _state(optimizer).items())
