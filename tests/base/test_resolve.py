"""What BASE on the command line may be."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pcscale.base.resolve import BaseFolder, resolve_base
from pcscale.common.errors import RequestError


def test_a_local_folder_is_taken_as_it_is_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve_base(str(tmp_path)) == BaseFolder(tmp_path, str(tmp_path), None)


def test_a_folder_named_like_a_hub_id_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    assert resolve_base("acme/tiny") == BaseFolder(Path("acme/tiny"), "acme/tiny", None)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_base("~/model").folder == tmp_path / "model"


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "two/slashes/here", "word", "-x/y"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    message = f"{name} is neither a checkpoint folder nor a Hub id. Check the path."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        resolve_base(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RequestError, match=r"model\.safetensors is neither a checkpoint folder nor a Hub id\."):
        resolve_base(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("config_only", [True, False])
def test_a_hub_id_is_fetched_without_pickles_and_its_commit_kept(
    config_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns, ignored=ignore_patterns)
        return str(tmp_path / "snapshots" / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_base("acme/tiny-1.0", config_only=config_only)
    assert found == BaseFolder(tmp_path / "snapshots" / "abc123", "acme/tiny-1.0", "abc123")
    assert asked["name"] == "acme/tiny-1.0"
    assert ("model*.safetensors" in asked["patterns"]) is not config_only
    assert asked["ignored"] == ["*/*"]  # other forms of the weights lie in folders below
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["patterns"])


def test_a_hub_id_that_cannot_be_fetched_is_refused_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise OSError(f"no\n  network for {name} " + "x" * 500)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RequestError) as caught:
        resolve_base("acme/tiny")
    beginning = "acme/tiny is no local folder and could not be fetched from the Hub: no network for acme/tiny xxx"
    assert str(caught.value).startswith(beginning)
    assert len(str(caught.value)) < 300
