"""Ranks that begin to talk to each other."""

import os
from pathlib import Path

from tests.distributed.ranks import run_on_ranks


def _begin(folder: str) -> float:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    from pcscale.distributed.group import ProcessGroup

    group = ProcessGroup()
    total = group.sum([1.0 + group.topology.rank])[0]
    group.close()
    return total


def test_no_op_is_compiled_for_ranks_on_processors(tmp_path: Path) -> None:
    assert run_on_ranks(2, _begin, str(tmp_path)) == [3.0, 3.0]
    assert list(tmp_path.iterdir()) == []
