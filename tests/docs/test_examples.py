"""The examples of the docs, run as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.runs import invoke
from tests.tiny import build_base

DOCS = Path(__file__).parents[2] / "docs"
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
    live = names["model"]
    assert live.num_parameters() == merged.num_parameters() == names["plan"].parameters
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
