"""pcscale: Projected Compression of large language models to ordinary smaller ones.

The public names below are what a training loop of one's own needs; everything else is behind the `pcscale` command.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcscale.base.held import HeldBase
    from pcscale.base.int8 import Int8Base
    from pcscale.base.mapped import MappedBase
    from pcscale.base.resolve import resolve_base
    from pcscale.calibration.collect import collect_scores, read_rebuilt, write_rebuilt
    from pcscale.calibration.select import select
    from pcscale.families.widths import plan_keep, plan_parameters, plan_widths
    from pcscale.merging.merge import merge
    from pcscale.model.compressed import build_compressed
    from pcscale.projection.layout import RecordFormat
    from pcscale.projection.residency import Residency
    from pcscale.projection.starts import Start, make_start, start_tensors
    from pcscale.projection.sweep import ProjectedAdamW
    from pcscale.training.hf_trainer import ProjectionCallback
    from pcscale.training.state import load_state, save_state

__version__ = "0.1.0"

# Imported when first used: `pcscale plan` needs neither torch nor transformers.
_HOMES = {
    "HeldBase": "pcscale.base.held",
    "Int8Base": "pcscale.base.int8",
    "MappedBase": "pcscale.base.mapped",
    "resolve_base": "pcscale.base.resolve",
    "collect_scores": "pcscale.calibration.collect",
    "read_rebuilt": "pcscale.calibration.collect",
    "write_rebuilt": "pcscale.calibration.collect",
    "build_compressed": "pcscale.model.compressed",
    "plan_keep": "pcscale.families.widths",
    "plan_parameters": "pcscale.families.widths",
    "plan_widths": "pcscale.families.widths",
    "select": "pcscale.calibration.select",
    "load_state": "pcscale.training.state",
    "merge": "pcscale.merging.merge",
    "RecordFormat": "pcscale.projection.layout",
    "Residency": "pcscale.projection.residency",
    "Start": "pcscale.projection.starts",
    "make_start": "pcscale.projection.starts",
    "start_tensors": "pcscale.projection.starts",
    "ProjectedAdamW": "pcscale.projection.sweep",
    "save_state": "pcscale.training.state",
    "ProjectionCallback": "pcscale.training.hf_trainer",
}
__all__ = [
    "HeldBase",
    "Int8Base",
    "MappedBase",
    "ProjectedAdamW",
    "ProjectionCallback",
    "RecordFormat",
    "Residency",
    "Start",
    "__version__",
    "build_compressed",
    "collect_scores",
    "load_state",
    "make_start",
    "merge",
    "plan_keep",
    "plan_parameters",
    "plan_widths",
    "read_rebuilt",
    "resolve_base",
    "save_state",
    "select",
    "start_tensors",
    "write_rebuilt",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pcscale' has no attribute '{name}'")
