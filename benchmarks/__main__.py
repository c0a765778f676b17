"""`python -m benchmarks [NAME …]`: run benchmarks and write their dated reports into benchmarks/reports/."""

import argparse
import os
from pathlib import Path

from benchmarks import (
    budget,
    demo,
    gpu,
    memory,
    memory_plan,
    merge_7b,
    plan_time,
    ranks,
    state_quality,
    step_time,
    sweep_time,
    tracker,
)
from benchmarks.quality import compare
from benchmarks.quality.arms import BRIEF, LONG, LONGEST, SHORT, WIDTHS
from benchmarks.report import write_report
from pcscale.common.console import console

BENCHMARKS = {
    "plan": (plan_time.__doc__, plan_time.run),
    "step": (step_time.__doc__, step_time.run),
    "sweep": (sweep_time.__doc__, sweep_time.run),
    "merge": (merge_7b.__doc__, merge_7b.run),
    "demo": (demo.__doc__, demo.run),
    "memory-1b": (memory.__doc__, memory.run_1b),
    "memory-8b": (memory.__doc__, memory.run_8b),
    "memory-plan": (memory_plan.__doc__, memory_plan.run),
    "budget": (budget.__doc__, budget.run),
    "tracker": (tracker.__doc__, tracker.run),
    "state-quality": (state_quality.__doc__, state_quality.run),
    "quality": (compare.about(SHORT), compare.run_short),
    "quality-recipe": (compare.about(BRIEF), compare.run_brief),
    "quality-widths": (compare.about(WIDTHS), compare.run_widths),
    "quality-long": (compare.about(LONG), compare.run_long),
    "quality-longest": (compare.about(LONGEST), compare.run_longest),
    "ranks": (ranks.__doc__, ranks.run),
    "gpu": (gpu.__doc__, gpu.run),
}


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # As the command line does.
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/benchmarks"), help="where large files are made")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    console.configure(quiet=False)
    for name in arguments.names or BENCHMARKS:
        text, run = BENCHMARKS[name]
        print(write_report(name, f"python -m benchmarks {name}", text or "", run(arguments.scratch)))


if __name__ == "__main__":
    main()
