"""Predicted seconds of a step: against a slow recomputation, and against what must be slower than what."""

import math
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest

from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory import step_time
from pcscale.memory.estimate import moved_bytes
from pcscale.memory.hardware import HARDWARE, Hardware
from pcscale.memory.step_time import (
    COMMUNICATION,
    FORWARD_BACKWARD,
    MOTION,
    SWEEP,
    TOTAL,
    forward_backward_flops,
    step_seconds,
)
from pcscale.projection.layout import RecordFormat, record_bytes, trainable_values
from tests.families.real_models import LLAMA_1B, LLAMA_1B_UNTIED, LLAMA_8B
from tests.memory.plans import SLOW_HOST, settings
from tests.memory.slow_step import TINY, SlowStep

GPU = HARDWARE["a100-80gb"]
HOST = replace(SLOW_HOST, update_seconds=dict.fromkeys(GPU.update_seconds, 5e-9))
MACHINES = {"gpu": GPU, "host": HOST}
EXACT = 1e-9
FORMS = [
    {},
    {"residency": "cpu", "record_dtype": "bfloat16", "moments": "8bit", "base_precision": "int8", "weight_decay": 0.1},
    {"residency": "disk", "projection_rank": 4, "base_home": "cpu"},
    {"residency": "device", "base_home": "device", "bf16": True, "moments": "8bit"},
    {"residency": "cpu", "gradient_home": "cpu", "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
    {"residency": "disk", "record_dtype": "bfloat16", "bf16": True, "gradient_dtype": "bfloat16"},
]


def tiny_plan(**changes: Any) -> Plan:
    return plan_widths(FAMILIES["qwen2"], TINY | changes, 24, 40)


def plan_8b() -> Plan:
    return plan_widths(FAMILIES["llama"], LLAMA_8B | {"dtype": "bfloat16"}, 3072, 9216)


@pytest.mark.parametrize("config", [LLAMA_1B, LLAMA_1B_UNTIED, LLAMA_8B])
def test_operations_are_the_plan_s_and_the_head_s_second_logits(config: dict[str, Any]) -> None:
    plan = plan_widths(FAMILIES["llama"], config, 1056, 3168)
    run = settings(sequence_length=1024)
    tokens = run.tokens_per_step
    again = 2 * 1056 * config["vocab_size"]
    assert forward_backward_flops(plan, run) == tokens * (plan.train_flops_per_token(1024) + again)


def test_checkpointing_computes_the_layers_again_and_not_the_head() -> None:
    plan = plan_8b()
    plain, again = (forward_backward_flops(plan, settings(gradient_checkpointing=on)) for on in (False, True))
    head = settings().tokens_per_step * 8 * 3072 * LLAMA_8B["vocab_size"]
    assert again - head == pytest.approx((plain - head) * 4 / 3)


def test_matrices_that_are_alike_are_all_of_them() -> None:
    for plan in (plan_8b(), tiny_plan(), tiny_plan(tie_word_embeddings=True)):
        matrices = list(plan.matrices)
        assert sum(count for _, count in plan.alike) == len(matrices)
        assert sum(trainable_values(planned) * count for planned, count in plan.alike) == sum(
            m.trainable for m in matrices
        )
        assert all(planned in matrices for planned, _ in plan.alike)
        assert len(plan.alike) < 9


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_it_is_what_a_slow_recomputation_gives(
    form: int, machine: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "LOGIT_CHUNK_VALUES", SlowStep.logits_at_a_time)
    config = settings(sequence_length=16, **FORMS[form])
    plan = tiny_plan()
    found = step_seconds(plan, config, MACHINES[machine], ranks)
    assert list(found) == [FORWARD_BACKWARD, SWEEP, MOTION, COMMUNICATION, TOTAL]
    for name, seconds in SlowStep(plan, config, MACHINES[machine], ranks).seconds().items():
        assert found[name] == pytest.approx(seconds, rel=EXACT), name
    assert found[TOTAL] == pytest.approx(sum(found.values()) - found[TOTAL])


def test_hard_pruning_sweeps_with_updates_alone() -> None:
    plan = plan_8b()
    found = step_seconds(plan, settings(method="hard_prune"), GPU)
    clip = plan.parameters * 4 * 3 / GPU.memory_bandwidth
    assert found[SWEEP] == pytest.approx(plan.parameters * GPU.update_seconds["float32/32bit"] + clip)
    assert found[MOTION] == found[COMMUNICATION] == 0
    projected = step_seconds(plan, settings(), GPU)
    assert projected[FORWARD_BACKWARD] == found[FORWARD_BACKWARD]
    assert projected[SWEEP] > found[SWEEP]


FASTER = [
    *[field.name for field in fields(Hardware) if field.type is float and "bandwidth" in field.name],
    "product_rates",
    "training_rates",
    "update_seconds",
    "decode_seconds",
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("figure", FASTER)
def test_a_faster_machine_is_never_slower(figure: str, machine: str) -> None:
    before = MACHINES[machine]
    value = getattr(before, figure)
    factor = 0.5 if figure.endswith("seconds") else 2.0
    better: Any = {key: part * factor for key, part in value.items()} if isinstance(value, dict) else value * factor
    faster = replace(before, **{figure: better})
    for plan in (tiny_plan(), plan_8b()):
        for form in FORMS:
            for ranks, stage in ((1, 0), (4, 3)):
                config = settings(**form)
                one, other = (step_seconds(plan, config, found, ranks, stage) for found in (before, faster))
                assert other[TOTAL] <= one[TOTAL] * (1 + EXACT)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_further_away_is_not_faster(machine: str) -> None:
    for changes in ({}, {"record_dtype": "bfloat16", "moments": "8bit"}):
        config = [settings(residency=home, **changes) for home in ("device", "cpu", "disk")]
        device, cpu, disk = (step_seconds(plan_8b(), run, MACHINES[machine])[TOTAL] for run in config)
        assert device <= cpu < disk
        homes = [settings(base_home=home, residency="cpu", **changes) for home in ("device", "cpu", "disk")]
        device, cpu, disk = (step_seconds(plan_8b(), run, MACHINES[machine])[TOTAL] for run in homes)
        assert device <= cpu <= disk


@pytest.mark.parametrize("machine", MACHINES)
def test_more_work_takes_longer(machine: str) -> None:
    def total(**changes: Any) -> float:
        return step_seconds(plan_8b(), settings(**changes), MACHINES[machine])[TOTAL]

    plain = total()
    assert total(gradient_checkpointing=True) > plain
    assert total(per_device_train_batch_size=8) > plain
    assert total(gradient_accumulation_steps=16) > plain
    assert total(sequence_length=1024) > plain
    assert total(projection_rank=64) < plain


def test_with_more_gpus_the_sweep_is_shared_and_the_tokens_are_not() -> None:
    one, two, eight = (step_seconds(plan_8b(), settings(base_home="cpu"), GPU, ranks) for ranks in (1, 2, 8))
    assert one[SWEEP] / 2 * 0.99 < two[SWEEP] < one[SWEEP] * 0.52
    assert eight[SWEEP] < two[SWEEP] / 3
    assert one[FORWARD_BACKWARD] == two[FORWARD_BACKWARD]


def test_ranks_on_one_host_s_processors_share_them() -> None:
    one, two = (step_seconds(plan_8b(), settings(), HOST, ranks) for ranks in (1, 2))
    assert two[FORWARD_BACKWARD] == 2 * one[FORWARD_BACKWARD]
    assert two[SWEEP] == pytest.approx(one[SWEEP], rel=0.05)


def test_a_step_communicates_one_reduction_and_one_broadcast_and_twice_that_under_zero() -> None:
    plan = plan_8b()

    def seconds(stage: int, ranks: int = 2, **changes: Any) -> float:
        config = settings(**{"gradient_accumulation_steps": 1, **changes})
        return step_seconds(plan, config, GPU, ranks, stage)[COMMUNICATION]

    weights = plan.parameters * 4
    assert seconds(0, ranks=1) == 0
    assert seconds(0) == pytest.approx(2 * weights / GPU.rank_bandwidth)
    assert seconds(0, ranks=8) == pytest.approx((2 * 7 / 8 + 1) * weights / GPU.rank_bandwidth)
    assert seconds(1) == seconds(2) == seconds(3) == pytest.approx(2 * seconds(0))
    assert seconds(0, bf16=True) == seconds(1, bf16=True), "bfloat16 at stage 0 runs as stage 1"
    assert seconds(1, gradient_accumulation_steps=4) == seconds(1)
    assert seconds(1) < seconds(2, gradient_accumulation_steps=4) < seconds(3, gradient_accumulation_steps=4)


def test_between_processors_stage_3_is_slower_than_its_bytes() -> None:
    one, three = (step_seconds(plan_8b(), settings(), HOST, 2, stage)[COMMUNICATION] for stage in (1, 3))
    assert three > one * step_time.STAGE_3_SLOWDOWN


def test_what_moves_is_what_the_estimate_counts() -> None:
    still = replace(GPU, product_rates={"float32": 1e30, "bfloat16": 1e30}, bus_bandwidth=1.0)
    for form in ({}, {"record_dtype": "bfloat16", "moments": "8bit", "base_precision": "int8", "weight_decay": 0.1}):
        config = settings(residency="cpu", base_home="cpu", **form)
        moved = moved_bytes(plan_8b(), config)
        found = step_seconds(plan_8b(), config, still)
        assert found[MOTION] + found[SWEEP] == pytest.approx(moved["base"] + moved["records_read"])


def test_a_base_under_zero_is_gathered_by_all() -> None:
    config = settings(base_home="zero", deepspeed="-", residency="device")
    plan = plan_8b()
    slow = replace(GPU, rank_bandwidth=1e9)
    found = step_seconds(plan, config, slow, 4, 3)
    base = sum(2 * math.prod(planned.base_shape) for planned in plan.matrices)
    moving = base * 3 / 4 / 1e9 + base / 4 / GPU.bus_bandwidth
    assert found[MOTION] == pytest.approx(moving - found[SWEEP])


def test_motion_that_the_work_covers_costs_its_ends_alone() -> None:
    plan = plan_8b()
    busy = replace(GPU, product_rates={"float32": 1e12, "bfloat16": 1e12})
    config = settings(residency="cpu", base_home="cpu")
    found = step_seconds(plan, config, busy)
    matrices = list(plan.matrices)
    first, last = matrices[0], matrices[-1]
    ends = 2 * math.prod(first.base_shape) + record_bytes(first, RecordFormat()) + record_bytes(last, RecordFormat())
    assert found[MOTION] == pytest.approx(ends / GPU.bus_bandwidth)
    assert step_seconds(plan, settings(base_home="device"), busy)[MOTION] == 0


def test_asking_again_computes_no_shape_again() -> None:
    plan = plan_8b()
    configs = [settings(residency=home, moments=moments) for home in ("cpu", "disk") for moments in ("32bit", "8bit")]
    answers = [step_seconds(plan, config, GPU, 4) for config in configs]
    caches = (step_time._flops, step_time._values, step_time._record_bytes, step_time._turns)
    misses = [cache.cache_info().misses for cache in caches]
    assert [step_seconds(plan, config, GPU, 4) for config in configs] == answers
    assert [cache.cache_info().misses for cache in caches] == misses


def test_predicting_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pcscale.memory.step_time; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
