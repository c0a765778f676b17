"""Write docs/settings.md from the settings' own docstrings; `--check` only says whether it is current."""

import sys
from pathlib import Path

from pcscale.config.help import default_text, themed_fields
from pcscale.config.schema import DataConfig

PATH = Path(__file__).parent.parent / "docs" / "settings.md"


def settings_page() -> str:
    lines = ["# Settings of run.yaml", "", "Made by `python tools/settings_doc.py` from `pcscale/config/schema.py`.", ""]
    for theme, fields in themed_fields().items():
        lines += [f"## {theme.capitalize()}", "", "| key | default | what it does |", "|---|---|---|"]
        for name, field in fields.items():
            lines.append(f"| `{name}` | {default_text(field)} | {field.description} |")
            if name == "data":
                for inner, inner_field in DataConfig.model_fields.items():
                    lines.append(f"| `data.{inner}` | {default_text(inner_field)} | {inner_field.description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    page = settings_page()
    if "--check" in sys.argv:
        if not PATH.exists() or PATH.read_text(encoding="utf-8") != page:
            sys.exit(f"{PATH} is not current: run `make docs`")
    else:
        PATH.write_text(page, encoding="utf-8")
