"""What every subcommand keeps: help, one JSON document, silence, exit codes, errors in a line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RunError
from pcscale.config.help import themed_fields
from pcscale.config.schema import RunConfig
from tests.runs import World, invoke, refusal, run_values, snapshot, write_yaml

SUBCOMMANDS = (
    *("plan", "compress", "demo", "calibrate", "teach", "merge"),
    *("evaluate", "verify", "report", "compare", "recipes"),
)
FLAGS = {
    "plan": ["--keep", "--target-params", "--hidden-size", "--intermediate-size"],
    "compress": ["--resume", "--dry-run"],
    "demo": ["--output"],
    "calibrate": ["--data", "--output"],
    "teach": ["--data", "--output", "--sequence-length", "--top-k", "--temperature", "--tokens"],
    "merge": ["--base", "--output", "--max-shard-size", "--max-memory", "--dtype", "--resume"],
    "evaluate": ["--data", "--base", "--tasks", "--num-fewshot", "--limit"],
    "verify": [],
    "report": [],
    "compare": ["--output"],
    "recipes": ["--output"],
}
PLAN_KEYS = {"base", "compressed", "trainable", "flops", "moved", "memory", "peak"} | {
    "written_bytes_per_step",
    "communicated_bytes_per_step",
    "phases",
    "disk",
    "alternatives",
    "ranks",
}
MERGE_KEYS = {
    "output",
    "tensors",
    "bytes_written",
    "shards",
    "seconds",
    "peak_anonymous_bytes",
    "max_memory_bytes",
}
TEACH_KEYS = {"output", "sequences", "added", "tokens", "shards", "bytes", "bytes_per_token"} | {
    "seconds",
    "peak_anonymous_bytes",
}
EVALUATION_KEYS = {"loss", "perplexity", "bits_per_byte", "tokens", "parameters", "tokens_per_second"}


def _json(*arguments: str | Path) -> Any:
    """The one document on standard output."""
    outcome = invoke(*arguments, "--json")
    assert outcome.exit_code == 0, outcome
    return json.loads(outcome.stdout)


def _last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000010"


def _commands(world: World, finished: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Each subcommand (but the demo, which fetches a model) as a person would type it."""
    yaml = write_yaml(folder / "run.yaml", run_values(world, folder / "run", max_steps=2))
    text = ["--data", world.text, "--sequence-length", "24"]
    return {
        "plan": ["plan", world.base],
        "compress": ["compress", yaml],
        "calibrate": ["calibrate", world.base, "--output", folder / "scores.safetensors", *text],
        "teach": ["teach", world.base, "--output", folder / "taught", "--top-k", "5", "--tokens", "480", *text],
        "merge": ["merge", _last_checkpoint(finished), "--base", world.base, "--output", folder / "merged"],
        "evaluate": ["evaluate", finished / "merged", "--base", world.base, *text],
        "verify": ["verify", finished],
        "report": ["report", finished],
        "compare": ["compare", finished, _copy(finished, folder / "copy"), "--output", folder / "compare.png"],
        "recipes": ["recipes", "smollm2-half", "--output", folder / "recipe.yaml"],
    }


def _copy(run: Path, copy: Path) -> Path:
    """A run without its weights."""
    return Path(shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "merged")))


JSON_COMMANDS = tuple(name for name in SUBCOMMANDS if name != "demo")


def test_the_help_lists_every_subcommand() -> None:
    outcome = invoke("--help")
    assert outcome.exit_code == 0
    listed = re.findall(r"^│ (\w+) ", outcome.stdout, re.MULTILINE)
    assert listed == list(SUBCOMMANDS)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_has_help_with_its_flags_and_those_of_all(subcommand: str) -> None:
    outcome = invoke(subcommand, "--help")
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    flags = set(re.findall(r"--[a-z-]+", outcome.stdout))
    assert {*FLAGS[subcommand], "--json", "--quiet", "--debug", "--help"} <= flags
    groups = re.findall(r"^╭─ (.+?) ─", outcome.stdout, re.MULTILINE)
    assert groups[-1] == "Output"
    assert "Options" in groups


@pytest.mark.parametrize(
    ("subcommand", "group", "flag"),
    [
        ("plan", "Size of the compressed model", "--target-params"),
        ("merge", "Size", "--max-shard-size"),
        ("evaluate", "Downstream tasks", "--limit"),
    ],
)
def test_help_is_grouped_by_theme(subcommand: str, group: str, flag: str) -> None:
    text = invoke(subcommand, "--help").stdout
    theme = text.partition(f"╭─ {group}")[2].partition("╰─")[0]
    assert flag in theme
    assert "--quiet" not in theme


def test_help_of_compress_lists_every_setting_under_its_theme() -> None:
    text = invoke("compress", "--help").stdout
    sections = re.split(r"^\s*Settings: (\w+)\s*$", text, flags=re.MULTILINE)[1:]
    listed = {
        theme: re.findall(r"^ +(\w+) \(", body, re.MULTILINE)
        for theme, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert {theme: list(fields) for theme, fields in themed_fields().items()} == listed
    assert sum(map(len, listed.values())) == len(RunConfig.model_fields)


@pytest.mark.parametrize("subcommand", JSON_COMMANDS)
def test_json_prints_one_document_and_nothing_else_on_standard_output(
    subcommand: str, world: World, finished: Path, tmp_path: Path
) -> None:
    document = _json(*_commands(world, finished, tmp_path)[subcommand])
    assert isinstance(document, dict)
    assert document


def test_json_of_plan_has_the_documented_keys(world: World) -> None:
    document = _json("plan", world.base, "--keep", "0.4")
    assert set(document) == PLAN_KEYS
    assert set(document["base"]) == {"name", "family", "parameters", "tied"}
    assert set(document["compressed"]) == {"hidden_size", "intermediate_size", "parameters", "keep_fraction"}
    assert set(document["trainable"]) == {"parameters", "bytes"}
    assert set(document["flops"]) == {"compose_per_step", "pull_back_per_step", "train_per_token"}
    assert set(document["moved"]) == {"base", "records_read", "records_written"}
    assert all(set(part) == {"home", "bytes"} for part in document["memory"].values())
    assert all(set(peak) == {"device_bytes", "host_bytes", "disk_bytes"} for peak in document["peak"].values())
    assert document["compressed"]["keep_fraction"] == pytest.approx(0.4, abs=0.05)


def test_json_of_merge_has_the_documented_keys(world: World, finished: Path, tmp_path: Path) -> None:
    document = _json(*_commands(world, finished, tmp_path)["merge"])
    assert set(document) == MERGE_KEYS
    assert document["output"] == str(tmp_path / "merged")
    assert document["max_memory_bytes"] == 2 * 2**30


def test_json_of_evaluate_has_the_documented_keys(world: World, finished: Path, tmp_path: Path) -> None:
    document = _json(*_commands(world, finished, tmp_path)["evaluate"])
    assert set(document) == EVALUATION_KEYS | {"base"}
    assert set(document["base"]) == EVALUATION_KEYS
    assert document["tokens"] == document["base"]["tokens"]
    assert document["loss"] < document["base"]["loss"]


def test_json_of_evaluate_without_a_base_is_the_models_alone(world: World, finished: Path) -> None:
    arguments = ["evaluate", finished / "merged", "--data", world.text, "--sequence-length", "24", "--tokens", "240"]
    document = _json(*arguments)
    assert set(document) == EVALUATION_KEYS
    assert document["tokens"] == 10 * 23


def test_json_of_calibrate_names_what_it_wrote(world: World, finished: Path, tmp_path: Path) -> None:
    document = _json(*_commands(world, finished, tmp_path)["calibrate"])
    assert document["output"] == str(tmp_path / "scores.safetensors")
    assert (tmp_path / "scores.safetensors").stat().st_size > 0
    assert document["scores"]["residual"] == [32]
    assert document["tokens"] > 0


def test_json_of_teach_names_what_it_kept(world: World, finished: Path, tmp_path: Path) -> None:
    document = _json(*_commands(world, finished, tmp_path)["teach"])
    assert set(document) == TEACH_KEYS
    found = {key: document[key] for key in ("output", "sequences", "added", "tokens", "shards")}
    assert found == {"output": str(tmp_path / "taught"), "sequences": 20, "added": 20, "tokens": 480, "shards": 1}
    (shard,) = (tmp_path / "taught").glob("*.safetensors")
    assert document["bytes"] == shard.stat().st_size == 480 * document["bytes_per_token"]


def test_json_of_verify_says_that_all_checks_passed(finished: Path) -> None:
    document = _json("verify", finished)
    assert document["passed"] is True
    assert len(document["checks"]) == 4
    assert all(check["found"] <= check["allowed"] for check in document["checks"].values())


def test_json_of_report_is_report_json(finished: Path) -> None:
    document = _json("report", finished)
    assert document == json.loads((finished / "report.json").read_text())
    assert set(document["evaluation"]) == {"base", "start", "compressed"}
    assert {"predicted_bytes", "measured_bytes"} == set(document["peak"]["host_anonymous"])


def test_json_of_compress_is_report_json(world: World, finished: Path, tmp_path: Path) -> None:
    document = _json(*_commands(world, finished, tmp_path)["compress"])
    assert document == json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.parametrize("subcommand", JSON_COMMANDS)
def test_quiet_says_nothing_beside_the_result(subcommand: str, world: World, finished: Path, tmp_path: Path) -> None:
    outcome = invoke(*_commands(world, finished, tmp_path)[subcommand], "--quiet")
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    assert outcome.stdout.strip()


def test_messages_go_to_standard_error(world: World, tmp_path: Path, no_plots: None) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, tmp_path / "run", max_steps=4, logging_steps=2))
    outcome = invoke("compress", yaml)
    lines = outcome.stderr.splitlines()
    assert [line.partition(" ·")[0] for line in lines if line.startswith("step ")] == ["step 2/4", "step 4/4"]
    assert any(line.startswith("base: held-out loss ") for line in lines)
    assert any(line.startswith("start (selection): held-out loss ") for line in lines)
    assert "step" not in outcome.stdout
    for name in ("base", "start", "compressed"):
        assert name in outcome.stdout
    assert str(tmp_path / "run" / "report.html") in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "x", "--boqqus"], "No such option: --boqqus. `pcscale plan --help` lists what there is."),
        (["frobnicate"], "No such command 'frobnicate'. `pcscale --help` lists what there is."),
        (["plan"], "Missing argument 'base'. `pcscale plan --help` lists what there is."),
        (["merge", "x"], "Missing option '--output'. `pcscale merge --help` lists what there is."),
        (["plan", "x", "--keep", "half"], "Invalid value for '--keep': "),
        (["compress", "run.yaml", "--forte"], "No such option: --forte"),
    ],
)
def test_a_wrong_flag_or_argument_is_said_in_a_line(arguments: list[str], message: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(f"pcscale: {message}")
    assert len(outcome.error_lines) == 1


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_refuses_an_unknown_flag(subcommand: str) -> None:
    outcome = invoke(subcommand, "--no-such-flag")
    assert outcome.exit_code == 2
    assert "No such option: --no-such-flag" in outcome.stderr


def test_a_tracebacks_place_is_debug(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert refusal("plan", missing) == f"{missing} is neither a checkpoint folder nor a Hub id. Check the path."
    program = [sys.executable, "-m", "pcscale", "plan", str(missing), "--debug"]
    shown = subprocess.run(program, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "Traceback (most recent call last)" in shown.stderr
    assert f"RequestError: {missing} is neither a checkpoint folder nor a Hub id." in shown.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (RunError("the fan stopped"), 1, "pcscale: the fan stopped"),
        (ZeroDivisionError("by\nzero"), 1, "pcscale: unexpected ZeroDivisionError: by zero (--debug shows where)"),
        (KeyboardInterrupt(), 130, "pcscale: interrupted"),
    ],
)
def test_any_other_failure_is_a_line_too(
    error: BaseException, exit_code: int, message: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Path) -> None:
        raise error

    monkeypatch.setattr("pcscale.reporting.report.write_report", fail)
    outcome = invoke("report", finished)
    assert outcome.exit_code == exit_code
    assert outcome.error_lines == [message]
    assert outcome.stdout == ""


def test_verify_of_a_changed_merged_model_exits_1(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, path, {"format": "pt"})
    outcome = invoke("verify", tmp_path / "run", "--json")
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["passed"] is False


def test_merge_of_a_run_folder_is_that_of_its_last_checkpoint(world: World, finished: Path, tmp_path: Path) -> None:
    outcome = invoke("merge", finished, "--base", world.base, "--output", tmp_path / "merged")
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(f"{tmp_path / 'merged'}: 20 tensors in 1 files")
    ours, runs = snapshot(tmp_path / "merged"), snapshot(finished / "merged")
    assert ours["model.safetensors"] == runs["model.safetensors"]


def test_the_demo_hands_its_folder_on_and_prints_a_sample(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def run_demo(output: Path) -> tuple[Any, dict[str, str]]:
        seen.append(output)
        sample = {"prompt": "Once", "compressed": "upon a time"}
        return json.loads((finished / "report.json").read_text()), sample

    monkeypatch.setattr("pcscale.jobs.demo.run_demo", run_demo)
    outcome = invoke("demo", "--output", tmp_path / "demo")
    assert outcome.exit_code == 0
    assert seen == [tmp_path / "demo"]
    assert outcome.stdout.rstrip().endswith("Once >>> upon a time")
    assert "evaluation" in _json("demo", "--output", tmp_path / "demo")
