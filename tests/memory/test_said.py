"""What was said on the command line stays as it is, and the rest is chosen for the budget."""

from typing import Any

import pytest

from pcscale.common.errors import BudgetError
from pcscale.memory.budget import Budget, candidates, choose
from tests.memory.ways import GPU, all_ways, config, least, plan_1b


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bf16", False),
        ("base_precision", "int8"),
        ("base_precision", "stored"),
        ("residency", "device"),
        ("base_home", "cpu"),
        ("gradient_home", "cpu"),
        ("gradient_checkpointing", True),
    ],
)
def test_a_knob_that_was_said_stays_and_the_others_are_chosen(key: str, value: Any) -> None:
    budget, run = Budget(device=10**15, host=10**15), config(**{key: value})
    found = [choice.config.model_dump_json() for choice in candidates(plan_1b(), run, budget, {key})]
    wanted = [way.config.model_dump_json() for way in all_ways() if getattr(way.config, key) == value]
    assert sorted(found) == sorted(wanted)
    assert found


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("record_dtype", "float32", {("float32", "32bit"), ("float32", "8bit")}),
        ("moments", "32bit", {("float32", "32bit"), ("bfloat16", "32bit")}),
    ],
)
def test_half_of_a_state_that_was_said_stays_beside_either_other_half(
    key: str, value: str, both: set[tuple[str, str]]
) -> None:
    found = candidates(plan_1b(), config(**{key: value}), Budget(device=10**15), {key})
    assert {(choice.config.record_dtype, choice.config.moments) for choice in found} == both


def test_a_knob_that_was_said_stays_where_it_would_not_be_tried() -> None:
    run = config(record_dtype="bfloat16", moments="32bit", residency="device")
    found = list(candidates(plan_1b(), run, Budget(host=10**15), ("record_dtype", "moments", "residency")))
    kept = {(choice.config.record_dtype, choice.config.moments, choice.config.residency) for choice in found}
    assert kept == {("bfloat16", "32bit", "device")}


def test_how_a_step_is_cut_is_chosen_though_it_was_said() -> None:
    run = config(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    said = ("per_device_train_batch_size", "gradient_accumulation_steps")
    found = candidates(plan_1b(), run, Budget(device=10**15), said)
    assert {choice.config.per_device_train_batch_size for choice in found} == {1, 2}


def test_what_was_said_is_named_where_nothing_fits_with_it() -> None:
    run, device = config(residency="device"), int(1.05 * least("device"))
    with pytest.raises(BudgetError, match=r"nothing fits device memory .*, with residency: device\. "):
        choose(plan_1b(), run, Budget(device=device), GPU, {"residency"})
    assert choose(plan_1b(), run, Budget(device=device), GPU).config.residency != "device"
