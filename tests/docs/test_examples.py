"""The examples, run as they are printed."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.runs import build_world, invoke
from tests.tiny import build_base

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's blocks one after the other; returns the names that they leave."""
    path = DOCS / page
    blocks = _BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks, f"{page} has no example"
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_base(tmp_path / "base")


def _repetitive_ids(count: int) -> torch.Tensor:
    """Sequences that count upwards, which a tiny model learns in a few steps."""
    starts_N = torch.randint(40, (count, 1), generator=torch.Generator().manual_seed(0))
    return starts_N + torch.arange(16)


def test_the_example_of_an_own_loop_trains_and_merges(base: Path, tmp_path: Path) -> None:
    ids_NT = _repetitive_ids(80)
    names = _run("own_loop.md", {"BASE": str(base), "OUTPUT": tmp_path / "out", "batches": list(ids_NT.split(4))})
    losses = names["losses"]
    assert len(losses) == 20
    assert sum(losses[-3:]) < sum(losses[:3]) - 3.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    # The last block has read the checkpoint into a model of its own: the very one that was merged.
    live = names["c"].model
    assert live.num_parameters() == merged.num_parameters() == names["c"].plan.parameters
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids_NT[:4]).logits for model in (live, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert names["optimizer"].updates == 20


def test_the_example_of_the_trainer_trains_resumes_and_merges(base: Path, tmp_path: Path) -> None:
    dataset = [{"input_ids": ids_T, "labels": ids_T} for ids_T in _repetitive_ids(80)]
    output = tmp_path / "out"
    names = _run("trainer.md", {"BASE": str(base), "OUTPUT": str(output), "dataset": dataset})
    losses = names["losses"]
    assert len(losses) == 16  # The first eight come out of the checkpoint.
    assert sum(losses[-3:]) < sum(losses[:3]) - 3.0
    checkpoint = output / "checkpoint-16"
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    command = re.search(r"^    pcscale (merge .*)$", page, re.MULTILINE)
    assert command is not None
    places = {"OUTPUT": str(output), "BASE": str(base)}
    arguments = [re.sub("^(OUTPUT|BASE)", lambda match: places[match[0]], part) for part in command[1].split()]
    assert invoke(*arguments, "--quiet").exit_code == 0
    merged, saved = load_file(output / "merged" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert merged.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(output / "merged")


def test_the_script_in_cells_trains_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, output = build_world(tmp_path), tmp_path / "out"
    script = ROOT / "examples" / "own_loop.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(world.base), str(output), str(world.text)])
    names = runpy.run_path(str(script), run_name="__main__")
    assert names["optimizer"].updates == names["max_steps"]
    model = AutoModelForCausalLM.from_pretrained(output / "merged")
    ids_BT = names["batches"][0]
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=ids_BT).logits for one in (model, names["model"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(re.findall(r"^# %% ", script.read_text(encoding="utf-8"), re.MULTILINE)) > 3
