"""The manifest of a checkpoint: it comes back as it was written, and binds the files it names."""

import dataclasses
import json
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.run.manifest import Manifest, record_file
from pcscale.storage.hashing import fingerprint_file

FILE = "records/model.norm.weight.safetensors"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with one file, and a manifest that names it."""
    (tmp_path / "records").mkdir()
    (tmp_path / FILE).write_bytes(b"some tensors")
    Manifest(
        step=7,
        method="projected",
        base_name="größer/base",
        base_revision="abc123",
        base_config=CONFIG,
        base_fingerprints={"model.norm.weight": "00ff"},
        hidden_size=24,
        intermediate_size=40,
        files={FILE: fingerprint_file(tmp_path / FILE)},
        projection_rank=3,
        coded_fingerprints={"model.embed_tokens.weight": "0f0f"},
    ).write(tmp_path)
    return tmp_path


def test_a_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert dataclasses.asdict(manifest) == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest.step, manifest.method, manifest.base_name) == (7, "projected", "größer/base")
    assert (manifest.format_version, manifest.projection_rank) == (3, 3)
    assert manifest.coded_fingerprints == {"model.embed_tokens.weight": "0f0f"}
    manifest.write(folder)
    assert Manifest.read(folder) == manifest


def test_the_plan_follows_from_the_manifest_alone(folder: Path) -> None:
    plan = Manifest.read(folder).plan
    assert plan.family.name == "llama"
    assert plan.base_config == CONFIG
    assert plan.config == {**CONFIG, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8}


def test_a_file_is_given_when_its_bytes_are_those_that_were_written(folder: Path) -> None:
    assert Manifest.read(folder).file(folder, FILE) == folder / FILE


@pytest.mark.parametrize("content", [b"some tensorz", b"some tensor", b"", b"some tensors "])
def test_a_changed_file_is_refused(content: bytes, folder: Path) -> None:
    (folder / FILE).write_bytes(content)
    with pytest.raises(
        RequestError,
        match=rf"{FILE} is not what was written \(its fingerprint differs\)\. Use another checkpoint\.",
    ):
        Manifest.read(folder).file(folder, FILE)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / FILE).unlink()
    with pytest.raises(RequestError, match=rf"{FILE} is missing from the checkpoint\. Use another checkpoint\."):
        Manifest.read(folder).file(folder, FILE)


def test_a_file_that_the_manifest_does_not_name_is_refused(folder: Path) -> None:
    (folder / "records" / "extra.safetensors").write_bytes(b"from elsewhere")
    with pytest.raises(RequestError, match=r"extra\.safetensors is missing from the checkpoint"):
        Manifest.read(folder).file(folder, "records/extra.safetensors")


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r" is not a checkpoint: it has no manifest\.json\. Name a step-… folder of a run\."
    ):
        Manifest.read(tmp_path)


VERSION = '{"format_version": %s}'


@pytest.mark.parametrize("text", ["[]", "{}", VERSION % 99, VERSION % 4, VERSION % 1, "3"])
def test_another_format_is_refused_whatever_else_it_holds(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RequestError, match=r" has checkpoint format (None|99|4|1), this version reads 3\."):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("step", "many", r"step is 'many', expected a valid integer"),
        ("method", "magic", r"method is 'magic', expected 'projected' or 'hard_prune'"),
        ("base_fingerprints", {"a": 1}, r"base_fingerprints\.a is 1, expected a valid string"),
        ("files", None, r"files is None, expected a JSON object"),
        ("hidden_size", 24.5, r"hidden_size is 24\.5, expected a valid integer"),
        ("projection_rank", "full", r"projection_rank is 'full', expected a valid integer"),
        ("coded_fingerprints", {"a": 1}, r"coded_fingerprints\.a is 1, expected a valid string"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: object, problem: str, folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(RequestError, match=rf"manifest\.json: {problem}.*\. The file was changed\."):
        Manifest.read(folder)


def test_a_base_of_no_known_family_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_config": {**CONFIG, "model_type": "unheard"}}))
    with pytest.raises(RequestError, match=r"manifest\.json.*unheard"):
        _ = Manifest.read(folder).plan


def test_a_record_has_the_name_of_its_weight() -> None:
    assert record_file("model.layers.3.mlp.up_proj.weight") == "records/model.layers.3.mlp.up_proj.weight.safetensors"
