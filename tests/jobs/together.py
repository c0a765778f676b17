"""Everything that saves memory at once, on a base wide enough that moments are kept in 8 bits."""

from collections import namedtuple
from pathlib import Path

import pytest

from tests.runs import World, run_values, write_yaml
from tests.tiny import build_base, write_text

TOGETHER = {
    "residency": "disk",
    "base_precision": "int8",
    "bf16": True,
    "gradient_dtype": "bfloat16",
    "record_dtype": "bfloat16",
    "moments": "8bit",
    "weight_decay": 0.1,  # So that records keep the start of aux as well.
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
}
DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base wide enough that moments are kept in 8 bits."""
    folder = tmp_path_factory.mktemp("wide")
    base = build_base(folder / "base", tokenizer=True, hidden_size=96, intermediate_size=224, head_dim=24)
    return World(base, write_text(folder / "text.txt", num_words=3000, seed=1))


@pytest.fixture
def yaml(wide: World, run: Path) -> Path:
    return write_yaml(run.parent / "run.yaml", run_values(wide, run, **TOGETHER))
