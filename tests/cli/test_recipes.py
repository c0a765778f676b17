"""Files that come with the package: `pcscale recipes` lists and copies some, a run.yaml names others."""

from pathlib import Path

import pytest

from tests.runs import World, invoke, refusal, run_values, write_yaml

FOLDER = Path(__file__).parents[2] / "recipes"


def test_every_recipe_is_listed_in_a_line() -> None:
    lines = invoke("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in FOLDER.iterdir())
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_a_recipe_is_copied_as_it_is(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path.name in invoke("recipes", path.stem).stdout
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert invoke("recipes", path.stem, "--output", "other").exit_code == 0
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_no_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine", encoding="utf-8")
    text = refusal("recipes", "smollm2-half", "--output", path)
    assert text == f"{path} exists already. Name another file with --output, or remove it."
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    text = refusal("recipes", "smollm2-half", "--output", tmp_path / "absent" / "run.yaml")
    assert text == f"{tmp_path / 'absent'} does not exist. Name a file in a folder that does."


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    text = refusal("recipes", "llama")
    assert text.startswith("there is no recipe 'llama'. Choose among hard-prune, llama-3.1-8b-24gb, ")


def test_an_output_without_a_name_is_refused(tmp_path: Path) -> None:
    text = refusal("recipes", "--output", tmp_path / "run.yaml")
    assert text == "--output needs the name of a recipe. `pcscale recipes` lists them."


def test_a_run_names_a_deepspeed_file_of_the_package_without_its_path(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, tmp_path / "run"))
    assert invoke("compress", yaml, "deepspeed=zero3_offload_cpu", "--dry-run").exit_code == 0
    text = refusal("compress", yaml, "deepspeed=zero9", "--dry-run")
    assert text.startswith("deepspeed: zero9 does not exist. Name a file, or one that comes with pcscale: zero1, ")
