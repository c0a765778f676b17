"""The library: one import, and the same job, defaults and bytes as the command's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pcscale
from tests.runs import World, curve, invoke, light_runs, run, run_values, snapshot, world, write_yaml
from tests.tiny import build_base, write_text

__all__ = ["light_runs", "run", "world"]


def token_batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Sequences that count upwards, which a tiny model learns in a few steps."""
    starts_N = torch.randint(40, (4 * count, 1), generator=torch.Generator().manual_seed(seed))
    return list((starts_N + torch.arange(16)).split(4))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_base(tmp_path / "base")


def train(compression: pcscale.Compression, optimizer: pcscale.ProjectedAdamW, batches: list[torch.Tensor]) -> None:
    for ids_BT in batches:
        compression.model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(compression: pcscale.Compression) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in compression.model.named_parameters()}


def test_the_whole_job_is_that_of_the_command(world: World, run: Path, tmp_path: Path) -> None:
    settings = write_yaml(tmp_path / "run.yaml", run_values(world, run, max_steps=4))
    report = pcscale.compress(settings, output=str(tmp_path / "own"))
    assert invoke("compress", settings).exit_code == 0
    assert curve(report.folder) == curve(run)
    assert snapshot(report.merged).keys() == snapshot(run / "merged").keys()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (report.merged, run / "merged"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert report.document == json.loads((report.folder / "report.json").read_text())
    assert report.evaluation.compressed is not None
    assert report.evaluation.compressed.loss == report.document["evaluation"]["compressed"]["loss"]


def test_a_mapping_or_settings_do_as_well_as_a_file(world: World, run: Path, tmp_path: Path) -> None:
    values = run_values(world, run, max_steps=2)
    by_mapping = pcscale.compress(values)
    by_settings = pcscale.compress(pcscale.RunConfig(**values), output=str(tmp_path / "other"))
    assert curve(by_mapping.folder) == curve(by_settings.folder)


@pytest.mark.parametrize("method", ["projected", "hard_prune"])
def test_the_optimizer_has_the_defaults_of_run_yaml(method: str, base: Path) -> None:
    config = pcscale.RunConfig.model_validate({"base": "b", "output": "o", "data": {"train": ["t"]}, "method": method})
    compression = pcscale.prepare(base, text=token_batches(2), method=method)  # pyright: ignore[reportArgumentType]
    optimizer = pcscale.ProjectedAdamW(compression)
    for group in optimizer.param_groups:
        assert group["lr"] == config.learning_rate
        assert group["lr"] * group["aux_ratio"] == pytest.approx(config.aux_rate)
        assert group["betas"] == (config.adam_beta1, config.adam_beta2)
        assert (group["eps"], group["weight_decay"]) == (config.adam_epsilon, config.weight_decay)
    assert optimizer.projection_rates == config.projection_rates
    state = pcscale.State()
    assert (state.residency, state.record_dtype, state.moments) == (
        config.residency,
        config.record_dtype,
        config.moments,
    )
    assert (state.projection_rank, state.gradient_home, state.seed) == (config.rank, config.gradient_home, config.seed)


def test_prepare_starts_as_a_run_does(world: World, run: Path) -> None:
    """Through files and tokenizer: the start that `compress` merges when nothing is trained."""
    values = run_values(world, run, max_steps=1, learning_rate=1e-30, aux_learning_rate=1e-30)
    values |= {"start": "pca_least_squares", "importance": "energy"}
    merged = load_file(pcscale.compress(values).merged / "model.safetensors")
    tokens = load_file(run / "tokens.safetensors")["train"]
    batches = list(tokens[torch.linspace(0, len(tokens) - 1, 20).round().long()].split(2))
    compression = pcscale.prepare(world.base, text=batches)
    for name, value in weights(compression).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [{"keep": 0.6}, {"target_params": 9000}, {"hidden_size": 16, "intermediate_size": 24}])
def test_sizes_are_those_of_plan(size: dict[str, Any], base: Path) -> None:
    planned = pcscale.plan(base, **size)["compressed"]
    compression = pcscale.prepare(base, text=(), importance="magnitude", start="selection", **size)
    assert compression.model.config.hidden_size == planned["hidden_size"]
    assert compression.model.num_parameters() == planned["parameters"]


STATES: dict[str, Callable[[Path], pcscale.State]] = {
    "on the device": lambda folder: pcscale.State(),
    "four bytes, in files": lambda folder: pcscale.State("disk", folder, record_dtype="bfloat16", moments="8bit"),
    "low rank, in host memory": lambda folder: pcscale.State("cpu", projection_rank=3),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("precision", ["stored", "int8"])
def test_a_checkpoint_is_gone_on_from_to_the_last_bit_and_merges(
    state: str, precision: str, base: Path, tmp_path: Path
) -> None:
    batches = token_batches(6)
    compression = pcscale.prepare(base, text=batches[:2], base_precision=precision)  # pyright: ignore[reportArgumentType]
    optimizer = pcscale.ProjectedAdamW(compression, lr=1e-3, weight_decay=0.1, state=STATES[state](tmp_path / "one"))
    train(compression, optimizer, batches[:3])
    optimizer.save_pretrained(tmp_path / "checkpoint")
    train(compression, optimizer, batches[3:])
    elsewhere = pcscale.State("disk", tmp_path / "other")
    again, other = pcscale.from_checkpoint(tmp_path / "checkpoint", state=elsewhere)
    assert other.param_groups[0]["lr"] == 1e-3
    train(again, other, batches[3:])
    expected, found = weights(compression), weights(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    other.save_pretrained(tmp_path / "checkpoint")  # One that is there is replaced.
    result = pcscale.merge(tmp_path / "checkpoint", tmp_path / "merged")
    assert result.tensors == len(again.plan.weights)
    live, merged = again.model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]).logits, live(batches[0]).logits, rtol=1e-4, atol=1e-4)


def test_a_base_that_has_moved_is_named_and_another_one_refused(base: Path, tmp_path: Path) -> None:
    compression = pcscale.prepare(base, importance="magnitude", start="selection")
    pcscale.ProjectedAdamW(compression).save_pretrained(tmp_path / "checkpoint")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(pcscale.PcscaleError, match=r"base is not found by its name .* Name it with `base`"):
        pcscale.merge(tmp_path / "checkpoint", tmp_path / "merged")
    pcscale.merge(tmp_path / "checkpoint", tmp_path / "merged", base=moved)
    other = build_base(tmp_path / "other", seed=1)
    with pytest.raises(pcscale.PcscaleError, match="is not the weight this checkpoint was trained on"):
        pcscale.from_checkpoint(tmp_path / "checkpoint", base=other)


def test_evaluate_gives_the_document_of_the_command(world: World, tmp_path: Path) -> None:
    text = write_text(tmp_path / "held.txt", num_words=300, seed=2)
    found = pcscale.evaluate(world.base, str(text), tokens=96, sequence_length=24)
    outcome = invoke("evaluate", world.base, "--data", text, "--tokens", "96", "--sequence-length", "24", "--json")
    expected = json.loads(outcome.stdout)
    assert found.keys() == expected.keys()
    assert found["loss"] == expected["loss"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base: pcscale.prepare(base), "prepare calibrates on text: give token batches or files as `text`"),
        (lambda base: pcscale.prepare(base, keep=1.5), "prepare: keep is 1.5: "),
        (lambda base: pcscale.prepare(base, keep=0.5, hidden_size=8), "hidden_size and intermediate_size go together"),
        (lambda base: pcscale.prepare(base / "no"), "is neither a checkpoint folder nor a Hub id"),
        (lambda base: pcscale.plan(base, kep=0.5), "kep is not a setting. Did you mean 'keep'?"),
        (lambda base: pcscale.compress({"base": str(base)}), "compress: .* is not set and has no default"),
        (lambda base: pcscale.from_checkpoint(base), "is not a checkpoint: it has no manifest.json"),
    ],
)
def test_bad_requests_are_refused_in_a_line(call: Callable[[Path], Any], message: str, base: Path) -> None:
    with pytest.raises(pcscale.PcscaleError, match=message) as caught:
        call(base)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"residency": "gpu"}, "residency is 'gpu', expected device or cpu or disk"),
        ({"gradient_home": "host"}, "gradient_home is 'host', expected device or cpu"),
        ({"moments": "8"}, "moments is '8', expected 32bit or 8bit"),
        ({"residency": "disk"}, "Give State a folder"),
    ],
)
def test_a_state_that_cannot_be_is_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(pcscale.PcscaleError, match=message):
        pcscale.State(**state)


def test_messages_stay_with_the_callers_logging(world: World, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from pcscale.common.console import logger

    logger.propagate, before = True, logger.level
    try:
        with caplog.at_level(logging.INFO, logger="pcscale"):
            pcscale.compress(run_values(world, run, max_steps=1))
        assert any("held-out loss" in record.getMessage() for record in caplog.records)
    finally:
        logger.setLevel(before)
