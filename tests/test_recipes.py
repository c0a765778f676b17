"""The recipes: valid, at the measured rates, and predicted to fit the hardware that they name."""

import re
from pathlib import Path

import pytest

from benchmarks.shapes import LLAMA_1B, LLAMA_8B
from pcscale.config import defaults
from pcscale.config.files import resolve_deepspeed
from pcscale.config.load import load_run_config
from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.families.widths import make_plan
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from tests.families.real_models import SMOLLM2

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2 | {"dtype": "bfloat16"},
    "meta-llama/Llama-3.2-1B": LLAMA_1B,
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
}

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def _plan(config: RunConfig) -> Plan:
    shape = SHAPES[config.base]
    return make_plan(family_of(shape, "config.json"), shape, config)


def _named_bytes(path: Path) -> dict[str, float]:
    """The hardware in a recipe's first line: `one GPU of 24 GB`, `128 GB of host memory`."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    patterns = {"device": r"one GPU of (\d+) GB", "host": r"(\d+) GB of host memory"}
    found = {name: re.search(pattern, line) for name, pattern in patterns.items()}
    return {name: float(match[1]) * 1e9 for name, match in found.items() if match}


@each_recipe
def test_it_trains_at_the_measured_rates(path: Path) -> None:
    config = load_run_config(path)
    assert config.learning_rate == defaults.learning_rate(config.method)
    assert config.aux_rate == defaults.aux_learning_rate(config.method, config.learning_rate)
    if config.method == "projected":
        assert config.projection_rates == defaults.PROJECTION_RATES


@each_recipe
def test_it_fits_the_hardware_that_it_names(path: Path) -> None:
    config, named = load_run_config(path), _named_bytes(path)
    assert named
    needs = Prediction(_plan(config), config, Deployment(on_gpu="device" in named)).needs
    for resource, num_bytes in named.items():
        assert needs[resource] <= num_bytes, resource


@each_recipe
def test_it_keeps_the_share_that_it_names(path: Path) -> None:
    config = load_run_config(path)
    line = path.read_text(encoding="utf-8").splitlines()[0]
    percent = re.search(r"(\d+) % of its parameters", line)
    named = float(percent[1]) / 100 if percent else 0.5  # "to half"
    assert _plan(config).keep_fraction == pytest.approx(named, abs=0.005)


def test_the_deepspeed_file_of_the_slurm_script_comes_with_the_package() -> None:
    script = (FOLDER / "slurm-two-nodes.sh").read_text(encoding="utf-8")
    name = re.search(r"deepspeed=(\S+)", script)
    assert name is not None
    assert resolve_deepspeed(name[1]).is_file()
