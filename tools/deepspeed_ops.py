"""Compile what DeepSpeed needs on processors, once, so that no run and no test has to wait for it."""

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pcscale.common.console import console
from pcscale.common.errors import PcscaleError
from pcscale.distributed.ops import prepare_ops


def main() -> int:
    console.configure(quiet=False)
    try:
        builder = prepare_ops()
    except PcscaleError as error:
        print(f"pcscale: {error}", file=sys.stderr)
        return error.exit_code
    if builder is not None:
        builder.load()
    return 0


if __name__ == "__main__":
    sys.exit(main())
