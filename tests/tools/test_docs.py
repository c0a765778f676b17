"""The pages that are made from code."""

from pathlib import Path, PurePosixPath

from tools.docs import table
from tools.site_hooks import relative_links, target_of


def test_a_row_of_a_table_is_one_line_whatever_its_cells_hold() -> None:
    lines = table(["key", "does"], [["`a`", "first line\nsecond | line"], ["`b`", ""]])
    assert lines == ["| key | does |", "| --- | --- |", r"| `a` | first line second \| line |", "| `b` |  |"]


def test_links_to_other_files_are_found_without_anchors_and_addresses() -> None:
    markdown = "[one](a.md), [two](../b/c.md#part) ![three](d.png) [four](#here) [five](https://example.org/e.md)"
    assert list(relative_links(markdown)) == ["a.md", "../b/c.md", "d.png"]
    assert target_of(PurePosixPath("docs/page.md"), "../b/c.md") == PurePosixPath("b/c.md")


def test_generated_pages_are_part_of_the_site() -> None:
    nav = (Path(__file__).parents[2] / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ("settings.md", "commands.md", "architecture.md"):
        assert f": {page}\n" in nav
