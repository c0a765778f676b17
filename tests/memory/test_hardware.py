"""Named machines, and measurements of this one that are kept and used again on it alone."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.common.cache import cache_folder
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.memory import calibrate_machine as calibration
from pcscale.memory.hardware import (
    HARDWARE,
    PRODUCT_EFFICIENCY,
    RECORD_FORMATS,
    TRAINING_EFFICIENCY,
    Hardware,
    machine_key,
    named_hardware,
    read_calibration,
    write_calibration,
)

SOME = replace(HARDWARE["a100-80gb"], name="2 threads of this host", origin="measured here", device_bytes=None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    for name, value in {
        "DISK_BYTES": 2**23,
        "COPY_BYTES": 2**20,
        "BUDGET_SECONDS": 0.01,
        "_SIDE": 256,
        "_PRODUCTS": {"cpu": (16, 32, 64), "cuda": (16, 32, 64)},
        "_STACK": {"cpu": (32, 48, 2, 8, 1), "cuda": (32, 48, 2, 8, 1)},
        "_SLOW_PRODUCTS": (16, 32, 64),
        "_SLOW_STACK": (32, 48, 2, 8, 1),
    }.items():
        monkeypatch.setattr(calibration, name, value)


def test_named_machines_say_what_is_assumed_of_them() -> None:
    names = ["rtx-3090", "rtx-4090", "l40s", "a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"]
    assert list(HARDWARE) == names
    for name, hardware in HARDWARE.items():
        assert hardware.name == name
        assert hardware.on_gpu
        assert hardware.origin.startswith("vendor's figures × 0.7 (products) and 0.4 (training)")
        assert "not measured" in hardware.origin


def test_figures_are_the_vendor_s_times_an_efficiency() -> None:
    h100 = named_hardware("h100-80gb")
    assert h100.product_rates["bfloat16"] == pytest.approx(989.4e12 * PRODUCT_EFFICIENCY)
    assert h100.product_rates["float32"] == pytest.approx(494.7e12 * PRODUCT_EFFICIENCY)
    assert h100.training_rates["float32"] == pytest.approx(66.9e12 * TRAINING_EFFICIENCY), "no TF32 in the model"
    assert h100.device_bytes == 80 * 10**9
    ratio = h100.update_seconds["bfloat16/8bit"] / h100.update_seconds["float32/32bit"]
    assert ratio == pytest.approx(150 / 34)


def test_a_machine_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        RequestError, match=r"'h800' is no machine that pcscale knows: expected one of rtx-3090, .*h200"
    ):
        named_hardware("h800")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_figure_that_is_not_positive_and_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="every figure of a machine is positive and finite"):
        replace(SOME, bus_bandwidth=value)
    with pytest.raises(ValueError, match="every figure of a machine is positive and finite"):
        replace(SOME, update_seconds={**SOME.update_seconds, "float32/8bit": value})


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "cache" / "calibration.json"
    assert read_calibration(path) is None
    write_calibration(path, SOME)
    assert read_calibration(path) == SOME
    assert not said


def test_another_machine_s_calibration_is_not_used_and_not_lost(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, SOME, key="another")
    assert read_calibration(path) is None
    mine = replace(SOME, bus_bandwidth=5e9)
    write_calibration(path, mine)
    assert read_calibration(path) == mine
    assert read_calibration(path, key="another") == SOME
    assert not said


def changed(**changes: Any) -> str:
    return json.dumps({machine_key(): {**asdict(SOME), **changes}})


BROKEN = {
    "no JSON": "{",
    "no bytes of text": "\udcff",
    "no object": "[1, 2]",
    "no machine": json.dumps({machine_key(): 3}),
    "a figure that is none": changed(bus_bandwidth="fast"),
    "a figure that is absent": changed(update_seconds={}),
    "a dtype that is absent": changed(product_rates={"float32": 1.0}),
    "a field of another version": changed(speed=3.0),
    "a figure that is not finite": changed(decode_seconds=math.inf),
    "a memory that is no number": changed(device_bytes="80GB"),
    "too few fields": json.dumps({machine_key(): {"name": "x"}}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_ignored_with_a_warning_and_replaced(case: str, tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(BROKEN[case].encode("utf-8", "surrogateescape"))
    assert read_calibration(path) is None
    assert len(said) == 1
    assert said[0].startswith(f"{path} cannot be used and is measured anew: ")
    write_calibration(path, SOME)
    assert read_calibration(path) == SOME


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
    keys = [
        machine_key(plain),
        machine_key(fake_machine(tmp_path / "cpu", cpu="Xeon")),
        machine_key(fake_machine(tmp_path / "gpu", gpus=("NVIDIA H100 80GB HBM3",))),
        machine_key(fake_machine(tmp_path / "two", gpus=("NVIDIA H100 80GB HBM3", "NVIDIA L40S"))),
        machine_key(tmp_path / "nothing"),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys.append(machine_key(plain))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    keys.append(machine_key(plain))
    assert len(set(keys)) == len(keys)
    assert machine_key(plain) == keys[-1]
    assert json.loads(keys[3])["gpus"] == ["NVIDIA H100 80GB HBM3", "NVIDIA L40S"]
    assert json.loads(keys[0])["cpu"] == "AMD EPYC"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCSCALE_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("PCSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/pcscale")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pcscale"


@pytest.mark.usefixtures("small", "said")
def test_a_small_calibration_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    found = calibration.calibrate_machine(tmp_path / "scratch")
    assert {field.name for field in fields(found)} == set(asdict(SOME))
    assert found.update_seconds.keys() == set(RECORD_FORMATS)
    assert found.origin.startswith("measured here on 20")
    assert found.on_gpu == torch.cuda.is_available()
    assert not list((tmp_path / "scratch").iterdir())
    assert torch.equal(torch.random.get_rng_state(), before), "a run that follows must not draw other numbers"


@pytest.mark.usefixtures("small", "said")
def test_progress_ends_with_its_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[float] = []
    original = console.progress

    def progress(label: str, total: float, unit: str) -> Any:
        totals.append(total)
        return original(label, total, unit)

    notes: list[str] = []
    monkeypatch.setattr(console, "progress", progress)
    monkeypatch.setattr(calibration.Tracker, "advance", lambda tracker, amount, note="": notes.append(note))
    calibration.calibrate_machine(tmp_path)
    assert totals == [len(notes)]


@pytest.mark.usefixtures("small")
def test_a_busy_machine_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(calibration.psutil, "cpu_percent", lambda interval: 61.0)
    found = calibration.calibrate_machine(tmp_path)
    assert found.origin.endswith(", while others computed as well")
    assert said == ["other programs keep the processors 61 % busy: measure again when they are done."]
    monkeypatch.setattr(calibration.psutil, "cpu_percent", lambda interval: 1.0)
    assert "others" not in calibration.calibrate_machine(tmp_path).origin


@pytest.mark.usefixtures("small", "said")
def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="a part of this path is a file"):
        calibration.calibrate_machine(tmp_path / "file" / "below")


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    found = calibration.calibrate_machine(tmp_path)
    assert isinstance(found, Hardware)
    write_calibration(tmp_path / "calibration.json", found)
    assert read_calibration(tmp_path / "calibration.json") == found


def test_the_table_needs_no_torch() -> None:
    code = "import sys, pcscale.memory.hardware; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
