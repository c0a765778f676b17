"""`pcscale plan` with a budget: what it chooses runs, and what cannot fit is refused."""

import json
from pathlib import Path

import pytest
import yaml

from pcscale.config.files import resolve_deepspeed
from pcscale.config.load import load_run_config
from tests.runs import World, invoke, refusal

GIB = 2**30


def chosen(world: World, folder: Path, *arguments: str) -> dict[str, object]:
    return json.loads(invoke("plan", world.base, *arguments, "--write", folder / "run.yaml", "--json").stdout)


def test_the_written_file_holds_what_was_chosen_and_compress_takes_it(world: World, tmp_path: Path) -> None:
    document = chosen(world, tmp_path, "--host-memory", "4GiB", "--disk", "4GiB", "--data", str(world.text))
    config = load_run_config(tmp_path / "run.yaml")
    assert {key: entry["value"] for key, entry in document["chosen"].items()} == {
        key: getattr(config, key) for key in document["chosen"]
    }
    assert all(document["needs"][resource] <= 4 * GIB for resource in ("host", "disk"))
    overrides = [f"output={tmp_path / 'run'}", "sequence_length=16", "calibration_tokens=64", "max_steps=1"]
    report = invoke("compress", tmp_path / "run.yaml", *overrides, "--dry-run", "--json")
    assert report.exit_code == 0, report.stderr


def test_what_was_given_on_the_command_line_is_not_chosen_anew(world: World, tmp_path: Path) -> None:
    without = chosen(world, tmp_path / "without", "--device-memory", "24GB", "--host-memory", "24GB")
    asked = ("base_home=cpu", "residency=disk", "moments=8bit")
    document = chosen(world, tmp_path / "asked", "--device-memory", "24GB", "--host-memory", "24GB", *asked)
    values = yaml.safe_load((tmp_path / "asked" / "run.yaml").read_text())
    for setting in asked:
        key, _, value = setting.partition("=")
        assert document["chosen"][key]["value"] == values[key] == value
        assert without["chosen"][key]["value"] != value


def test_what_was_given_and_cannot_be_is_refused_before_anything_is_written(world: World, tmp_path: Path) -> None:
    asked = ["--device-memory", "24GB", "--gpus", "2", "gradient_home=cpu", "--write", tmp_path / "run.yaml"]
    assert "gradient_home cpu is for one process" in refusal("plan", world.base, *asked)
    assert not list(tmp_path.iterdir())


def test_without_data_the_file_says_how_to_name_it(world: World, tmp_path: Path) -> None:
    chosen(world, tmp_path, "--host-memory", "4GiB")
    text = (tmp_path / "run.yaml").read_text()
    assert "data.train=" in text
    assert "data" not in yaml.safe_load(text)
    assert "data is not set" in refusal("compress", tmp_path / "run.yaml")
    assert load_run_config(tmp_path / "run.yaml", [f"data.train={world.text}"]).data.train == [str(world.text)]


def test_several_gpus_get_a_deepspeed_file_by_name_and_no_other_file(world: World, tmp_path: Path) -> None:
    document = chosen(world, tmp_path, "--device-memory", "24GB", "--gpus", "2", "--data", str(world.text))
    name = load_run_config(tmp_path / "run.yaml").deepspeed
    assert name == document["chosen"]["deepspeed"]["value"] == "zero1"
    assert resolve_deepspeed(name).is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


@pytest.mark.parametrize("size", ["-1", "lots", "24 XB", "0"])
def test_a_size_that_is_none_is_refused(size: str, world: World, tmp_path: Path) -> None:
    said = refusal("plan", world.base, f"--host-memory={size}", "--write", tmp_path / "run.yaml")
    assert f"'{size}' is not a size" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["24 GB", "24GiB", "24g", "25769803776"])
def test_sizes_are_read_as_people_write_them(size: str, world: World, tmp_path: Path) -> None:
    document = chosen(world, tmp_path, "--host-memory", size)
    assert document["needs"]["host"] <= 24 * GIB


def test_a_budget_below_the_interpreter_is_refused_with_the_least_that_would_do(world: World, tmp_path: Path) -> None:
    arguments = ["plan", world.base, "--write", tmp_path / "run.yaml", "--host-memory"]
    said = refusal(*arguments, "100MiB", exit_code=3)
    least = int(said.rpartition("(")[2].partition(" bytes")[0])
    assert not (tmp_path / "run.yaml").exists()
    refusal(*arguments, str(least - 1), exit_code=3)
    assert invoke(*arguments, str(least)).exit_code == 0


def test_a_file_that_is_there_is_never_replaced(world: World, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    said = refusal("plan", world.base, "--host-memory", "4GiB", "--write", tmp_path / "run.yaml")
    assert "exists already" in said
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_settings_of_a_run_alone_are_written_as_they_were_given(world: World, tmp_path: Path) -> None:
    own = ("output=elsewhere/run", f"data.train={world.text}")
    chosen(world, tmp_path, "--host-memory", "4GiB", *own)
    config = load_run_config(tmp_path / "run.yaml")
    assert (config.output, config.data.train) == ("elsewhere/run", [str(world.text)])


def test_a_cap_that_no_residency_keeps_is_refused(world: World, tmp_path: Path) -> None:
    arguments = ["--host-memory", "4GiB", "--write", tmp_path / "run.yaml", "pinned_memory=10"]
    said = refusal("plan", world.base, *arguments, exit_code=3)
    assert "pinned_memory 10 is too small for records in host memory and in files" in said


def test_gpus_that_cannot_share_a_step_are_refused(world: World, tmp_path: Path) -> None:
    said = refusal("plan", world.base, "--device-memory", "24GB", "--gpus", "3", "--write", tmp_path / "run.yaml")
    assert "32 sequences a step cannot be shared by 3 GPUs" in said
