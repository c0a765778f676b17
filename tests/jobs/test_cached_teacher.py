"""Runs that are taught from a folder: as by the live base, without it; and the folders that a run refuses."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.common.ledger import HIDDEN, TEACHER
from pcscale.common.sizes import CACHED_SEQUENCE_BYTES
from pcscale.config.schema import DataConfig, DistillConfig, RunConfig
from pcscale.jobs.compress import compress
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.stages import TARGETS
from pcscale.training.teacher import CachedTeacher
from pcscale.training.teacher_cache import TeacherCache, TeacherManifest
from tests.children import run_killed
from tests.entered import Entered
from tests.jobs.teaching import TAUGHT, TOP_K, teach
from tests.memory.plans import held_bytes
from tests.projection.parts import Compression, TinyBase
from tests.runs import World, curve, invoke, metrics, refusal, run_config, run_values, snapshot, write_yaml
from tests.tiny import build_base

pytestmark = pytest.mark.usefixtures("no_plots")

STORED_TOLERANCE = 1e-4
"""Of a loss, relative, after ten steps: logarithms are kept in float16."""


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the base says of a run's text. Read only; copy it to change it."""
    folder = tmp_path_factory.mktemp("whole") / "taught"
    teach(world, folder)
    return folder


@pytest.fixture
def taught(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "taught"))


def of(cache: Path, **changes: Any) -> dict[str, Any]:
    return {**TAUGHT, "cache": str(cache), **changes}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def without_traffic(run: Path) -> list[dict[str, Any]]:
    """Of teachers, the live one reads more."""
    return [{key: value for key, value in row.items() if key != "moved_bytes"} for row in curve(run)]


def forbid_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def live(*_: Any) -> None:
        raise AssertionError("the base was asked")

    monkeypatch.setattr("pcscale.jobs.build.Teacher", live)


# As the live one


def test_kept_in_float32_it_teaches_to_the_bit_as_the_live_base_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.training.teacher_cache.LOG_DTYPE", torch.float32)
    teach(world, tmp_path / "taught")
    compress(run_config(world, tmp_path / "live", distill=TAUGHT))
    forbid_the_base(monkeypatch)
    report = compress(run_config(world, tmp_path / "cached", distill=of(tmp_path / "taught")))
    assert without_traffic(tmp_path / "cached") == without_traffic(tmp_path / "live")
    assert report["phases"]["train"]["stages"]["teach"]["seconds"] > 0


@pytest.mark.parametrize("method", ["projected", "hard_prune"])
@pytest.mark.parametrize("top_k", [TOP_K, 3])
def test_as_it_is_kept_it_teaches_within_the_stored_precision(
    top_k: int, method: str, world: World, whole: Path, tmp_path: Path
) -> None:
    runs = {"live": {**TAUGHT, "top_k": top_k}, "cached": of(whole, top_k=top_k)}
    for name, distill in runs.items():
        compress(run_config(world, tmp_path / name, method=method, distill=distill))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=STORED_TOLERANCE)
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in runs]
    one, other = (found["compressed"]["loss"] for found in evaluations)
    assert one == pytest.approx(other, rel=STORED_TOLERANCE)


def test_it_is_split_into_other_batches(world: World, whole: Path, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    for name, changes in (("one", {}), ("other", split)):
        compress(run_config(world, tmp_path / name, distill=of(whole), **changes))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_a_killed_run_goes_on_to_the_same_numbers(world: World, whole: Path, run: Path, tmp_path: Path) -> None:
    compress(run_config(world, tmp_path / "plain", distill=of(whole)))
    run_killed(world, run, "pcscale.training.loop:training_step", 7, distill=of(whole))
    outcome = invoke("compress", run.parent / "run.yaml", "--resume")
    assert outcome.exit_code == 0
    assert "resuming at step 4" in outcome.stderr
    assert curve(run) == curve(tmp_path / "plain")


def test_a_run_goes_on_where_the_folder_has_been_moved_but_not_without_one(
    world: World, taught: Path, run: Path, tmp_path: Path
) -> None:
    compress(run_config(world, run, distill=of(taught), max_steps=2))
    moved = taught.rename(tmp_path / "moved")
    with pytest.raises(RequestError, match="distill is"):
        compress(run_config(world, run, distill=TAUGHT, max_steps=5), resume=True)
    compress(run_config(world, run, distill=of(moved), max_steps=5), resume=True)
    assert len(losses(run)) == 5


def test_a_run_that_sees_its_text_again_finds_it_again(world: World, whole: Path, run: Path) -> None:
    compress(run_config(world, run, distill=of(whole), max_steps=5))
    # A run that is made longer keeps its sequences and repeats them.
    compress(run_config(world, run, distill=of(whole), max_steps=15), resume=True)
    assert len(losses(run)) == 15


def test_a_run_that_is_complete_needs_no_cache_any_more(world: World, taught: Path, run: Path) -> None:
    compress(run_config(world, run, distill=of(taught), max_steps=2))
    shutil.rmtree(taught)
    compress(run_config(world, run, distill=of(taught), max_steps=2), resume=True)


# What is predicted


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_what_it_moves_is_what_the_plan_says(cached: bool, world: World, whole: Path, run: Path) -> None:
    compress(run_config(world, run, distill=of(whole) if cached else TAUGHT, residency="cpu"))
    moved = json.loads((run / "plan.json").read_text())["moved"]
    assert {row["moved_bytes"] for row in metrics(run)} == {sum(moved.values())}
    # Four sequences of 24 tokens, an id and a logarithm of two bytes each; or the base, tied, in float32.
    base = sum((world.base / name).stat().st_size for name in ["model.safetensors"])
    assert moved["teacher"] == (4 * 24 * TOP_K * 4 if cached else pytest.approx(base, rel=0.1))


def test_the_plan_without_a_teacher_names_none(world: World, run: Path) -> None:
    compress(run_config(world, run), dry_run=True)
    assert "teacher" not in compress(run_config(world, run), dry_run=True)["moved"]


def cached_config(whole: Path, **changes: Any) -> RunConfig:
    values = {"base": "-", "output": "-", "data": DataConfig(train=["-"]), "max_steps": 10, "sequence_length": 24}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return RunConfig(**{**values, **batch, "start": "selection", "distill": DistillConfig(**of(whole)), **changes})


def test_its_memory_and_targets_are_predicted_to_the_byte(whole: Path, tiny_base: TinyBase) -> None:
    ids_NT = known_sequences(whole)
    entered = Entered()
    config = cached_config(whole)
    assert config.distill is not None
    teacher = CachedTeacher(TeacherCache(whole, TeacherManifest.read(whole)), config.distill, ids_NT, "", check=True)
    targets = [values for of_batch in teacher.targets(list(ids_NT[:4].split(2))) for values in of_batch]
    plan = Compression.of(tiny_base("llama", True)).plan
    stages = Prediction(plan, config, Deployment(on_gpu=False)).training
    assert stages["forward"][TARGETS].num_bytes == held_bytes(targets)
    assert stages["forward"][TEACHER].num_bytes == entered.now()["host", TEACHER] == 40 * CACHED_SEQUENCE_BYTES
    assert HIDDEN not in stages["teach"]


def known_sequences(whole: Path) -> torch.Tensor:
    """The token ids that the folder was made of."""
    from tests.jobs.test_teach import sequences

    manifest = TeacherManifest.read(whole)
    return sequences(World(Path(manifest.base_name), Path(manifest.base_name).parent / "text.txt"))


def test_a_step_computes_no_teacher_and_reads_its_targets(whole: Path, tiny_base: TinyBase) -> None:
    plan = Compression.of(tiny_base("llama", True)).plan
    cached, live, alone = (
        Prediction(plan, cached_config(whole, distill=distill)).work
        for distill in (DistillConfig(**of(whole)), DistillConfig(**TAUGHT), None)
    )
    assert cached.flops == alone.flops < live.flops
    assert cached.disk_bytes - alone.disk_bytes == 4 * 24 * TOP_K * 4
    assert live.disk_bytes > cached.disk_bytes


# What it refuses


@pytest.fixture
def refuse(world: World, run: Path, tmp_path: Path) -> Callable[..., str]:
    """Why a run is not begun; nothing that a run could lose is there then."""

    def ask(distill: dict[str, Any], base: Path = world.base, **changes: Any) -> str:
        yaml = write_yaml(tmp_path / "run.yaml", run_values(World(base, world.text), run, distill=distill, **changes))
        said = refusal("compress", yaml)
        assert not any((run / name).exists() for name in ("scores.safetensors", "metrics.jsonl", "checkpoints"))
        return said

    return ask


def test_settings_that_the_cache_was_not_made_with(refuse: Callable[..., str], whole: Path, tmp_path: Path) -> None:
    set_that = "Set that, or name another folder."
    assert refuse(of(whole), sequence_length=16) == f"sequence_length is 16, {whole} was made with 24. {set_that}"
    assert refuse(of(whole, temperature=1)) == f"distill.temperature is 1.0, {whole} was made with 1.5. {set_that}"
    assert refuse(of(whole, top_k=9)) == (
        f"distill.top_k is 9, {whole} holds the 8 most likely tokens. Set at most that, or name another folder."
    )
    assert refuse(of(whole, top_k=None)).endswith(
        "a cache holds the base's most likely tokens alone: set top_k beside cache."
    )
    none = tmp_path / "none"
    assert refuse(of(none)) == f"{none} holds no teacher.json. Fill it with `pcscale teach`, or name one that is."
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("top_k", "as_it_was_made"), [(TOP_K, ""), (3, f" --top-k {TOP_K}")])
def test_sequences_that_are_missing_are_counted_and_the_command_that_is_named_adds_them(
    top_k: int, as_it_was_made: str, refuse: Callable[..., str], world: World, run: Path, tmp_path: Path
) -> None:
    taught = tmp_path / "taught"
    teach(world, taught, "--tokens", str(30 * 24))
    command = f"pcscale teach {run / 'run.yaml'} --tokens 960{as_it_was_made}"
    assert refuse(of(taught, top_k=top_k)) == (
        f"distill.cache {taught} lacks 10 of the 40 sequences that this run trains on. Add them: {command}"
    )
    assert invoke(*shlex.split(command)[1:]).exit_code == 0
    assert invoke("compress", tmp_path / "run.yaml").exit_code == 0
    assert len(losses(run)) == 10


@pytest.mark.parametrize(
    ("made_in", "settings", "as_it_was_made"),
    [
        ("float32", {"bf16": True}, " bf16=false"),
        ("float32", {"bf16": True, "gradient_dtype": "bfloat16"}, " bf16=false gradient_dtype=float32"),
        ("bfloat16", {"bf16": False}, " bf16=true"),
        ("bfloat16", {"bf16": True}, ""),
    ],
)
def test_the_command_that_adds_sequences_has_the_base_run_in_the_dtype_of_the_folder(
    made_in: str,
    settings: dict[str, Any],
    as_it_was_made: str,
    refuse: Callable[..., str],
    world: World,
    run: Path,
    tmp_path: Path,
) -> None:
    taught = tmp_path / "taught"
    teach(world, taught, "--tokens", str(30 * 24))
    path = taught / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": made_in}))
    said = refuse(of(taught), **settings)
    command = f"pcscale teach {run / 'run.yaml'} --tokens 960{as_it_was_made}"
    assert said.endswith(f"Add them: {command}")
    if made_in == "float32":  # Processors have no other.
        assert invoke(*shlex.split(command)[1:]).exit_code == 0
        assert invoke("compress", tmp_path / "run.yaml").exit_code == 0


def test_a_shard_that_is_missing_or_changed(refuse: Callable[..., str], taught: Path, run: Path) -> None:
    path = taught / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    again = f"Remove it and make it again: pcscale teach {run / 'run.yaml'} --tokens 960"
    assert refuse(of(taught)) == f"{path} is not what was written (its fingerprint differs). {again}"
    path.unlink()
    assert refuse(of(taught)) == f"{path} is missing. {again}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 7, "{folder} has teacher format 7, this version reads 1."),
        ("top_k", "many", "{folder}/teacher.json: top_k is 'many', expected "),
        ("shards", None, "{folder}/teacher.json: shards is None, expected a JSON object"),
        ("shards", {"../other": "0"}, "{folder}/teacher.json names shards outside its folder. The file was changed."),
    ],
)
def test_a_teacher_json_that_was_changed(
    key: str, value: Any, message: str, refuse: Callable[..., str], taught: Path
) -> None:
    path = taught / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert refuse(of(taught)).startswith(message.format(folder=taught))
    path.write_text("{")
    assert refuse(of(taught)).startswith(f"{path} is not JSON (")


def test_a_cache_of_another_base(refuse: Callable[..., str], world: World, whole: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, seed=5)
    assert refuse(of(whole), base=other).startswith(
        f"{other / 'model.safetensors'}: model.embed_tokens.weight is not the weight that {whole} was made from (fing"
    )
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert refuse(of(whole), base=other) == (
        f"{whole} was made from {world.base}, whose config.json is not that of {other}. "
        "Use the same base and revision, or name another folder."
    )


def test_a_run_does_not_go_on_with_a_cache_of_another_base(world: World, taught: Path, run: Path) -> None:
    compress(run_config(world, run, distill=of(taught), max_steps=5))
    path = taught / "teacher.json"
    values = json.loads(path.read_text())
    values["base_fingerprints"] |= {"model.norm.weight": "0" * 32}
    path.write_text(json.dumps(values))
    before = snapshot(run)
    assert refusal("compress", run / "run.yaml", "--resume", "max_steps=10") == (
        f"{taught} was made from other weights than the base that this run began with. Name another folder."
    )
    assert snapshot(run) == before
