"""What ranks need, imported once in the server that they are forked from."""

import os
import warnings
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("pcscale.distributed.engine", "pcscale.distributed.zero_base", "tests.training.children"):
        import_module(name)
