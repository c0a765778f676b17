"""Calibration against hooks on the stock model in memory, and its file."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pcscale.base.forward import LayerMajorModel
from pcscale.calibration import collect
from pcscale.calibration.collect import activation_scores, collect_scores, read_scores, write_scores
from pcscale.calibration.score import Scores, magnitude_scores, random_scores
from pcscale.calibration.statistics import SECOND_MOMENT
from pcscale.common.errors import RequestError
from tests.projection.parts import ALL_CASES, CPU, Compression, TinyBase, case_folder, token_batches

SUM_TOLERANCE = 1e-5
"""Relative: float32 sums over some hundred tokens, in another order."""
BATCHES = [*token_batches(3), token_batches(1, batch=1, tokens=20)[0]]


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


def scores_of(
    compression: Compression, batches: list[torch.Tensor] = BATCHES, importance: str = "activation"
) -> Scores:
    return activation_scores(compression.plan, compression.base, importance, batches, CPU, torch.float32)


def stock_scores(folder: Path, importance: str) -> Scores:
    """The same sums in float64, from hooks on the whole model, every norm and matrix named by hand."""
    power = {"activation": 1, "energy": 2}[importance]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores: Scores = {"residual": torch.zeros(32, dtype=torch.float64)}
    moment_HH = torch.zeros(32, 32, dtype=torch.float64)
    energies: Scores = {}
    norms = ["model.norm"]
    for layer in range(2):
        norms += [f"model.layers.{layer}.input_layernorm", f"model.layers.{layer}.post_attention_layernorm"]

        def watch_down(module: Any, inputs: Any, output: torch.Tensor, name: str = f"ffn.{layer}") -> None:
            weight = module.weight.double().square().sum(0) if importance == "energy" else 1
            scores[name] = scores.get(name, 0) + inputs[0].double().abs().pow(power).sum((0, 1)) * weight

        model.get_submodule(f"model.layers.{layer}.mlp.down_proj").register_forward_hook(watch_down)

    for name in norms:
        energies[f"energy.{name}.weight"] = torch.zeros(32, dtype=torch.float64)

        def watch_norm(_: object, inputs: Any, output: torch.Tensor, energy: str = f"energy.{name}.weight") -> None:
            scores["residual"] += output.double().abs().pow(power).sum((0, 1))
            for x_H in inputs[0].double().flatten(0, 1):
                x_H = x_H / x_H.pow(2).mean().sqrt()
                moment_HH.add_(torch.outer(x_H, x_H))
                energies[energy] += x_H.square()

        model.get_submodule(name).register_forward_hook(watch_norm)
    with torch.no_grad():
        for ids_BT in BATCHES:
            model(ids_BT, use_cache=False)
    tokens = sum(batch.numel() for batch in BATCHES)
    means = {name: energy / tokens for name, energy in energies.items()}
    return scores | means | {"second_moment.residual": moment_HH / (tokens * len(norms))}


@pytest.mark.parametrize("importance", ["activation", "energy"])
@pytest.mark.parametrize(("family", "tied", "biased"), ALL_CASES)
def test_activation_sums_and_second_moments_are_those_of_hooks_on_the_stock_model(
    family: str, tied: bool, biased: bool, importance: str, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(case_folder(family, tied, biased, tiny_base, tmp_path))
    found = scores_of(compression, importance=importance)
    expected = stock_scores(compression.base.folder, importance)
    assert found.keys() == expected.keys() > {"residual", "ffn.0", "ffn.1", SECOND_MOMENT}
    for name, score in expected.items():
        assert found[name].dtype == torch.float32
        scale = score.abs().max().item()
        torch.testing.assert_close(found[name].double(), score, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE * scale)


def test_second_moments_have_a_mean_square_of_one(compression: Compression) -> None:
    moment_HH = scores_of(compression)[SECOND_MOMENT]
    assert moment_HH.diagonal().mean().item() == pytest.approx(1, rel=SUM_TOLERANCE)
    torch.testing.assert_close(moment_HH, moment_HH.T, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


def test_watching_changes_no_hidden_state(compression: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that returns something replaces the module's input or output."""
    seen: list[torch.Tensor] = []

    class Recording(LayerMajorModel):
        def hidden_states(self, batches: list[torch.Tensor], label: str) -> Any:
            for group in super().hidden_states(batches, label):
                seen.extend(group)
                yield group

    monkeypatch.setattr(collect, "LayerMajorModel", Recording)
    scores_of(compression)
    expected = [
        hidden for group in LayerMajorModel(compression.base, CPU).hidden_states(BATCHES, "test") for hidden in group
    ]
    assert len(seen) == len(BATCHES)
    assert all(torch.equal(found, hidden) for found, hidden in zip(seen, expected, strict=True))


def test_scores_of_two_texts_add_up(compression: Compression) -> None:
    whole, one, other = (scores_of(compression, part) for part in (BATCHES, BATCHES[:2], BATCHES[2:]))
    tokens = [sum(batch.numel() for batch in part) for part in (BATCHES[:2], BATCHES[2:])]
    for name in ("residual", "ffn.0", "ffn.1"):
        torch.testing.assert_close(whole[name], one[name] + other[name], rtol=SUM_TOLERANCE, atol=0)
    mean = (one[SECOND_MOMENT] * tokens[0] + other[SECOND_MOMENT] * tokens[1]) / sum(tokens)
    torch.testing.assert_close(whole[SECOND_MOMENT], mean, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


@pytest.mark.parametrize("importance", ["activation", "magnitude", "random"])
def test_the_importance_asked_for_is_collected(compression: Compression, importance: str) -> None:
    plan, base = compression.plan, compression.base
    found = collect_scores(plan, base, importance, BATCHES, 5, CPU, torch.float32)
    expected = {
        "activation": lambda: scores_of(compression),
        "magnitude": lambda: magnitude_scores(plan, compression.weights.__getitem__),
        "random": lambda: random_scores(plan, 5),
    }[importance]()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scores_come_back_from_their_file_to_the_last_bit(compression: Compression, tmp_path: Path) -> None:
    path, scores = tmp_path / "scores.safetensors", scores_of(compression)
    write_scores(path, scores, "activation", 92)
    found, stored = read_scores(path), load_file(path)
    assert found.keys() == stored.keys() == scores.keys()
    for name, score in scores.items():
        assert torch.equal(found[name], score)
        assert torch.equal(stored[name], score)
    path.unlink()
    assert all(torch.equal(found[name], score) for name, score in scores.items())


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"residual": torch.ones(32)}, path, metadata={"format": "pt"})
    message = f"{path} holds no importance scores. Write it with `pcscale calibrate`."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_scores(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_text("residual,ffn.0\n" * 4)
    with pytest.raises(RequestError, match=re.escape(f"{path} is ")):
        read_scores(path)
