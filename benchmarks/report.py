"""Dated benchmark reports: what was run, on what, and the figures."""

import datetime
import os
import re
from importlib.metadata import version
from pathlib import Path

from pcscale.common.units import format_bytes
from pcscale.memory.process import machine

REPORTS = Path(__file__).parent / "reports"
Row = tuple[str, str, str]
"""What was measured, the figure, and its target or what it is compared with."""


def hardware() -> str:
    """This machine in a file's name: its GPU, or its processor and how many cores there are."""
    found = machine()
    name = found.gpu or f"{found.cpu}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_report(name: str, command: str, text: str, rows: list[Row]) -> Path:
    """Write `<theme>_<hardware>_<date>.md`; a second run on the same day replaces the first."""
    found = machine()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "safetensors"))
    lines = [
        f"# {name}, {today}",
        "",
        text.strip(),
        "",
        f"- Command: `{command}`",
        f"- Machine: {found.cpu}, {found.cores} cores, {format_bytes(found.memory_bytes)} of memory, "
        f"GPU: {found.gpu or 'none (not run on one)'}",
        f"- Libraries: {libraries}",
        "",
        "| | measured | target or comparison |",
        "|---|---|---|",
        *(f"| {what} | {figure} | {target} |" for what, figure, target in rows),
        "",
    ]
    path = REPORTS / f"{name}_{hardware()}_{today}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
