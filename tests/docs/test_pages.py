"""The pages as Markdown: links lead somewhere, tables are whole, settings that they show are valid."""

import re
from pathlib import Path, PurePosixPath

import pytest
import yaml

from pcscale.config.load import check_values
from pcscale.config.schema import GROUPS, RunConfig
from pcscale.run.folder import RunFolder
from tools.site_hooks import relative_links, target_of

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deepspeed_configs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    )
)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HISTORY = ("CHANGELOG.md", "docs/lab_log.md")
"""Pages that may name what is gone."""
README_WORDS = 900


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _cells(row: str) -> int:
    """Cells of a table's row: a bar that is escaped, or in code, parts none."""
    return re.sub(r"`[^`]*`", "", row.replace(r"\|", "")).count("|") - 1


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    links = relative_links(_FENCE.sub("", _text(page)))
    assert [link for link in links if not (ROOT / target_of(PurePosixPath(page), link)).is_file()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in _HISTORY])
def test_every_module_that_a_page_names_is_there(page: str) -> None:
    names = re.findall(r"`((?:\w+/)+\w+\.py)`", _text(page))
    assert [name for name in names if not any((ROOT / top / name).exists() for top in ("", "pcscale"))] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page: str) -> None:
    lines = [*_FENCE.sub("", _text(page)).splitlines(), ""]
    heads = [number for number, line in enumerate(lines) if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line)]
    for head in heads:
        end = lines.index("", head)
        table = lines[head - 1 : end]
        assert all(line.startswith("| ") or line.startswith("|-") for line in table), f"a row is broken: {table}"
        assert {_cells(line) for line in table} == {_cells(lines[head])}, page


def test_the_settings_page_has_one_row_for_every_setting() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", _text("docs/settings.md"), re.MULTILINE)
    inner = [f"{group}.{name}" for group, model in GROUPS.items() for name in model.model_fields]
    assert sorted(rows) == sorted([*RunConfig.model_fields, *inner])


@pytest.mark.parametrize("page", ["README.md", "docs/compress.md"])
def test_the_run_yaml_of_a_page_is_valid(page: str) -> None:
    found = _YAML.findall(_text(page))
    assert len(found) == 1
    config = check_values(yaml.safe_load(found[0]), page)
    assert config.keep == 0.5
    assert config.tokens_per_step == 16_384  # The comment tells it.


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/distillation.md"])
def test_settings_that_a_page_shows_are_valid(page: str) -> None:
    blocks = _YAML.findall(_text(page))
    assert blocks
    for block in blocks:
        check_values({"base": "base", "output": "run", "data": {"train": ["text"]}, **yaml.safe_load(block)}, page)


def test_the_readme_can_be_read_in_minutes() -> None:
    assert len(_text("README.md").split()) <= README_WORDS


def test_every_entry_of_the_lab_log_has_a_lesson_of_one_line() -> None:
    entries = re.split(r"^## ", _text("docs/lab_log.md"), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        title, blank, lesson, after, *_ = entry.splitlines()
        assert (blank, after) == ("", ""), title
        assert lesson.startswith("**Lesson.** "), title


def test_every_file_of_a_run_is_explained() -> None:
    folder, page = RunFolder(Path("run")), _text("docs/run_folder.md")
    names = [path.name for path in vars(folder).values() if path != folder.path]
    assert "metrics.jsonl" in names
    assert [name for name in names if name not in page] == []


def test_every_decision_is_in_the_index() -> None:
    names = {path.name for path in (ROOT / "docs" / "decisions").glob("0*.md")}
    assert set(relative_links(_text("docs/decisions/README.md"))) == names
