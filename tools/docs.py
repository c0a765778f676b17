"""Write the pages of docs/ that are made from code; with `--check` only report whether they are current.

docs/settings.md is made from the schema of run.yaml, docs/commands.md from the command line's own help, and the tree in
docs/architecture.md from the docstrings of modules.
"""

import ast
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from pcscale.cli.main import app
from pcscale.config.help import default_text, themed_fields
from pcscale.config.schema import GROUPS

ROOT = Path(__file__).parent.parent
SETTINGS, COMMANDS, ARCHITECTURE = (ROOT / "docs" / name for name in ("settings.md", "commands.md", "architecture.md"))
TREE_START, TREE_END = "<!-- tree: made by `make docs` -->\n", "<!-- /tree -->"
_SHARED_PANEL = "Output"
_BESIDE = {
    "examples/": "a script in cells that compresses in a loop of one's own",
    "recipes/": "run.yaml files to start from, and a SLURM script; also in the package",
    "deepspeed_configs/": "DeepSpeed files, and which to take when; also in the package",
    "benchmarks/": "what the figures in the docs come from, with dated reports",
    "tests/": "folders mirror the package; tiny.py random checkpoints, reference.py the slow obvious step",
    "tools/": "the merger as a script, the makers of these pages, the limits on sizes",
    "docs/": "this site; decisions/ has a record for each lasting choice",
}


def one_line(text: str) -> str:
    return " ".join(text.split())


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table of Markdown: a line for each row, whatever stands in its cells."""
    cells = [[one_line(cell).replace("|", r"\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells]]


def settings_page() -> str:
    lines = ["# Settings of run.yaml", "", "Made by `make docs` from `pcscale/config/schema.py`."]
    lines += [
        "`key=value` on the command line overrides the file; a dot reaches into a group: `data.train=text.txt`.",
        "",
    ]
    for theme, fields in themed_fields().items():
        rows = []
        for name, field in fields.items():
            rows.append([f"`{name}`", default_text(field), field.description or ""])
            for inner, inner_field in GROUPS[name].model_fields.items() if name in GROUPS else ():
                rows.append([f"`{name}.{inner}`", default_text(inner_field), inner_field.description or ""])
        lines += [f"## {theme.capitalize()}", "", *table(["key", "default", "what it does"], rows), ""]
    return "\n".join(lines)


def commands_page() -> str:
    """The help of every command: its usage, its description, its arguments and flags by theme."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    shared = next(iter(commands.values())).params
    lines = [
        "# Commands",
        "",
        "Made by `make docs` from the help of `pcscale`; `python -m pcscale` is the same. Every command has:",
        "",
    ]
    lines += table(
        ["flag", "does"], ([_flag(item), item.help] for item in shared if item.rich_help_panel == _SHARED_PANEL)
    )
    lines += ["", "Exit codes: 0 done · 2 the request is wrong · 3 it cannot fit the stated memory · 1 anything else ·"]
    lines += ["130 interrupted, after writing a checkpoint.", ""]
    for name, command in commands.items():
        lines += [f"## pcscale {name}", "", *_command_section(name, command)]
    return "\n".join(lines)


def _command_section(name: str, command: Any) -> list[str]:
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    usage = " ".join([f"pcscale {name}", *map(_argument, arguments), "[OPTIONS]"])
    paragraphs = command.help.partition("\b")[0].strip().split("\n\n")  # A list of settings follows: they have a page.
    lines = ["```", usage, "```", "", *(f"{one_line(text)}\n" for text in paragraphs)]
    panels: dict[str, list[list[str]]] = {}
    for item in command.params:
        if item.rich_help_panel != _SHARED_PANEL and not item.hidden:
            label = f"`{_argument(item).replace('|', ' or ')}`" if item in arguments else _flag(item)
            panels.setdefault(item.rich_help_panel or "", []).append([label, _default(item), item.help or ""])
    for title, rows in panels.items():
        lines += [f"**{title}**\n"] if title else []
        lines += [*table(["argument or flag", "default", "what it does"], rows), ""]
    return lines


def _argument(item: Any) -> str:
    """An argument as usage lines have it: `BASE`, `[KEY=VALUE]...`."""
    label = item.metavar or item.name.upper()
    return label if item.required or label.startswith("[") else f"[{label}]"


def _flag(item: Any) -> str:
    return f"`{item.opts[0]}`"


def _default(item: Any) -> str:
    if item.required:
        return "required"
    return "" if item.default is None or item.default is False else str(item.default)


def tree() -> str:
    """One line a file: its module docstring's first line. Packages stand in the order of their layers, top first."""
    lines = ["pcscale/"]
    for name in _layers():
        folder = ROOT / "pcscale" / name
        if folder.is_dir():
            lines.append(f"  {name}/")
            lines += [_tree_line(file, 4) for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
        elif folder.with_suffix(".py").exists():
            lines.append(_tree_line(folder.with_suffix(".py"), 2))
    lines += [f"{folder:<19} {text}" for folder, text in _BESIDE.items()]
    return "\n".join(lines) + "\n"


def _layers() -> list[str]:
    """The packages that pyproject.toml's import contract names, in its order."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    siblings = (layer.replace("(", "").replace(")", "").split("|") for layer in contract["layers"])
    return [name.strip().removeprefix("pcscale.") for layer in siblings for name in layer]


def _tree_line(file: Path, indent: int) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return f"{' ' * indent}{file.name:<{23 - indent}} {docstring.splitlines()[0]}"


def architecture_page() -> str:
    before, rest = ARCHITECTURE.read_text(encoding="utf-8").split(TREE_START)
    after = rest.split(TREE_END)[1]
    return f"{before}{TREE_START}```\n{tree()}```\n{TREE_END}{after}"


def main() -> int:
    pages = {SETTINGS: settings_page(), COMMANDS: commands_page(), ARCHITECTURE: architecture_page()}
    stale = [path for path, page in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != page]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
