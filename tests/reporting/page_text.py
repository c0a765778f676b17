"""A page as its tags and its text."""

from html.parser import HTMLParser
from pathlib import Path

VOID_TAGS = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects text and attributes, and holds every tag to being closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open_tags == []
        self.text = " ".join(self.text.split())  # As a browser shows it.

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
