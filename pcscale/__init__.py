"""pcscale: Projected Compression of large language models to ordinary smaller ones.

The names below are the library; each is imported when it is first used, so that `pcscale plan` needs neither torch nor
transformers. Their documentation: pcscale/api.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcscale.api import (
        Compression,
        PcscaleError,
        ProjectedAdamW,
        ProjectionCallback,
        RunConfig,
        RunReport,
        State,
        compress,
        evaluate,
        from_checkpoint,
        merge,
        plan,
        prepare,
    )

__version__ = "0.1.0"
__all__ = [
    "Compression",
    "PcscaleError",
    "ProjectedAdamW",
    "ProjectionCallback",
    "RunConfig",
    "RunReport",
    "State",
    "__version__",
    "compress",
    "evaluate",
    "from_checkpoint",
    "merge",
    "plan",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pcscale.api"), name)
    raise AttributeError(f"module 'pcscale' has no attribute '{name}'")
