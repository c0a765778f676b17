"""The cap of a merge: refused when it is too small, kept when it is not, whatever the model's size (proof 6)."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import BudgetError
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.memory.working import merge_need_bytes
from tests.merging.synthetic import write_checkpoint
from tests.merging.trained import TrainedRun, assert_same_tensors, merge_run, merged_tensors, run_python, visible

MIB = 2**20
INTERPRETER_BYTES = 300 * MIB
"""What the contract leaves to Python and its libraries."""
SLACK_BYTES = 8 * MIB
"""Matrix kernels have buffers of their own, and the allocator keeps some freed blocks: a few MiB, by chance."""
STEADY = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""Each further thread has buffers and an arena of its own, grown by chance and by what else the machine does; and the C
library keeps freed blocks up to a size that it moves by what was freed before, unless it is told one."""
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "vocab_size": 256, **HEADS}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256, **HEADS}
MODELS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "tiny": ((16, 32), TINY),
    "tiny 8-bit base": ((16, 32), {**TINY, "int8": True}),  # Its coding takes a library more.
    "one layer": ((512, 1536), {**LARGE, "num_hidden_layers": 1}),
    "two layers": ((512, 1536), {**LARGE, "num_hidden_layers": 2}),
    "few bits": (
        (512, 1408),
        {
            **LARGE,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 1,
            "int8": True,
            "rank": 320,
        },
    ),
    "tall": (
        (64, 128),
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 200_000, **HEADS},
    ),
}
Measured = tuple[Plan, dict[str, Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    """`measured(model)`: merged by a process of its own under the least cap; the plan and what `--json` printed."""

    @cache
    def merge(name: str) -> Measured:
        folder = tmp_path_factory.mktemp("budget")
        widths, config = MODELS[name]
        plan = write_checkpoint(folder, widths, tie_word_embeddings=True, **config)
        arguments = ("--base", folder / "base", "--output", folder / "merged", "--json", "--quiet")
        cap = ("--max-memory", str(merge_need_bytes(plan, config.get("rank"))))
        command = ("-m", "pcscale", "merge", folder / "step-00000001", *arguments, *cap)
        found = run_python(*command, environment=STEADY)
        assert found.returncode == 0, found.stderr
        return plan, json.loads(found.stdout)

    return merge


@pytest.mark.parametrize("model", MODELS)
def test_anonymous_memory_stays_under_the_cap_and_the_interpreter(
    model: str, measured: Callable[[str], Measured]
) -> None:
    plan, result = measured(model)
    assert result["max_memory_bytes"] == merge_need_bytes(plan, MODELS[model][1].get("rank"))
    assert 0 < result["peak_anonymous_bytes"] <= result["max_memory_bytes"] + INTERPRETER_BYTES


@pytest.mark.parametrize(
    ("model", "tiny"),
    [("one layer", "tiny"), ("few bits", "tiny 8-bit base"), ("tall", "tiny")],
)
def test_what_blocks_take_over_a_tiny_merge_is_at_most_what_is_predicted(
    model: str, tiny: str, measured: Callable[[str], Measured]
) -> None:
    plan, result = measured(model)
    taken = result["peak_anonymous_bytes"] - measured(tiny)[1]["peak_anonymous_bytes"]
    assert taken <= merge_need_bytes(plan, MODELS[model][1].get("rank")) + SLACK_BYTES


def test_the_bound_on_blocks_is_far_below_the_matrices_themselves(measured: Callable[[str], Measured]) -> None:
    plan, _ = measured("tall")
    embedding_bytes = 4 * 200_000 * 128
    assert merge_need_bytes(plan) + SLACK_BYTES < embedding_bytes / 4


def test_a_deeper_model_does_not_raise_the_peak(measured: Callable[[str], Measured]) -> None:
    (one, first), (two, second) = measured("one layer"), measured("two layers")
    added_bytes = 4 * (two.base_parameters - one.base_parameters)
    assert abs(second["peak_anonymous_bytes"] - first["peak_anonymous_bytes"]) <= SLACK_BYTES < added_bytes / 10


def test_the_need_does_not_depend_on_the_number_of_layers_or_the_vocabulary() -> None:
    def need(num_layers: int, vocab_size: int, intermediate_size: int) -> int:
        sizes = {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "intermediate_size": intermediate_size}
        config = {"model_type": "llama", **LARGE, **sizes}
        return merge_need_bytes(Plan(family_of(config, "config.json"), config, 1024, 2752))

    assert need(1, 256, 5504) == need(80, 256, 5504)
    assert need(1, 256, 5504) < need(1, 256, 11008)


def test_a_cap_below_one_blocks_need_is_refused_and_the_named_one_works(run: TrainedRun, tmp_path: Path) -> None:
    least = merge_need_bytes(run.plan)
    message = (
        rf"^max_memory 1\.0 KiB is too small: one block of the largest matrix takes .+ KiB\. "
        rf"Give at least {least} bytes\.$"
    )
    with pytest.raises(BudgetError, match=message):
        merge_run(run, tmp_path / "merged", max_memory_bytes=1024)
    with pytest.raises(BudgetError, match=rf"Give at least {least} bytes"):
        merge_run(run, tmp_path / "merged", max_memory_bytes=least - 1)
    assert list(tmp_path.iterdir()) == []
    merge_run(run, tmp_path / "merged", max_memory_bytes=least)
    assert_same_tensors(merged_tensors(tmp_path / "merged"), run.weights)


def test_the_command_line_exits_with_3_and_one_line(run: TrainedRun, tmp_path: Path) -> None:
    least = merge_need_bytes(run.plan)
    arguments = ("--base", run.base_folder, "--output", tmp_path / "merged", "--max-memory", str(least - 1), "--json")
    found = run_python("-m", "pcscale", "merge", run.checkpoint, *arguments)
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("pcscale: max_memory ")
    assert f"Give at least {least} bytes." in found.stderr
    assert visible(tmp_path) == []
