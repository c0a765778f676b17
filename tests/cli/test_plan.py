"""`pcscale plan`: quick, without torch, from config.json alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.runs import World, invoke, refusal

WITHOUT = ("torch", "transformers", "datasets", "matplotlib", "numpy")
PROGRAM = f"""
import sys
from pcscale.cli.main import app
try:
    app(["plan", sys.argv[1], "--json"])
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = [name for name in {WITHOUT!r} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.fixture
def config_alone(world: World, tmp_path: Path) -> Path:
    folder = tmp_path / "config alone"
    folder.mkdir()
    shutil.copy(world.base / "config.json", folder)
    return folder


@pytest.mark.parametrize("with_weights", [False, True])
def test_plan_imports_no_heavy_library(with_weights: bool, world: World, config_alone: Path) -> None:
    base = world.base if with_weights else config_alone
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["parameters"] == 25120


def test_the_module_is_the_command(config_alone: Path) -> None:
    program = [sys.executable, "-m", "pcscale", "plan", str(config_alone)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0
    assert done.stderr == ""
    assert "25.1 K" in done.stdout
    assert "tied embeddings" in done.stdout


def test_plan_says_the_same_with_weights_and_without(world: World, config_alone: Path) -> None:
    with_weights, without = (json.loads(invoke("plan", base, "--json").stdout) for base in (world.base, config_alone))
    assert with_weights["base"].pop("name") == str(world.base)
    assert without["base"].pop("name") == str(config_alone)
    assert with_weights == without


@pytest.mark.parametrize(
    ("size", "hidden", "ffn"),
    [
        (["--hidden-size", "20", "--intermediate-size", "30"], 20, 30),
        (["--hidden-size", "32", "--intermediate-size", "16"], 32, 16),
    ],
)
def test_exact_widths_are_planned_as_they_are(size: list[str], hidden: int, ffn: int, config_alone: Path) -> None:
    compressed = json.loads(invoke("plan", config_alone, *size, "--json").stdout)["compressed"]
    assert (compressed["hidden_size"], compressed["intermediate_size"]) == (hidden, ffn)


def test_a_parameter_count_is_met_as_closely_as_widths_allow(config_alone: Path) -> None:
    compressed = json.loads(invoke("plan", config_alone, "--target-params", "1.5e4", "--json").stdout)["compressed"]
    assert compressed["parameters"] == pytest.approx(15000, rel=0.05)


def test_plan_without_a_size_keeps_half(config_alone: Path) -> None:
    compressed = json.loads(invoke("plan", config_alone, "--json").stdout)["compressed"]
    assert compressed["keep_fraction"] == pytest.approx(0.5, abs=0.03)


def test_plan_checks_the_headers_where_weights_are_there(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert refusal("plan", base) == (
        f"{base / 'model.safetensors'}: {name} has shape [47, 32], family 'llama' expects [ffn=48, residual=32]. "
        "Check config.json beside the weights."
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (["--keep", "1.5"], "plan: keep is 1.5: input should be less than 1."),
        (["--keep", "0.5", "--target-params", "1e4"], "plan: keep and target_params both say the size: keep one of "),
        (["--hidden-size", "20"], "plan: hidden_size and intermediate_size go together: set both or neither."),
        (["--target-params", "1e9"], "target_params 1e+09 means 1,000,000,000 parameters; legal widths of this base "),
        (
            ["--hidden-size", "18", "--intermediate-size", "30"],
            "hidden_size 18 is not legal: family 'llama' needs a multiple of num_attention_heads = 4. "
            "Nearest legal: 16 and 20.",
        ),
        (["--hidden-size", "36", "--intermediate-size", "30"], "hidden_size 36 is not between 1 and the base's 32. "),
        (["--hidden-size", "32", "--intermediate-size", "48"], "hidden_size and intermediate_size are the base's own"),
    ],
)
def test_a_size_that_cannot_be_is_refused(size: list[str], message: str, config_alone: Path) -> None:
    assert refusal("plan", config_alone, *size).startswith(message)
