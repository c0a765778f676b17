"""Write docs/settings.md and the README's tree from docstrings; `--check` only says whether they are current."""

import ast
import sys
from pathlib import Path

from pcscale.config.help import default_text, themed_fields
from pcscale.config.schema import GROUPS

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "docs" / "settings.md"
README = ROOT / "README.md"
_TREE_START, _TREE_END = "<!-- tree: made by `make docs` -->\n", "<!-- /tree -->"
_PACKAGES = (  # top first
    *("cli", "jobs", "training", "merging", "evaluation", "reporting", "distributed"),
    *("memory", "data", "projection", "calibration", "base", "run", "model"),
    *("families", "storage", "config", "common"),
)
_BESIDE = {
    "tools/": "merge_sharded.py (the merger as a script), memory_report.py (memory, predicted beside measured), "
    "docs.py (makes this tree), deepspeed_ops.py, file_sizes.py",
    "tests/": "folders mirror the package; tiny.py random checkpoints, reference.py the slow obvious step",
    "benchmarks/": "what the figures above come from, with dated reports",
    "deepspeed_configs/": "DeepSpeed files, and which to take when",
    "recipes/": "run.yaml files to start from, a SLURM script",
    "docs/": "settings, recipe, decisions, examples, how to add a family",
}


def settings_page() -> str:
    lines = ["# Settings of run.yaml", "", "Made by `make docs` from `pcscale/config/schema.py`.", ""]
    for theme, fields in themed_fields().items():
        lines += [f"## {theme.capitalize()}", "", "| key | default | what it does |", "|---|---|---|"]
        for name, field in fields.items():
            lines.append(f"| `{name}` | {default_text(field)} | {field.description} |")
            for inner, inner_field in GROUPS[name].model_fields.items() if name in GROUPS else ():
                lines.append(f"| `{name}.{inner}` | {default_text(inner_field)} | {inner_field.description} |")
        lines.append("")
    return "\n".join(lines)


def tree() -> str:
    """One line a file: its module docstring's first line."""
    lines = ["pcscale/"]
    for package in _PACKAGES:
        lines.append(f"  {package}/")
        for file in sorted((ROOT / "pcscale" / package).glob("*.py")):
            if file.name != "__init__.py":
                summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
                lines.append(f"    {file.name:<15} {summary}")
    lines += [f"{folder:<16} {text}" for folder, text in _BESIDE.items()]
    return "\n".join(lines) + "\n"


def readme_page() -> str:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_TREE_START)
    after = rest.split(_TREE_END)[1]
    return f"{before}{_TREE_START}```\n{tree()}```\n{_TREE_END}{after}"


def main() -> int:
    pages = {SETTINGS: settings_page(), README: readme_page()}
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
