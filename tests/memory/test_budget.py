"""Settings for a budget: they fit, no others that fit are faster, and what is refused is told what would do."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import BudgetError
from pcscale.common.units import parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.memory.budget import (
    KNOBS,
    SAME_TIME,
    ZERO_FILES,
    Budget,
    Choice,
    candidates,
    choose,
    needs_of,
    reasons,
    zero_file,
)
from pcscale.memory.components import record_format
from pcscale.memory.estimate import peaks
from pcscale.memory.hardware import Hardware
from pcscale.memory.place import Place, ZeroForm
from pcscale.projection.layout import record_bytes
from pcscale.projection.residency import Residency, check_budget
from tests.memory.ways import GPU, HOST, STATES, all_ways, config, least, plan_1b

GIB = 2**30
FOLDER = Path(__file__).parents[2] / "deepspeed_configs"
ALMOST = 1 + 1e-9


def budgets() -> dict[str, Budget]:
    """From more than enough to the least of one resource or another."""
    tight = [way for way in all_ways() if way.device <= 1.2 * least("device")]
    return {
        "no limit but a device's": Budget(device=10**15),
        "24 GB": Budget(device=24 * 10**9, host=32 * GIB),
        "12 GB": Budget(device=12 * 10**9, host=32 * GIB, disk=100 * GIB),
        "the least device": Budget(device=least("device")),
        "a small device, a small host": Budget(device=int(1.2 * least("device")), host=min(way.host for way in tight)),
        "a small disk": Budget(device=24 * 10**9, disk=least("disk")),
        "two devices": Budget(device=16 * 10**9, gpus=2),
        "two small devices": Budget(device=least("device", 2), gpus=2),
        "a host": Budget(host=32 * GIB),
        "a small host": Budget(host=least("host", on_gpu=False)),
    }


BUDGETS = (
    "no limit but a device's",
    "24 GB",
    "12 GB",
    "the least device",
    "a small device, a small host",
    "a small disk",
    "two devices",
    "two small devices",
    "a host",
    "a small host",
)


@cache
def chosen(name: str) -> Choice:
    budget = budgets()[name]
    return choose(plan_1b(), config(), budget, HOST if budget.device is None else GPU)


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_chosen_fits_and_nothing_that_fits_is_faster(name: str) -> None:
    budget = budgets()[name]
    on_gpu = budget.device is not None
    choice = chosen(name)
    ways = all_ways(budget.gpus, on_gpu)
    fitting = [way for way in ways if way.fits(budget)]
    (same,) = (way for way in ways if way.config == choice.config)
    assert choice.needs == {"device": same.device, "host": same.host, "disk": same.disk}
    assert choice.seconds == pytest.approx(same.seconds)
    assert same in fitting
    assert choice.fits(budget)
    assert choice.over(budget) == []
    assert choice.seconds <= SAME_TIME * ALMOST * min(way.seconds for way in fitting)


def exactness(run: RunConfig) -> tuple[int, int]:
    """What rounds least comes first."""
    return ("stored", "int8").index(run.base_precision), STATES.index((run.record_dtype, run.moments))


@pytest.mark.parametrize("name", BUDGETS)
def test_of_equally_fast_settings_the_most_exact_are_chosen(name: str) -> None:
    budget = budgets()[name]
    choice = chosen(name)
    fitting = [way for way in all_ways(budget.gpus, budget.device is not None) if way.fits(budget)]
    fast = SAME_TIME / ALMOST * min(way.seconds for way in fitting)
    rivals = [way.config for way in fitting if way.seconds <= fast and way.config.bf16 == choice.config.bf16]
    assert rivals
    assert exactness(choice.config) == min(map(exactness, rivals))


@pytest.mark.parametrize(("share", "state"), [(0.99, STATES[0]), (0.1, STATES[1])])
def test_records_lose_bits_only_for_speed_that_shows(share: float, state: tuple[str, str]) -> None:
    """On a machine that does little but update."""
    slow = 1e-6
    machine = replace(GPU, update_seconds={**GPU.update_seconds, "float32/32bit": slow, "bfloat16/8bit": share * slow})
    choice = choose(plan_1b(), config(), Budget(device=10**15), machine)
    assert (choice.config.record_dtype, choice.config.moments) == state


def test_bfloat16_is_chosen_where_it_is_faster_and_kept_where_it_was_asked_for() -> None:
    budget = Budget(device=10**15)
    assert chosen("no limit but a device's").config.bf16
    assert not chosen("a host").config.bf16
    asked = config(bf16=True, gradient_dtype="bfloat16")
    assert all(choice.config.bf16 for choice in candidates(plan_1b(), asked, budget))


@pytest.mark.parametrize(("gpus", "on_gpu"), [(1, True), (2, True), (1, False)])
def test_every_combination_is_a_candidate(gpus: int, on_gpu: bool) -> None:
    budget = Budget(10**15 if on_gpu else None, 10**15, gpus=gpus)
    found = [choice.config.model_dump_json() for choice in candidates(plan_1b(), config(), budget)]
    assert len(found) > 50
    assert sorted(found) == sorted(way.config.model_dump_json() for way in all_ways(gpus, on_gpu))


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("step", [(1, 8), (8, 1), (3, 4)])
def test_a_step_s_sequences_stay(step: tuple[int, int], gpus: int) -> None:
    run = config(per_device_train_batch_size=step[0], gradient_accumulation_steps=step[1])
    found = {
        choice.config.sequences_per_step * gpus
        for choice in candidates(plan_1b(), run, Budget(device=10**15, gpus=gpus))
    }
    assert found == {run.sequences_per_step}


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "gradient_dtype": "bfloat16"}, {"method": "hard_prune"}])
@pytest.mark.parametrize("budget", [Budget(10**15), Budget(10**15, gpus=2), Budget(host=10**15)])
def test_every_candidate_is_a_valid_run(changes: dict[str, Any], budget: Budget) -> None:
    run, count = config(**changes), 0
    for choice in candidates(plan_1b(), run, budget):
        values = choice.config.model_dump()
        assert RunConfig(**values) == choice.config
        differing = {key for key in values if getattr(choice.config, key) != getattr(run, key)}
        assert differing <= set(KNOBS)
        count += 1
    assert count > 3


@pytest.mark.parametrize(
    ("asked", "key", "allowed"),
    [
        ({"record_dtype": "bfloat16", "moments": "8bit"}, "record_dtype", {"bfloat16"}),
        ({"moments": "8bit"}, "moments", {"8bit"}),
        ({"base_precision": "int8"}, "base_precision", {"int8"}),
        ({"method": "hard_prune"}, "base_precision", {"stored"}),
        ({"method": "hard_prune"}, "residency", {"device"}),
    ],
)
def test_nothing_is_more_exact_than_it_was_asked_for(asked: dict[str, Any], key: str, allowed: set[str]) -> None:
    found = candidates(plan_1b(), config(**asked), Budget(device=10**15))
    assert {getattr(choice.config, key) for choice in found} == allowed


def test_what_is_chosen_keeps_the_cap_on_pinned_memory() -> None:
    """`pinned_memory` is no knob: a run whose records are more is refused."""
    run = config(pinned_memory="2GB")
    budget = Budget(device=least("device") * 2)
    choice = choose(plan_1b(), run, budget, GPU)
    sizes = [record_bytes(planned, record_format(choice.config)) for planned in plan_1b().matrices]
    check_budget(Residency(choice.config.residency, Path("-"), parse_bytes("2GB")), sizes)


@pytest.mark.parametrize("gpus", [1, 2])
def test_several_gpus_have_a_deepspeed_file_and_one_has_none(gpus: int) -> None:
    choice = chosen("no limit but a device's" if gpus == 1 else "two devices")
    assert choice.config.deepspeed == (None if gpus == 1 else "zero1.json")
    assert choice.config.gradient_home == "device"
    assert choice.place.ranks == gpus
    assert (choice.place.zero is None) == (gpus == 1)


def test_a_small_device_parts_the_model_among_two() -> None:
    """What one device of that size cannot do, two can."""
    needed = min(way.device for way in all_ways(2) if way.config.deepspeed in ("zero1.json", "zero2.json"))
    choice = choose(plan_1b(), config(), Budget(device=needed - 1, gpus=2), GPU)
    assert choice.place.zero is not None
    assert choice.place.zero.stage == 3


@pytest.mark.parametrize("name", ZERO_FILES)
def test_the_files_to_choose_from_are_those_of_the_folder(name: str) -> None:
    assert zero_file(name) == json.loads((FOLDER / name).read_text())


def stated(message: str) -> int:
    """The number that a refusal ends with."""
    match = re.search(r"It would fit with [a-z ]+ [\d.]+ \w+ \((\d+) bytes\)\.$", message)
    assert match, message
    return int(match[1])


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_device_too_small_is_refused_with_the_size_that_would_do(gpus: int) -> None:
    needed = least("device", gpus)
    too_small = Budget(device=int(0.85 * needed), gpus=gpus)
    with pytest.raises(BudgetError, match=r"^nothing fits device memory .* of each: device memory ") as refused:
        choose(plan_1b(), config(), too_small, GPU)
    assert stated(str(refused.value)) == needed
    choice = choose(plan_1b(), config(), Budget(device=needed, gpus=gpus), GPU)
    assert choice.needs["device"] == needed


def test_a_host_too_small_beside_a_device_is_refused_with_the_size_that_would_do() -> None:
    """The least of the host that goes with this device, not the least of all."""
    device = int(1.2 * least("device"))
    needed = min(way.host for way in all_ways() if way.device <= device)
    assert needed > least("host")
    with pytest.raises(BudgetError, match="It would fit with host memory") as refused:
        choose(plan_1b(), config(), Budget(device=device, host=needed - 1), GPU)
    assert stated(str(refused.value)) == needed
    choose(plan_1b(), config(), Budget(device=device, host=needed), GPU)


def test_where_one_more_of_a_resource_does_not_help_both_are_said_to_be_too_small() -> None:
    too_small = Budget(device=least("device") // 2, host=least("host") // 2)
    with pytest.raises(BudgetError, match="More than one of them is too small; a smaller keep or sequence_length"):
        choose(plan_1b(), config(), too_small, GPU)


def test_a_host_s_memory_is_shared_by_its_ranks() -> None:
    place = Place(ranks=2, zero=ZeroForm(1))
    of_one = max(peak["host_bytes"] for peak in peaks(plan_1b(), config(), place).values())
    assert needs_of(plan_1b(), config(), place)["host"] == 2 * of_one
    assert needs_of(plan_1b(), config(), replace(place, ranks_of_a_host=1))["host"] == of_one


def explained(budget: Budget, default: RunConfig, hardware: Hardware = GPU, timed: bool = True) -> dict[str, str]:
    choice = choose(plan_1b(), default, budget, hardware)
    return reasons(plan_1b(), choice, default, budget, hardware, timed)


def test_reasons_name_what_would_not_fit() -> None:
    default = config(gradient_checkpointing=False)
    budget = Budget(device=int(1.05 * least("device")))
    found = explained(budget, default)
    choice = choose(plan_1b(), default, budget, GPU)
    changed = {key for key in KNOBS if getattr(choice.config, key) != getattr(default, key)}
    assert found.keys() == changed - {"gradient_accumulation_steps", "deepspeed"}
    assert "residency" in found
    for key, reason in found.items():
        undone = choice.config.model_copy(update={key: getattr(default, key)})
        needed = needs_of(plan_1b(), undone, choice.place)["device"]
        if key != "per_device_train_batch_size" and needed > (budget.device or 0):
            assert re.match(r"\w+ would take [\d.]+ GiB of [\d.]+ GiB device memory$", reason), (key, reason)
    assert found["residency"].startswith("device would take ")


def test_reasons_say_how_much_slower_what_fits_would_be() -> None:
    budget = Budget(device=10**15)
    found = explained(budget, config(residency="disk", base_home="cpu"))
    assert re.match(r"disk fits too, and takes \d+\.\d\d × the time$", found["residency"])
    plain = explained(budget, config(residency="disk"), timed=False)
    assert plain["residency"] == "disk fits too, and is slower"


def test_what_is_as_it_would_have_been_has_no_reason() -> None:
    choice = chosen("no limit but a device's")
    assert reasons(plan_1b(), choice, choice.config, Budget(device=10**15), GPU) == {}
