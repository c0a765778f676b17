"""Settings given on the command line stay as they are, and the rest is chosen for the budget."""

from typing import Any

import pytest

from pcscale.common.errors import BudgetError
from pcscale.memory.choose import Budget, candidates, choose
from tests.memory.ways import FORMS, all_ways, least, prediction

PLENTY = Budget(device=10**15)


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
def test_a_given_knob_stays_and_the_others_are_chosen(key: str, value: Any) -> None:
    found = candidates(prediction(**{key: value}), Budget(device=10**15, host=10**15), given={key})
    wanted = [way.config.model_dump_json() for way in all_ways() if getattr(way.config, key) == value]
    assert wanted
    assert sorted(choice.config.model_dump_json() for choice in found) == sorted(wanted)


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("record_dtype", "float32", {("float32", "32bit"), ("float32", "8bit")}),
        ("moments", "32bit", {("float32", "32bit"), ("bfloat16", "32bit")}),
    ],
)
def test_a_given_half_of_a_state_stays_beside_either_other_half(
    key: str, value: str, both: set[tuple[str, str]]
) -> None:
    found = candidates(prediction(**{key: value}), PLENTY, given={key})
    assert {(choice.config.record_dtype, choice.config.moments) for choice in found} == both


def test_a_given_knob_stays_where_it_would_not_be_tried() -> None:
    run = prediction(record_dtype="bfloat16", moments="32bit", residency="device")
    found = list(candidates(run, Budget(host=10**15), given=("record_dtype", "moments", "residency")))
    kept = {(choice.config.record_dtype, choice.config.moments, choice.config.residency) for choice in found}
    assert kept == {("bfloat16", "32bit", "device")}


def test_how_a_step_is_cut_is_chosen_though_it_was_given() -> None:
    given = ("per_device_train_batch_size", "gradient_accumulation_steps")
    found = candidates(prediction(), PLENTY, given=given)
    assert {choice.config.per_device_train_batch_size for choice in found} == {1, 2}


def test_what_was_given_is_named_where_nothing_fits_with_it() -> None:
    run, budget = prediction(residency="device"), Budget(device=int(1.05 * least("device")))
    with pytest.raises(BudgetError, match=r"nothing fits device memory .*, with residency: device\. "):
        choose(run, budget, FORMS, {"residency"})
    assert choose(run, budget, FORMS).config.residency != "device"
