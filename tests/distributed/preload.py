"""What ranks need, imported once in the server that they are forked from."""

import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"
for name in ("pcscale.distributed.engine", "pcscale.distributed.zero_base", "tests.children"):
    import_module(name)
