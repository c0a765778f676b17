"""Refuse Python files that grew past 400 lines: such a file is two files."""

import subprocess
import sys
from pathlib import Path

LIMIT_LINES = 400


def main() -> int:
    names = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    sizes = {name: len(Path(name).read_text().splitlines()) for name in names if Path(name).exists()}
    too_long = {name: lines for name, lines in sizes.items() if lines > LIMIT_LINES}
    for name, lines in too_long.items():
        print(f"{name} has {lines} lines, at most {LIMIT_LINES} are allowed: split it", file=sys.stderr)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
