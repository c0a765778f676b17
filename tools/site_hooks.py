"""mkdocs hooks: pages and pictures that lie beside docs/ are part of the site, under their paths in the repository.

Links in Markdown are relative paths between files of the repository: they also work where the files are browsed.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs"
HOME = "README.md"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#\s])")


def relative_links(markdown: str) -> Iterator[str]:
    """The targets of a page's links to other files, without their anchors."""
    return (match[1] for match in _LINK.finditer(markdown) if ":" not in match[1])


def target_of(source: PurePosixPath, link: str) -> PurePosixPath:
    """The path in the repository that a link in the file `source` leads to."""
    return PurePosixPath(os.path.normpath(source.parent / link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked from the site's pages and lies outside of docs/, and what is linked from there."""
    waiting = [PurePosixPath(HOME), *(PurePosixPath(DOCS, file.src_uri) for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if path.parts[0] != DOCS:
            files.append(File(str(path), str(ROOT), config.site_dir, config.use_directory_urls))
        if path.suffix == ".md":
            text = (ROOT / path).read_text(encoding="utf-8")
            targets = {target_of(path, link) for link in relative_links(text)} - seen
            found = [target for target in targets if target.parts[0] != DOCS and (ROOT / target).is_file()]
            seen.update(found)
            waiting += found
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    outside = Path(page.file.src_dir or "").resolve() == ROOT
    source = PurePosixPath(page.file.src_uri) if outside else PurePosixPath(DOCS, page.file.src_uri)

    def site_link(match: re.Match[str]) -> str:
        if ":" in match[1]:
            return match[1]
        return os.path.relpath(_site_path(target_of(source, match[1])), _site_path(source).parent)

    return _LINK.sub(site_link, markdown)


def _site_path(path: PurePosixPath) -> PurePosixPath:
    return path.relative_to(DOCS) if path.parts[0] == DOCS else path
