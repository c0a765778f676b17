"""Settings for a budget: they fit, no others that fit cost less, and what is refused is told what would do."""

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.units import parse_bytes
from pcscale.config.schema import PlanConfig
from pcscale.families.axes import Q_HEADS
from pcscale.memory.choose import ON_GPU, ON_HOST, SAME_COST, Budget, Choice, candidates, choose, reasons
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.shared import KNOBS
from pcscale.projection.layout import record_bytes, record_format
from pcscale.projection.residency import State, check_budget
from tests.memory.ways import FORMS, STATES, all_ways, config, least, plan_1b, prediction

GIB = 2**30
PLENTY = Budget(device=10**15)


def budgets() -> dict[str, Budget]:
    """From more than enough to the least of one resource or another."""
    tight = [way for way in all_ways() if way.needs["device"] <= 1.2 * least("device")]
    return {
        "no limit but a device's": PLENTY,
        "24 GB": Budget(device=24 * 10**9, host=32 * GIB),
        "12 GB": Budget(device=12 * 10**9, host=32 * GIB, disk=100 * GIB),
        "the least device": Budget(device=least("device")),
        "a small device, a small host": Budget(
            device=int(1.2 * least("device")), host=min(way.needs["host"] for way in tight)
        ),
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
    return choose(prediction(), budgets()[name], FORMS)


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_chosen_fits_and_nothing_that_fits_costs_less(name: str) -> None:
    budget, choice = budgets()[name], chosen(name)
    fitting = [way for way in all_ways(budget.gpus, budget.device is not None) if way.fits(budget)]
    (same,) = (way for way in fitting if way.config == choice.config)
    assert choice.needs == same.needs
    assert choice.cost == same.cost <= SAME_COST * min(way.cost for way in fitting)
    assert choice.over(budget) == []


def exactness(run: PlanConfig) -> tuple[int, int]:
    """What rounds least comes first."""
    return ("stored", "int8").index(run.base_precision), STATES.index((run.record_dtype, run.moments))


@pytest.mark.parametrize("name", BUDGETS)
def test_of_settings_that_cost_the_same_the_most_exact_are_chosen(name: str) -> None:
    budget, choice = budgets()[name], chosen(name)
    fitting = [way for way in all_ways(budget.gpus, budget.device is not None) if way.fits(budget)]
    cheap = SAME_COST * min(way.cost for way in fitting)
    rivals = [way.config for way in fitting if way.cost <= cheap and way.config.bf16 == choice.config.bf16]
    assert exactness(choice.config) == min(map(exactness, rivals))


@pytest.mark.parametrize(("gpus", "on_gpu"), [(1, True), (2, True), (1, False)])
def test_every_combination_is_a_candidate_and_predicted_as_by_itself(gpus: int, on_gpu: bool) -> None:
    """Candidates share what does not depend on the settings that they differ in."""
    budget = Budget(10**15 if on_gpu else None, 10**15, gpus=gpus)
    found = {choice.config.model_dump_json(): choice for choice in candidates(prediction(), budget, FORMS)}
    ways = {way.config.model_dump_json(): way for way in all_ways(gpus, on_gpu)}
    assert found.keys() == ways.keys()
    assert len(found) > 50
    for number, (key, way) in enumerate(ways.items()):
        assert found[key].needs == way.needs
        assert found[key].prediction.work == way.work
        if number % 7 == 0:
            alone = Prediction(plan_1b(), way.config, way.deployment)
            assert found[key].prediction.document("base") == alone.document("base")


def cost(deployment: Deployment, **changes: Any) -> float:
    return Choice(Prediction(plan_1b(), config(**changes), deployment)).cost


@pytest.mark.parametrize(("on_gpu", "worth"), [(True, ON_GPU), (False, ON_HOST)])
def test_a_byte_costs_what_its_link_is_worth(on_gpu: bool, worth: Any) -> None:
    where = Deployment(on_gpu)
    base = sum(planned.base_shape[0] * planned.base_shape[1] * 2 for planned in plan_1b().matrices)
    records = sum(2 * record_bytes(planned, record_format(config())) for planned in plan_1b().matrices)
    plain = cost(where, base_home="device")
    assert cost(where, base_home="disk") - plain == pytest.approx(base * (worth.disk + worth.bus * on_gpu))
    assert cost(where, base_home="cpu") - plain == pytest.approx(base * worth.bus * on_gpu)
    moved = cost(where, base_home="device", residency="cpu") - plain
    assert moved == pytest.approx(records * worth.bus)


def test_recomputed_operations_cost_a_third_of_the_layers() -> None:
    work, again = (prediction(gradient_checkpointing=checkpointing).work for checkpointing in (False, True))
    plan, run = plan_1b(), config()
    in_layers = [planned for planned in plan.matrices if planned.weight.layer is not None]
    multiplied = sum(math.prod(planned.shape) for planned in in_layers)
    attention = plan.num_layers * plan.sizes[Q_HEADS] * run.sequence_length
    forward = 2 * (multiplied + attention) * run.tokens_per_step
    assert again.flops - work.flops == pytest.approx(forward)
    assert again[1:] == work[1:]


def test_gradients_on_the_host_cross_the_bus_once_a_micro_batch_and_once_back() -> None:
    for micro, moved in ((1, 8), (2, 12)):
        step = {"per_device_train_batch_size": 2 // micro, "gradient_accumulation_steps": micro}
        away, here = (prediction(gradient_home=home, **step).work.bus_bytes for home in ("cpu", "device"))
        assert away - here == moved * plan_1b().parameters


def test_each_further_micro_batch_is_reduced_again_from_stage_2_and_gathered_at_stage_3() -> None:
    n = plan_1b().parameters
    sent = {
        name: Prediction(plan_1b(), config(deepspeed=name), Deployment(ranks=2, zero=form)).work.rank_bytes
        for name, form in FORMS.items()
    }
    assert sent == {"zero1": 16 * n, "zero2": 20 * n, "zero3": 24 * n, "zero3_offload_cpu": 24 * n}


def test_records_lose_bits_only_where_they_move() -> None:
    assert chosen("no limit but a device's").config.residency == "device"
    assert (chosen("no limit but a device's").config.record_dtype) == "float32"
    moving = chosen("the least device").config
    assert (moving.residency != "device", moving.record_dtype, moving.moments) == (True, "bfloat16", "8bit")


def test_bfloat16_is_chosen_on_a_gpu_and_kept_where_it_was_asked_for() -> None:
    assert chosen("no limit but a device's").config.bf16
    assert not chosen("a host").config.bf16
    asked = prediction(bf16=True, gradient_dtype="bfloat16")
    assert all(choice.config.bf16 for choice in candidates(asked, PLENTY))


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("step", [(1, 8), (8, 1), (3, 4)])
def test_a_step_s_sequences_stay(step: tuple[int, int], gpus: int) -> None:
    run = prediction(per_device_train_batch_size=step[0], gradient_accumulation_steps=step[1])
    found = {
        choice.config.sequences_per_step * gpus for choice in candidates(run, Budget(device=10**15, gpus=gpus), FORMS)
    }
    assert found == {step[0] * step[1]}


def test_gpus_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(RequestError, match="2 sequences a step cannot be shared by 3 GPUs"):
        choose(prediction(), Budget(device=10**15, gpus=3), FORMS)


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "gradient_dtype": "bfloat16"}, {"method": "hard_prune"}])
@pytest.mark.parametrize("budget", [PLENTY, Budget(10**15, gpus=2), Budget(host=10**15)])
def test_every_candidate_is_a_valid_run(changes: dict[str, Any], budget: Budget) -> None:
    run, count = config(**changes), 0
    for choice in candidates(prediction(**changes), budget, FORMS):
        values = choice.config.model_dump()
        assert PlanConfig(**values) == choice.config
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
    assert {getattr(choice.config, key) for choice in candidates(prediction(**asked), PLENTY)} == allowed


def test_what_is_chosen_keeps_the_cap_on_pinned_memory() -> None:
    """`pinned_memory` is no knob: a run whose records are more is refused."""
    choice = choose(prediction(pinned_memory="2GB"), Budget(device=least("device") * 2), FORMS)
    sizes = [record_bytes(planned, record_format(choice.config)) for planned in plan_1b().matrices]
    check_budget(State(choice.config.residency, Path("records"), parse_bytes("2GB")), sizes)


@pytest.mark.parametrize("gpus", [1, 2])
def test_several_gpus_have_a_deepspeed_file_and_one_has_none(gpus: int) -> None:
    choice = chosen("no limit but a device's" if gpus == 1 else "two devices")
    deployment = choice.prediction.deployment
    assert choice.config.deepspeed == (None if gpus == 1 else "zero1")
    assert choice.config.gradient_home == "device"
    assert deployment.ranks == gpus
    assert (deployment.zero is None) == (gpus == 1)


def test_a_small_device_parts_the_model_among_two() -> None:
    """What one device of that size cannot do, two can."""
    needed = min(way.needs["device"] for way in all_ways(2) if way.config.deepspeed in ("zero1", "zero2"))
    zero = choose(prediction(), Budget(device=needed - 1, gpus=2), FORMS).prediction.deployment.zero
    assert zero is not None
    assert zero.stage == 3


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
        choose(prediction(), too_small, FORMS)
    assert stated(str(refused.value)) == needed
    choice = choose(prediction(), Budget(device=needed, gpus=gpus), FORMS)
    assert choice.needs["device"] == needed


def test_a_host_too_small_beside_a_device_is_refused_with_the_size_that_would_do() -> None:
    """The least of the host that goes with this device, not the least of all."""
    device = int(1.2 * least("device"))
    needed = min(way.needs["host"] for way in all_ways() if way.needs["device"] <= device)
    assert needed > least("host")
    with pytest.raises(BudgetError, match="It would fit with host memory") as refused:
        choose(prediction(), Budget(device=device, host=needed - 1), FORMS)
    assert stated(str(refused.value)) == needed
    choose(prediction(), Budget(device=device, host=needed), FORMS)


def test_where_one_more_of_a_resource_does_not_help_both_are_said_to_be_too_small() -> None:
    too_small = Budget(device=least("device") // 2, host=least("host") // 2)
    with pytest.raises(BudgetError, match="More than one of them is too small; a smaller keep or sequence_length"):
        choose(prediction(), too_small, FORMS)


def test_a_host_s_memory_is_shared_by_its_ranks() -> None:
    two = Deployment(ranks=2, zero=FORMS["zero1"])
    of_one = max(peak["host_bytes"] for peak in replace(prediction(), deployment=two).peaks.values())
    assert replace(prediction(), deployment=two).needs["host"] == 2 * of_one
    apart = replace(two, ranks_of_a_host=1)
    assert replace(prediction(), deployment=apart).needs["host"] == of_one


def explained(budget: Budget, **default: Any) -> dict[str, str]:
    choice = choose(prediction(**default), budget, FORMS)
    return reasons(choice, config(**default), budget)


def test_reasons_name_what_would_not_fit() -> None:
    budget = Budget(device=int(1.05 * least("device")))
    found = explained(budget)
    choice = choose(prediction(), budget, FORMS)
    changed = {key for key in KNOBS if getattr(choice.config, key) != getattr(config(), key)}
    assert found.keys() == changed - {"gradient_accumulation_steps", "deepspeed"}
    for key, reason in found.items():
        needed = choice.prediction.varied(**{key: getattr(config(), key)}).needs["device"]
        if key != "per_device_train_batch_size" and needed > (budget.device or 0):
            assert re.match(r"\w+ would take [\d.]+ GiB of [\d.]+ GiB device memory$", reason), (key, reason)
    assert found["residency"].startswith("device would take ")


def test_reasons_say_what_other_settings_move_and_compute() -> None:
    found = explained(PLENTY, residency="disk", base_home="cpu", gradient_checkpointing=True)
    assert re.match(
        r"disk fits too, and moves [\d.]+ GiB more over the bus and [\d.]+ GiB more to and from the disk a step$",
        found["residency"],
    )
    assert re.match(r"cpu fits too, and moves [\d.]+ GiB more over the bus a step$", found["base_home"])
    assert re.match(r"true fits too, and computes 1\.\d\d × the FLOPs$", found["gradient_checkpointing"])
    assert found["bf16"] == "false fits too, and computes in float32"
    assert found["per_device_train_batch_size"] == "1 fits too, and costs about the same"


def test_on_a_host_what_moves_from_memory_to_memory_is_called_so() -> None:
    found = reasons(chosen("a host"), config(moments="32bit", residency="cpu"), Budget(host=10**15))
    assert re.match(r"32bit fits too, and moves [\d.]+ GiB more within memory a step$", found["moments"])


def test_what_is_as_it_would_have_been_has_no_reason() -> None:
    choice = chosen("no limit but a device's")
    assert reasons(choice, choice.config, PLENTY) == {}
