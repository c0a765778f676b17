"""`pcscale verify`: passes on a whole run, and each of its checks can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pcscale.cli.main import app
from pcscale.common.errors import RequestError
from pcscale.config.load import dump_run_config
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.jobs.verify import verify
from pcscale.merging.verify import LOGIT_TOLERANCE, Check
from pcscale.projection import algebra
from pcscale.projection.algebra import Gradients
from pcscale.run.folder import BASE_CACHE_NAME
from tests.merging.trained import COMPACT, Train, TrainedRun, merge_run, train_and_save

LOGITS = "merged logits, largest difference from live ones (of the largest)"
STEP = "streamed step, largest difference from the in-memory one (of the change)"
SAME_STEP = 1e-3
"""Two float32 steps in another order of sums: well inside what `verify` allows."""


@pytest.fixture
def run_folder(trained: Train, tmp_path: Path) -> Callable[..., Path]:
    """`run_folder(method, dtype)`: a run as the pipeline leaves it, as far as `verify` reads it."""

    def build(
        method: str = "projected", dtype: torch.dtype = torch.float32, merged: bool = True, **changes: Any
    ) -> Path:
        run, folder = trained("qwen2", True, method, dtype), tmp_path / "run"
        checkpoint = folder / "checkpoints" / run.checkpoint.name
        if changes:
            run = train_and_save(run.base_folder, checkpoint, **changes)
        else:
            shutil.copytree(run.checkpoint, checkpoint)
        data = DataConfig(train=["text.txt"])
        config = RunConfig(base=str(run.base_folder), output=str(folder), data=data, method=method, start="selection")
        (folder / "run.yaml").write_text(dump_run_config(config))
        if merged:
            merge_run(run, folder / "merged")
            (folder / "merge.json").write_text(json.dumps({"checkpoint": checkpoint.name}))
        return folder

    return build


def _change_tensor(path: Path, name: str, change: float) -> None:
    tensors = load_file(path)
    tensors[name] += change
    save_file(tensors, path, {"format": "pt"})


def _found(result: dict[str, Any], name: str) -> float:
    return result["checks"][name]["found"]


@pytest.mark.parametrize("method", ["projected", "hard_prune"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_run_passes(method: str, dtype: torch.dtype, run_folder: Callable[..., Path]) -> None:
    folder = run_folder(method, dtype)
    result = verify(folder)
    assert result["passed"]
    assert result["checkpoint"] == str(folder / "checkpoints" / "step-00000003")
    assert set(result["checks"]) == {"checkpoint files changed", "base weights changed", LOGITS, STEP}
    assert [row[0] for row in result["rows"]] == list(result["checks"])
    assert _found(result, STEP) <= SAME_STEP
    # In float32 nothing is rounded when the model is merged; in bfloat16 every weight is.
    assert (_found(result, LOGITS) <= LOGIT_TOLERANCE["float32"]) == (dtype == torch.float32)


@pytest.mark.parametrize("changes", COMPACT.values(), ids=COMPACT)
def test_a_whole_run_in_few_bits_passes(changes: dict[str, Any], run_folder: Callable[..., Path]) -> None:
    result = verify(run_folder(**changes))
    assert result["passed"]
    assert _found(result, STEP) <= SAME_STEP
    assert _found(result, LOGITS) <= LOGIT_TOLERANCE["float32"]


def test_a_run_whose_8_bit_codes_are_gone_is_verified_all_the_same(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(**COMPACT["8-bit base"])
    (folder / BASE_CACHE_NAME).unlink()
    before = sorted(folder.rglob("*"))
    assert verify(folder)["passed"]
    assert sorted(folder.rglob("*")) == before


def test_the_newest_checkpoint_is_verified(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    (folder / "checkpoints" / "step-00000001").mkdir()
    assert verify(folder)["checkpoint"].endswith("step-00000003")


def test_a_changed_merged_weight_fails_the_logits_alone(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    _change_tensor(folder / "merged" / "model.safetensors", "model.layers.1.mlp.down_proj.weight", 0.01)
    result = verify(folder)
    assert not result["passed"]
    failed = [name for name, check in result["checks"].items() if check["found"] > check["allowed"]]
    assert failed == [LOGITS]


def test_the_command_line_says_passed_or_exits_with_1(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    whole = CliRunner().invoke(app, ["verify", str(folder), "--json", "--quiet"])
    assert whole.exit_code == 0
    assert json.loads(whole.stdout)["passed"] is True
    _change_tensor(folder / "merged" / "model.safetensors", "model.norm.weight", 0.1)
    changed = CliRunner().invoke(app, ["verify", str(folder), "--json", "--quiet"])
    assert changed.exit_code == 1
    assert json.loads(changed.stdout)["passed"] is False
    table = CliRunner().invoke(app, ["verify", str(folder), "--quiet"])
    assert table.exit_code == 1
    assert LOGITS in table.stdout


def test_an_error_in_the_pulled_back_gradient_fails_the_step(
    run_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull_back = algebra.pull_back

    def without_the_out_side(W_OI: torch.Tensor, projection: Any, G_oi: torch.Tensor) -> Gradients:
        whole = pull_back(W_OI, projection, G_oi)
        return Gradients(tuple(map(torch.zeros_like, whole.out)), whole.in_, whole.aux)

    folder = run_folder()
    monkeypatch.setattr(algebra, "pull_back", without_the_out_side)
    result = verify(folder)
    assert not result["passed"]
    assert _found(result, STEP) > result["checks"][STEP]["allowed"]
    assert _found(result, LOGITS) <= result["checks"][LOGITS]["allowed"]


def test_a_step_that_is_not_a_number_fails(run_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pull_back = algebra.pull_back

    def broken(W_OI: torch.Tensor, projection: Any, G_oi: torch.Tensor) -> Gradients:
        whole = pull_back(W_OI, projection, G_oi)
        return Gradients(whole.out, tuple(part * torch.nan for part in whole.in_), whole.aux)

    folder = run_folder()
    monkeypatch.setattr(algebra, "pull_back", broken)
    assert not verify(folder)["passed"]


@pytest.mark.parametrize(
    ("found", "passed"), [(0.0, True), (0.1, True), (0.11, False), (float("inf"), False), (float("nan"), False)]
)
def test_a_check_passes_up_to_what_is_allowed(found: float, passed: bool) -> None:
    assert Check("some", found, 0.1).passed == passed


def test_a_changed_record_is_refused(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    name = "model.layers.0.self_attn.q_proj.weight"
    record = folder / "checkpoints" / "step-00000003" / "records" / f"{name}.safetensors"
    _change_tensor(record, "aux", 1e-3)
    with pytest.raises(RequestError, match=rf"{name}\.safetensors is not what was written \(its fingerprint differs\)"):
        verify(folder)
    assert CliRunner().invoke(app, ["verify", str(folder), "--quiet"]).exit_code == 2


def test_a_changed_base_is_refused(trained: Train, run_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, base = run_folder(), tmp_path / "other base"
    shutil.copytree(trained("qwen2", True).base_folder, base)
    _change_tensor(base / "model.safetensors", "model.norm.weight", 1e-3)
    settings = folder / "run.yaml"
    settings.write_text(settings.read_text().replace(str(trained("qwen2", True).base_folder), str(base)))
    with pytest.raises(RequestError, match=r"model\.norm\.weight is not the weight this checkpoint was trained on"):
        verify(folder)


def test_a_run_that_is_not_merged_yet_is_verified_without_logits_and_says_so(
    run_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(merged=False)
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    document = json.loads(result.stdout)
    assert document["passed"]
    assert LOGITS not in document["checks"]
    assert STEP in document["checks"]
    assert "merged is not of the last checkpoint: merged weights were not compared" in result.stderr


def test_a_merged_folder_that_does_not_load_is_refused(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    shard = folder / "merged" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RequestError, match=r"merged: stock transformers cannot load it"):
        verify(folder)


def test_a_run_without_a_checkpoint_is_refused(run_folder: Callable[..., Path]) -> None:
    folder = run_folder()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RequestError, match=r"run has no checkpoint yet\. Train first\."):
        verify(folder)


def test_a_folder_that_is_no_run_is_refused(run: TrainedRun) -> None:
    with pytest.raises(RequestError, match=r"step-00000003 is not a run folder: it has no run\.yaml\."):
        verify(run.checkpoint)
