"""The limits on the sizes of files and functions."""

from pathlib import Path

from tools.file_sizes import FILE_LINES, FUNCTION_LINES, problems


def _function(lines: int, docstring: int = 0) -> str:
    text = ['    """A docstring.', *["    More."] * (docstring - 2), '    """'] if docstring else []
    return "\n".join(["def long() -> None:", *text, *["    pass"] * (lines - 1)]) + "\n"


def _found(path: Path, text: str, limit_functions: bool = True) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return [problem.removeprefix(str(path)) for problem in problems(path, limit_functions)]


def test_a_function_may_have_so_many_lines_beside_its_docstring(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    assert _found(path, _function(FUNCTION_LINES, docstring=30)) == []
    too_long = [f":2: long has {FUNCTION_LINES + 1} lines, at most {FUNCTION_LINES} are allowed: split it"]
    assert _found(path, "\n" + _function(FUNCTION_LINES + 1, docstring=30)) == too_long
    assert _found(path, "\n" + _function(FUNCTION_LINES + 1)) == too_long
    assert _found(path, _function(FUNCTION_LINES + 1), limit_functions=False) == []


def test_a_file_may_have_so_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    assert _found(path, "\n" * FILE_LINES) == []
    too_long = [f" has {FILE_LINES + 1} lines, at most {FILE_LINES} are allowed: split it"]
    assert _found(path, "\n" * (FILE_LINES + 1)) == too_long
