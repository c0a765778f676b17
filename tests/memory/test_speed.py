"""The speed of a measured machine: kept for it alone, and the time of a step worked by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.speed import (
    FORWARD_BACKWARD,
    MOTION,
    SWEEP,
    TOTAL,
    Speed,
    read_speed,
    speed_file,
    step_seconds,
    write_speed,
)
from tests.memory.plans import GPU, HOST
from tests.memory.speeds import GPU_SPEED, HOST_SPEED
from tests.memory.ways import FORMS, config, plan_1b

BASE_BYTES = sum(2 * planned.base_shape[0] * planned.base_shape[1] for planned in plan_1b().matrices)


def seconds(speed: Speed, **changes: Any) -> dict[str, float]:
    found = step_seconds(Prediction(plan_1b(), config(**changes), GPU if speed.on_gpu else HOST), speed)
    assert found is not None
    return found


def test_a_step_takes_its_work_at_the_machine_s_rates() -> None:
    prediction = Prediction(plan_1b(), config(base_home="cpu"), HOST)
    found = seconds(HOST_SPEED, base_home="cpu")
    sweep = sum(prediction.sweep_flops) / 2e11 + (prediction.record_values + prediction.direct_values) * 2e-9
    assert found[FORWARD_BACKWARD] == pytest.approx(prediction.train_flops / 1e11)
    assert found[SWEEP] == pytest.approx(sweep)
    assert found[MOTION] == 0
    assert found[TOTAL] == pytest.approx(prediction.train_flops / 1e11 + sweep)


def test_motion_counts_as_far_as_the_sweep_does_not_hide_it() -> None:
    records = Prediction(plan_1b(), config(), HOST).record_bytes[0]
    moving = (BASE_BYTES + records) / 2e9 + records / 1e9
    fast = HOST_SPEED.model_copy(update={"sweep_flops": {"float32": 1e13, "bfloat16": 1e13}})
    found = seconds(fast, residency="disk")
    assert found[MOTION] == pytest.approx(moving - found[SWEEP])
    assert found[MOTION] > 0
    assert seconds(HOST_SPEED, residency="disk")[MOTION] == 0, "the sweep takes longer"


def test_gradients_on_the_host_are_never_hidden() -> None:
    home = {"base_home": "device"}
    there, back = (seconds(GPU_SPEED, gradient_home=where, **home)[MOTION] for where in ("cpu", "device"))
    assert back == 0
    assert there == pytest.approx(4 * plan_1b().parameters * 3 / 1e10)


def test_small_records_are_updated_at_the_rate_of_their_format() -> None:
    exact, small = (
        seconds(HOST_SPEED, **state)[SWEEP] for state in ({}, {"record_dtype": "bfloat16", "moments": "8bit"})
    )
    values = Prediction(plan_1b(), config(), HOST).record_values
    assert small - exact == pytest.approx(values * (8e-9 - 2e-9))


def test_a_bfloat16_model_runs_at_its_own_rate_and_on_processors_its_products_in_float32() -> None:
    plain, half = (seconds(HOST_SPEED, bf16=bf16) for bf16 in (False, True))
    assert half[FORWARD_BACKWARD] == pytest.approx(20 * plain[FORWARD_BACKWARD])
    assert half[SWEEP] == plain[SWEEP]
    on_gpu = [seconds(GPU_SPEED, bf16=bf16)[SWEEP] for bf16 in (False, True)]
    assert on_gpu[1] > 10 * on_gpu[0]


def test_the_machine_that_was_measured_counts_whatever_memory_is_predicted_for() -> None:
    of_gpu = step_seconds(Prediction(plan_1b(), config(residency="cpu"), GPU), HOST_SPEED)
    assert of_gpu == seconds(HOST_SPEED, residency="cpu")


def test_what_ranks_send_each_other_is_not_known() -> None:
    assert step_seconds(Prediction(plan_1b(), config(), Deployment(ranks=2, zero=FORMS["zero1"])), GPU_SPEED) is None


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_not_positive_and_finite_is_refused(rate: float) -> None:
    with pytest.raises(ValidationError):
        Speed(**{**HOST_SPEED.model_dump(), "bus": rate})


def test_a_speed_is_read_as_it_was_written(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "cache" / "speed.json"
    assert read_speed(path) is None
    write_speed(path, HOST_SPEED)
    assert read_speed(path) == HOST_SPEED
    assert not warnings


def changed(**changes: Any) -> str:
    return json.dumps({**HOST_SPEED.model_dump(), **changes})


BROKEN = {
    "no JSON": "{",
    "no object": "[1, 2]",
    "a rate that is none": changed(bus="fast"),
    "rates that are absent": changed(update_seconds={}),
    "a dtype that is absent": changed(train_flops={"float32": 1.0}),
    "a format that nobody knows": changed(update_seconds={f"float32/{bits}bit": 1.0 for bits in (1, 2, 3, 4)}),
    "a field of another version": changed(decode=3.0),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_passed_over_with_a_warning(case: str, tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "speed.json"
    path.write_text(BROKEN[case])
    assert read_speed(path) is None
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path} cannot be used (")
    assert warnings[0].endswith("measure the machine anew.")


def fake_machine(root: Path, cpu: str = "AMD EPYC", gpus: tuple[str, ...] = ()) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {cpu}\nflags\t\t: fpu\n")
    for number, gpu in enumerate(gpus):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {gpu}\nIRQ:   \t\t 24\n")
    return root


def test_machines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plain = fake_machine(tmp_path / "plain")
    found = [
        speed_file(tmp_path, plain),
        speed_file(tmp_path, fake_machine(tmp_path / "cpu", cpu="Xeon")),
        speed_file(tmp_path, fake_machine(tmp_path / "gpu", gpus=("NVIDIA H100 80GB HBM3",))),
        speed_file(tmp_path, fake_machine(tmp_path / "two", gpus=("NVIDIA H100 80GB HBM3", "NVIDIA L40S"))),
        speed_file(tmp_path, tmp_path / "nothing"),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found.append(speed_file(tmp_path, plain))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found.append(speed_file(tmp_path, plain))
    assert len(set(found)) == len(found)
    assert speed_file(tmp_path, plain) == found[-1]
