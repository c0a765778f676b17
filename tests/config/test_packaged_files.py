"""DeepSpeed files by path and by name."""

import re
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.config.files import packaged_files, resolve_deepspeed

FOLDER = Path(__file__).parents[2] / "deepspeed_configs"


def test_a_file_that_comes_with_the_package_is_found_by_name() -> None:
    for path in FOLDER.glob("*.json"):
        assert resolve_deepspeed(path.stem).samefile(path)


def test_a_path_leads_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my_zero.json"
    path.write_text("{}", encoding="utf-8")
    assert resolve_deepspeed(str(path)) == path


def test_a_file_of_the_working_directory_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero1").write_text("{}", encoding="utf-8")
    assert resolve_deepspeed("zero1") == Path("zero1")


@pytest.mark.parametrize("name", ["zero9", "absent.json", "deepspeed_configs/zero9.json", "."])
def test_neither_a_file_nor_a_name_is_refused_with_the_names_that_there_are(name: str) -> None:
    text = f"deepspeed: {name} does not exist. Name a file, or one that comes with pcscale: zero1, zero2, "
    with pytest.raises(RequestError, match=re.escape(text)):
        resolve_deepspeed(name)


def test_files_of_other_kinds_are_left_out() -> None:
    assert sorted(packaged_files("deepspeed_configs", ".json")) == sorted(path.stem for path in FOLDER.glob("*.json"))
