"""`ProjectedAdamW` as tests build it: from its parts, with one rate for all projections unless told otherwise."""

from dataclasses import replace
from typing import Any

from torch import nn

from pcscale.families.plan import Plan
from pcscale.projection.compression import Compression
from pcscale.projection.engine import Engine
from pcscale.projection.layout import RecordFormat
from pcscale.projection.residency import State
from pcscale.projection.starts import Start
from pcscale.projection.sweep import ProjectedAdamW

PUBLISHED_FORMAT = RecordFormat()


def build_optimizer(
    model: Any,
    plan: Plan,
    base: Any,
    start: Start,
    *,
    project: bool = True,
    engine: Engine | None = None,
    form: RecordFormat | None = None,
    state: State | None = None,
    **settings: Any,
) -> ProjectedAdamW:
    """The optimizer over a model that holds the start.

    Args:
        form: the format of records, in place of the state's.
        state: how and where records are kept; None: float32 on the device.
        settings: of the optimizer; where aux has no rate of its own it is `lr`.
    """
    assert isinstance(model, nn.Module)
    state = state or State()
    if form is not None:
        state = replace(state, record_dtype=form.dtype, moments=form.moments, projection_rank=form.rank)
    settings = {"lr": 1.5e-4, "projection_rates": "uniform", **settings}
    if settings.get("aux_lr") is None:
        settings["aux_lr"] = settings["lr"]
    compression = Compression(model, plan, base, start, "projected" if project else "hard_prune", engine)
    return ProjectedAdamW(compression, state=state, **settings)
