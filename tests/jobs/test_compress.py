"""The whole job on a tiny base."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pcscale.config.schema import RunConfig
from pcscale.jobs.compress import compress
from pcscale.training.trackers import OPENERS
from tests.runs import (
    World,
    curve,
    invoke,
    leftovers,
    metrics,
    run_config,
    run_values,
    saved_steps,
    snapshot,
    write_yaml,
)
from tests.tiny import CASES, build_base, write_text

MERGED_TOLERANCE = 1e-5
"""The merged model is composed in blocks, so it rounds differently in float32."""
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report. Read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    compress(run_config(world, run, max_steps=40, eval_steps=20, save_steps=20))
    return run


def _evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def _stock_loss(model: Any, ids_MT: torch.Tensor) -> float:
    """The held-out loss as stock transformers computes it."""
    with torch.no_grad():
        return model.eval()(input_ids=ids_MT.long(), labels=ids_MT.long()).loss.item()


def _held_out(run: Path) -> torch.Tensor:
    return load_file(run / "tokens.safetensors")["validation"]


def test_a_run_leaves_every_part_in_its_folder(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "run.yaml",
        "plan.json",
        "tokens.safetensors",
        "scores.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "merge.json",
        "usage.json",
        "memory.json",
        "checkpoints",
        "merged",
        "report.html",
        "report.json",
        "plots",
    }
    assert leftovers(finished) == []


def test_run_yaml_holds_every_setting_and_says_the_same_again(world: World, finished: Path) -> None:
    values = yaml.safe_load((finished / "run.yaml").read_text())
    assert set(values) == set(RunConfig.model_fields)
    asked = run_config(world, finished, max_steps=40, eval_steps=20, save_steps=20)
    assert RunConfig.model_validate(values) == asked.resolved()
    assert (asked.aux_learning_rate, values["aux_learning_rate"]) == (None, 0.03)


def test_metrics_have_a_row_for_every_step_in_full_precision(world: World, finished: Path) -> None:
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, 41))
    keys = {"step", "tokens", "loss", "learning_rate", "grad_norm", "seconds", "moved_bytes"}
    assert all(set(row) - {"eval_loss"} == keys for row in rows)
    assert [row["step"] for row in rows if "eval_loss" in row] == [20, 40]
    assert [row["tokens"] for row in rows] == [96 * step for step in range(1, 41)]
    assert rows[0]["learning_rate"] == pytest.approx(1e-3)
    assert rows[2]["learning_rate"] == 1e-2
    assert all(row["seconds"] > 0 for row in rows)
    # Records stay on the device: what moves is every matrix of the base, once a step.
    matrices = [tensor for tensor in load_file(world.base / "model.safetensors").values() if tensor.ndim == 2]
    assert {row["moved_bytes"] for row in rows} == {sum(tensor.nbytes for tensor in matrices)}
    # A float32 loss written out whole comes back as itself.
    assert all(torch.tensor(row["loss"], dtype=torch.float32).item() == row["loss"] for row in rows)


def test_training_lowers_the_held_out_loss(finished: Path) -> None:
    evaluation = _evaluation(finished)
    assert evaluation["compressed"]["loss"] < evaluation["start"]["loss"] - 1.0
    rows = metrics(finished)
    assert rows[-1]["eval_loss"] < rows[19]["eval_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0


def test_the_base_was_evaluated_as_stock_transformers_would(world: World, finished: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world.base)
    result = _evaluation(finished)["base"]
    assert result["loss"] == pytest.approx(_stock_loss(base, _held_out(finished)), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["parameters"] == sum(parameter.numel() for parameter in base.parameters())


def test_the_start_is_the_hard_pruned_model(world: World, finished: Path) -> None:
    """Cut by hand: which dims are the residual's and which the ffn's is written out here."""
    plan = json.loads((finished / "plan.json").read_text())["compressed"]
    scores = load_file(finished / "scores.safetensors")
    config = LlamaConfig.from_pretrained(world.base)
    config.hidden_size, config.intermediate_size = plan["hidden_size"], plan["intermediate_size"]
    residual = scores["residual"].topk(config.hidden_size).indices.sort().values
    weights = load_file(world.base / "model.safetensors")
    for name, weight in weights.items():
        residual_dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")) else 1
        weights[name] = weight.index_select(residual_dim, residual)
        if "mlp" in name:
            ffn = scores[f"ffn.{name.split('.')[2]}"].topk(config.intermediate_size).indices.sort().values
            weights[name] = weights[name].index_select(1 if "down_proj" in name else 0, ffn)
    pruned = LlamaForCausalLM(config)
    pruned.load_state_dict(weights, strict=False)
    pruned.tie_weights()
    result = _evaluation(finished)["start"]
    assert result["loss"] == pytest.approx(_stock_loss(pruned, _held_out(finished)), rel=1e-5)
    assert result["parameters"] == plan["parameters"] == sum(p.numel() for p in pruned.parameters())


def test_the_merged_model_is_the_one_that_was_trained(finished: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished / "merged")
    last = metrics(finished)[-1]["eval_loss"]
    assert _evaluation(finished)["compressed"]["loss"] == pytest.approx(last, rel=MERGED_TOLERANCE)
    assert _stock_loss(merged, _held_out(finished)) == pytest.approx(last, rel=MERGED_TOLERANCE)
    tokenizer: Any = AutoTokenizer.from_pretrained(finished / "merged")
    assert tokenizer("a lantern")["input_ids"]


def test_the_report_has_the_figures_of_the_run(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    evaluation = _evaluation(finished)
    for name in ("base", "start", "compressed"):
        assert report["evaluation"][name]["loss"] == evaluation[name]["loss"]
        assert report["evaluation"][name]["parameters"] == evaluation[name]["parameters"]
    assert set(report["peak"]["host_anonymous"]) == {"predicted_bytes", "measured_bytes"}
    assert all(report["peak"]["host_anonymous"].values())
    for phase in ("calibrate", "train", "merge", "evaluate"):
        assert report["phases"][phase]["seconds"] > 0
        assert report["phases"][phase]["host_anonymous"]["measured_bytes"] > 0
    assert report["training"]["steps"] == 40


def test_merge_json_is_what_the_merge_did(finished: Path) -> None:
    merge = json.loads((finished / "merge.json").read_text())
    size = (finished / "merged" / "model.safetensors").stat().st_size
    assert merge["checkpoint"] == "step-00000040"
    assert merge["bytes_written"] == size
    assert (merge["tensors"], merge["shards"]) == (len(load_file(finished / "merged" / "model.safetensors")), 1)


def test_checkpoints_hold_no_base_weight(world: World, finished: Path) -> None:
    base = {tuple(weight.shape) for weight in load_file(world.base / "model.safetensors").values() if weight.ndim > 1}
    record = finished / "checkpoints" / "step-00000040" / "records" / "model.layers.0.mlp.up_proj.weight.safetensors"
    assert {name.partition(".")[0] for name in load_file(record)} == {"delta_out", "delta_in", "aux"}
    assert not base & {tuple(value.shape) for value in load_file(record).values()}


# From here on: what differs between settings, without plots.


@pytest.fixture
def light(no_plots: None) -> None:
    """These runs draw nothing."""


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_every_family_runs_tied_and_untied(family: str, tied: bool, world: World, tmp_path: Path, run: Path) -> None:
    base = build_base(tmp_path / "base", family, tied, tokenizer=True)
    report = compress(run_config(World(base, world.text), run, max_steps=6))
    evaluation = report["evaluation"]
    assert evaluation["compressed"]["loss"] < evaluation["start"]["loss"]
    assert evaluation["compressed"]["loss"] == pytest.approx(metrics(run)[-1]["eval_loss"], rel=MERGED_TOLERANCE)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == (family, tied)


@pytest.mark.usefixtures("light")
def test_hard_pruning_starts_alike_and_trains_the_start_alone(
    config: Callable[..., RunConfig], finished: Path, run: Path
) -> None:
    report = compress(config(method="hard_prune", max_steps=40))
    evaluation = report["evaluation"]
    assert evaluation["start"]["loss"] == _evaluation(finished)["start"]["loss"]
    assert evaluation["compressed"]["loss"] < evaluation["start"]["loss"]
    assert evaluation["compressed"]["loss"] == pytest.approx(metrics(run)[-1]["eval_loss"], rel=MERGED_TOLERANCE)
    assert metrics(run)[0]["loss"] == pytest.approx(metrics(finished)[0]["loss"], rel=1e-6)
    checkpoint = run / "checkpoints" / "step-00000040"
    assert not (checkpoint / "records").exists()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trainable"]["parameters"] == plan["compressed"]["parameters"]


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_importance_without_activations_keeps_other_channels(
    importance: str, config: Callable[..., RunConfig], finished: Path, run: Path
) -> None:
    compress(config(importance=importance, max_steps=1))
    with safe_open(run / "scores.safetensors", framework="pt") as scores:
        assert scores.metadata() == {"importance": importance, "tokens": "0"}

    def kept(folder: Path) -> list[int]:
        checkpoint = max((folder / "checkpoints").iterdir())
        return load_file(checkpoint / "outer.safetensors")["kept.residual"].tolist()

    own = load_file(run / "scores.safetensors")["residual"]
    assert kept(run) == own.topk(len(kept(run))).indices.sort().values.tolist()
    assert kept(run) != kept(finished)


@pytest.mark.usefixtures("light")
def test_the_seed_changes_random_scores_and_the_order_of_the_text(world: World, tmp_path: Path) -> None:
    for seed in (1, 2):
        compress(run_config(world, tmp_path / str(seed), importance="random", seed=seed, max_steps=1))
    first, second = (load_file(tmp_path / str(seed) / "scores.safetensors")["residual"] for seed in (1, 2))
    assert not torch.equal(first, second)
    assert curve(tmp_path / "1") != curve(tmp_path / "2")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("method", ["projected", "hard_prune"])
def test_bf16_trains_close_to_float32(method: str, world: World, tmp_path: Path) -> None:
    for bf16 in (True, False):
        compress(run_config(world, tmp_path / str(bf16), method=method, bf16=bf16, max_steps=6))
    half, full = metrics(tmp_path / "True"), metrics(tmp_path / "False")
    losses = [row["loss"] for row in half]
    assert losses == pytest.approx([row["loss"] for row in full], rel=BF16_TOLERANCE)
    assert losses != [row["loss"] for row in full]
    merged = load_file(tmp_path / "True" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    assert _evaluation(tmp_path / "True")["compressed"]["loss"] == pytest.approx(
        half[-1]["eval_loss"], rel=BF16_TOLERANCE
    )


@pytest.mark.usefixtures("light")
def test_a_bf16_base_is_merged_to_bf16(world: World, tmp_path: Path, run: Path) -> None:
    base = build_base(tmp_path / "base", tokenizer=True, dtype=torch.bfloat16)
    report = compress(run_config(World(base, world.text), run))
    merged = load_file(run / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert json.loads((run / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    last = metrics(run)[-1]["eval_loss"]
    assert report["evaluation"]["compressed"]["loss"] == pytest.approx(last, rel=BF16_TOLERANCE)


@pytest.mark.usefixtures("light")
def test_gradient_checkpointing_gives_the_same_losses(world: World, tmp_path: Path) -> None:
    for recompute in (True, False):
        compress(run_config(world, tmp_path / str(recompute), gradient_checkpointing=recompute, max_steps=5))
    assert curve(tmp_path / "True") == curve(tmp_path / "False")


@pytest.mark.usefixtures("light")
def test_a_global_batch_gives_the_same_losses_however_it_is_split(world: World, tmp_path: Path) -> None:
    for batch, accumulation in ((2, 2), (4, 1)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        compress(run_config(world, tmp_path / str(batch), **settings))
    two, four = metrics(tmp_path / "2"), metrics(tmp_path / "4")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in four], rel=1e-3)
    assert two[0]["loss"] == pytest.approx(four[0]["loss"], rel=1e-6)


@pytest.mark.usefixtures("light")
def test_validation_text_of_its_own_is_what_is_held_out(world: World, tmp_path: Path, run: Path) -> None:
    validation = write_text(tmp_path / "valid.txt", num_words=400, seed=77)
    data = {"train": [str(world.text)], "validation": [str(validation)]}
    compress(run_config(world, run, data=data, max_steps=2, eval_tokens=96))
    tokenizer: Any = AutoTokenizer.from_pretrained(world.base)
    ids = tokenizer(validation.read_text())["input_ids"]
    held_out = _held_out(run)
    assert held_out.shape == (4, 24)
    assert held_out.flatten().tolist() == ids[:96]


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"save_steps": 2, "keep_checkpoints": 3}, [6, 8, 9]),
        ({"save_steps": 3, "keep_checkpoints": 1}, [9]),
        ({"save_steps": 100, "keep_checkpoints": 2}, [9]),
    ],
)
def test_the_newest_checkpoints_stay_and_the_last_step_always_has_one(
    changes: dict[str, int], steps: list[int], config: Callable[..., RunConfig], run: Path
) -> None:
    compress(config(max_steps=9, **changes))
    assert saved_steps(run) == steps


@pytest.mark.usefixtures("light")
def test_one_step_is_a_run(config: Callable[..., RunConfig], run: Path) -> None:
    report = compress(config(max_steps=1, warmup_steps=40))
    assert metrics(run)[0]["learning_rate"] == pytest.approx(1e-3)
    assert report["evaluation"]["compressed"]["loss"] == pytest.approx(metrics(run)[0]["eval_loss"])


@pytest.mark.usefixtures("light")
def test_exact_widths_are_the_ones_of_the_merged_model(config: Callable[..., RunConfig], run: Path) -> None:
    compress(config(max_steps=1, hidden_size=20, intermediate_size=48))
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.head_dim) == (20, 48, 8)


@pytest.mark.parametrize("resume", [False, True])
def test_a_dry_run_checks_and_plans_and_writes_nothing(resume: bool, world: World, tmp_path: Path, run: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    before = snapshot(tmp_path)
    outcome = invoke("compress", path, "--dry-run", *(["--resume"] if resume else []))
    assert outcome.exit_code == 0
    assert outcome.stdout.strip().startswith("would compress to 12,")
    assert outcome.stdout.strip().endswith("nothing was written")
    assert snapshot(tmp_path) == before
    assert not run.exists()


def test_a_dry_run_with_json_prints_the_plan(world: World, tmp_path: Path, run: Path, finished: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    document = json.loads(invoke("compress", path, "--dry-run", "--json").stdout)
    plan = json.loads((finished / "plan.json").read_text())
    assert document["compressed"] == plan["compressed"]
    assert document["base"] == plan["base"]
    assert not run.exists()


@pytest.mark.usefixtures("light")
def test_every_tracker_gets_every_row_and_is_closed(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    closed: list[Path] = []
    monkeypatch.setattr("pcscale.training.trackers.find_spec", lambda name: name)
    monkeypatch.setitem(OPENERS, "wandb", lambda folder: (rows.append, lambda: closed.append(folder)))
    compress(config(report_to="wandb", max_steps=3))
    assert rows == metrics(run)
    assert closed == [run]
