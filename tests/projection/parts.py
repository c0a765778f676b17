"""What tests of a compression start from: a tiny base, a plan, kept indices that are no prefix, token batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder
from pcscale.families.plan import Plan
from pcscale.families.widths import plan_widths
from pcscale.model.compressed import build_compressed
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from tests.family_checks import NARROW
from tests.optimizers import build_optimizer
from tests.reference import Kept, Rates, Weights
from tests.tiny import CASES, SIZES, build_base

BIASED = (("llama", True), ("qwen3", False))
"""Families whose attention (and in Llama's case feed-forward) layers can carry biases that no base of `CASES` has."""
BIASES = {"attention_bias": True, "mlp_bias": True}
ALL_CASES = tuple((*case, False) for case in CASES) + tuple((*case, True) for case in BIASED)
"""Family, tied, with biases switched on."""
CPU = torch.device("cpu")

TinyBase = Callable[[str, bool], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and on a busy machine wait for it: up to a hundred times slower.

    A folder's conftest.py imports it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_base(folder: Path, **changes: Any) -> MappedBase:
    return MappedBase(BaseFolder(folder, "tiny", None), **changes)


def random_kept(plan: Plan, seed: int = 1) -> Kept:
    """Kept indices in order, scattered over the base's channels and different in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(base_size, generator=generator)[:size].sort().values
        for name, base_size, size in plan.kept_axes()
    }


def token_batches(count: int, batch: int = 2, tokens: int = 12, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(SIZES["vocab_size"], (count, batch, tokens), generator=generator))


@dataclass(frozen=True)
class Compression:
    """A base on disk, and what it is cut to."""

    base: MappedBase
    weights: Weights
    """The base's tensors, read by safetensors' own reader."""
    plan: Plan
    kept: Kept

    @classmethod
    def of(cls, folder: Path, **widths: int) -> "Compression":
        base = open_base(folder)
        plan = plan_widths(base.family, base.config, **{**NARROW, **widths})
        return cls(base, load_file(folder / "model.safetensors"), plan, random_kept(plan))

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The compressed model at its start."""
        return build_compressed(self.plan, start_tensors(self.plan, Start(self.kept), self.base.tensor), CPU, dtype)

    def optimizer(
        self, model: torch.nn.Module, rates: Rates | None = None, project: bool = True, **changes: Any
    ) -> ProjectedAdamW:
        rates = rates or Rates()
        settings = {
            "lr": rates.lr,
            "aux_lr": rates.aux_lr if project else None,
            "betas": rates.betas,
            "eps": rates.eps,
            "weight_decay": rates.weight_decay,
        }
        base = changes.pop("base", self.base)
        return build_optimizer(model, self.plan, base, Start(self.kept), project=project, **{**settings, **changes})


def case_folder(family: str, tied: bool, biased: bool, tiny_base: TinyBase, tmp_path: Path) -> Path:
    """The base of one of `ALL_CASES`."""
    return build_base(tmp_path / "biased", family, tied, **BIASES) if biased else tiny_base(family, tied)


def copies(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
