"""Refuse Python files over 400 lines and functions of the package over 60: such a file, such a function, is two."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60


def function_sizes(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function: its signature counts, its docstring does not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = first if ast.get_docstring(node) is not None else None
            unread = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
            yield node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1 - unread


def problems(path: Path, limit_functions: bool) -> Iterator[str]:
    """What is too long in a file, each as a line of text."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{path} has {lines} lines, at most {FILE_LINES} are allowed: split it"
    if limit_functions:
        for name, line, size in function_sizes(source):
            if size > FUNCTION_LINES:
                yield f"{path}:{line}: {name} has {size} lines, at most {FUNCTION_LINES} are allowed: split it"


def main() -> int:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    paths = [Path(name) for name in sorted(set(names)) if Path(name).exists()]
    found = [text for path in paths for text in problems(path, limit_functions=path.parts[0] == "pcscale")]
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
