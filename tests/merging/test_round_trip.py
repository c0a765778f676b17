"""Proof 4: a merged model is the live model, and stock transformers needs nothing of pcscale to load it."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.merging.conftest import CHAT_TEMPLATE
from tests.merging.trained import (
    COMPACT,
    FFN,
    HIDDEN,
    Train,
    TrainedRun,
    assert_same_tensors,
    file_bytes,
    merge_run,
    merged_tensors,
    run_python,
    train_and_save,
)
from tests.tiny import CASES, FAMILIES, build_base

LOGIT_TOLERANCE = 1e-5
"""The same float32 weights in two processes, whose buffers lie differently in memory: some last bits of the logits."""
LIVE_TOLERANCE = 1e-5
"""A D of low rank is formed in blocks, while the live weight is multiplied through its factors: float32, another order
of sums. What the format itself loses, the live weight has lost as well."""
TRAINED_DIFFERENCE = 0.02
"""Training moved some entry of every weight by at least so much, so that a merge which forgot it would show."""
RUNS = [
    *((family, tied, "projected", torch.float32) for family, tied in CASES),
    *((family, True, "projected", torch.bfloat16) for family in FAMILIES),
    ("llama", True, "hard_prune", torch.float32),
    ("qwen2", False, "hard_prune", torch.float32),
    ("qwen3", False, "hard_prune", torch.bfloat16),
]
Run = tuple[str, bool, str, torch.dtype]
IDS_BT = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(9))

CLEAN_PROCESS = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

output, ids, *folders = sys.argv[1:]
ids_BT, logits, reports = torch.tensor(json.loads(ids)), {}, {}
for folder in folders:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        logits[folder] = model.eval()(ids_BT).logits
    reports[folder] = {
        "problems": [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]],
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "class": type(model).__name__,
    }
tokenizer = AutoTokenizer.from_pretrained(folders[-1])
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
save_file(logits, output)
ours = [name for name in sys.modules if name.split(".")[0] == "pcscale"]
length = model.generation_config.max_new_tokens
print(json.dumps({"reports": reports, "ours": ours, "chat": chat, "max_new_tokens": length}))
"""


@pytest.fixture(scope="module")
def merged(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    """Every run merged, all but the first in several shards."""
    folders = {run: tmp_path_factory.mktemp("merged") / "model" for run in RUNS}
    for run, folder in folders.items():
        merge_run(trained(*run), folder, max_shard_bytes=10**9 if run == RUNS[0] else 30_000)
    return folders


@pytest.fixture(scope="module")
def clean(
    merged: dict[Run, Path], furnished: tuple[TrainedRun, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one process that never saw pcscale says of all merged folders, with its logits."""
    output = tmp_path_factory.mktemp("clean") / "logits.safetensors"
    found = run_python("-c", CLEAN_PROCESS, output, json.dumps(IDS_BT.tolist()), *merged.values(), furnished[1])
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout) | {"logits": load_file(output), "messages": found.stderr}


@torch.no_grad()
def _live_logits(run: TrainedRun, dtype: torch.dtype) -> torch.Tensor:
    """The live model's logits after its weights were rounded to `dtype`."""
    model: PreTrainedModel = copy.deepcopy(run.model)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model(IDS_BT).logits


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_merged_logits_in_a_clean_process_equal_the_live_ones(
    case: Run, trained: Train, merged: dict[Run, Path], clean: dict[str, Any]
) -> None:
    expected_BTV = _live_logits(trained(*case), case[3])
    found_BTV = clean["logits"][str(merged[case])]
    assert expected_BTV.std() > 10 * LOGIT_TOLERANCE
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_stock_transformers_finds_every_tensor_and_no_other(
    case: Run, merged: dict[Run, Path], clean: dict[str, Any]
) -> None:
    report = clean["reports"][str(merged[case])]
    assert report == {"problems": [], "tied": case[1], "class": f"{case[0].capitalize()}ForCausalLM"}


def test_the_clean_process_never_imports_pcscale_and_says_nothing(clean: dict[str, Any]) -> None:
    assert clean["ours"] == []
    lines = [line for line in clean["messages"].splitlines() if line.strip() and "Loading weights" not in line]
    assert lines == []


def test_tokenizer_template_and_generation_settings_work_from_the_merged_folder(clean: dict[str, Any]) -> None:
    assert "message" in CHAT_TEMPLATE
    assert clean["chat"] == "<user> Hello\n"
    assert clean["max_new_tokens"] == 7


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_merged_weights_are_the_live_ones_rounded_to_the_bases_dtype(
    case: Run, trained: Train, merged: dict[Run, Path]
) -> None:
    run = trained(*case)
    expected = {name: weight.to(case[3]) for name, weight in run.weights.items()}
    assert_same_tensors(merged_tensors(merged[case]), expected)


@pytest.mark.parametrize("changes", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_trained_in_few_bits_is_merged_to_its_live_weights(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build_base(tmp_path / "base", "qwen3", tied=False, dtype=dtype)
    run = train_and_save(base, tmp_path / "checkpoints" / "step-00000003", **changes)
    merge_run(run, tmp_path / "merged", dtype="float32")
    found = merged_tensors(tmp_path / "merged")
    assert found.keys() == run.weights.keys()
    for name, weight in run.weights.items():
        torch.testing.assert_close(found[name], weight, rtol=LIVE_TOLERANCE, atol=LIVE_TOLERANCE)
    merge_run(run, tmp_path / "rounded")
    expected = {name: weight.to(dtype) for name, weight in found.items()}
    assert_same_tensors(merged_tensors(tmp_path / "rounded"), expected)


def test_a_checkpoint_away_from_its_8_bit_codes_is_merged_to_the_same_bytes(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    run = train_and_save(base, tmp_path / "run" / "checkpoints" / "step-00000003", int8=True)
    merge_run(run, tmp_path / "merged")
    moved = tmp_path / "alone" / "step-00000003"
    shutil.copytree(run.checkpoint, moved)
    merge_run(dataclasses.replace(run, checkpoint=moved), tmp_path / "alone" / "merged")
    assert file_bytes(tmp_path / "alone" / "merged") == file_bytes(tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["merged", "step-00000003"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_every_tensors_and_the_configs(dtype: str, trained: Train, tmp_path: Path) -> None:
    run = trained("qwen2", True, "projected", torch.bfloat16)
    merge_run(run, tmp_path / "merged", dtype=dtype)
    expected = {name: weight.to(getattr(torch, dtype)) for name, weight in run.weights.items()}
    assert_same_tensors(merged_tensors(tmp_path / "merged"), expected)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_training_moved_every_weight_from_the_hard_pruned_start(case: Run, trained: Train) -> None:
    run = trained(*case)
    base = load_file(run.base_folder / "model.safetensors")
    kept = run.optimizer.fixed
    for planned in run.plan.weights:
        start = base[planned.name].float()
        for dim, axis in enumerate(planned.weight.axes):
            indices = kept.get(axis.value if axis == "residual" else f"{axis.value}.{planned.weight.layer}")
            start = start if indices is None else start.index_select(dim, indices)
        assert (run.weights[planned.name] - start).abs().max() > TRAINED_DIFFERENCE, planned.name


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_a_tied_model_is_written_without_a_head(case: Run, merged: dict[Run, Path]) -> None:
    assert ("lm_head.weight" in merged_tensors(merged[case])) == (not case[1])


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_the_config_is_the_bases_at_new_widths_with_an_explicit_head_dim(
    case: Run, trained: Train, merged: dict[Run, Path]
) -> None:
    base = json.loads((trained(*case).base_folder / "config.json").read_text())
    found = json.loads((merged[case] / "config.json").read_text())
    changed = {"hidden_size": HIDDEN, "intermediate_size": FFN, "head_dim": 8}
    assert found == {**base, **changed, "dtype": str(case[3]).removeprefix("torch.")}


def test_rope_scaling_is_the_bases(furnished: tuple[TrainedRun, Path]) -> None:
    run, folder = furnished
    base = json.loads((run.base_folder / "config.json").read_text())
    assert base["rope_parameters"]["factor"] == 4.0
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == base["rope_parameters"]


def test_an_older_config_keeps_its_own_keys_and_gets_the_head_dim_it_implied(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters", "head_dim")}
    old |= {"torch_dtype": "float32", "rope_theta": 50_000.0}
    (base / "config.json").write_text(json.dumps(old))
    merge_run(train_and_save(base, tmp_path / "step-00000003"), tmp_path / "merged", dtype="bfloat16")
    changed = {"hidden_size": HIDDEN, "intermediate_size": FFN, "head_dim": 8, "torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {**old, **changed}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    assert model.dtype == torch.bfloat16
