"""Going on in a loop of one's own: a checkpoint of another base is refused though the base was read before."""

from pathlib import Path

import pytest
import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.errors import RequestError
from pcscale.families.widths import plan_widths
from pcscale.model.compressed import build_compressed
from pcscale.projection.checkpoint import load_state, save_state
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from tests.optimizers import build_optimizer
from tests.tiny import build_base


def _parts(folder: Path, seed: int = 0, hidden_size: int = 16) -> tuple[ProjectedAdamW, torch.nn.Module]:
    base = MappedBase(resolve_base(str(folder)))
    plan = plan_widths(base.family, base.config, hidden_size, 24)
    kept = select(plan, random_scores(plan, seed))
    model = build_compressed(plan, start_tensors(plan, Start(kept), base.tensor), torch.device("cpu"), torch.float32)
    return build_optimizer(model, plan, base, Start(kept), lr=1e-2), model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint after one step, beside its base, and the weights that it stands for."""
    optimizer, model = _parts(build_base(tmp_path / "base"))
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    save_state(tmp_path / "checkpoint", 1, optimizer)
    return tmp_path / "checkpoint", {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_weights_and_the_count_of_updates_come_back(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    optimizer, model = _parts(tmp_path / "base", seed=1)
    load_state(saved[0], optimizer)
    assert optimizer.updates == 1
    assert all(torch.equal(value, saved[1][name]) for name, value in model.named_parameters())


def test_a_base_with_other_weights_is_refused(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    optimizer, _ = _parts(build_base(tmp_path / "other", seed=1))
    with pytest.raises(RequestError, match="is not the weight this checkpoint was trained on"):
        load_state(saved[0], optimizer)
    assert optimizer.updates == 0


def test_other_widths_are_refused(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    optimizer, _ = _parts(tmp_path / "base", hidden_size=24)
    with pytest.raises(
        RequestError, match="the checkpoint has widths 16/24 by method projected, this run asks for 24/24"
    ):
        load_state(saved[0], optimizer)
