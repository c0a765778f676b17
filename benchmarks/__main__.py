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
from benchmarks.report import write_report
from pcscale.common.console import console

BENCHMARKS = {
    "plan": (plan_time, plan_time.run),
    "step": (step_time, step_time.run),
    "sweep": (sweep_time, sweep_time.run),
    "merge": (merge_7b, merge_7b.run),
    "demo": (demo, demo.run),
    "memory-1b": (memory, memory.run_1b),
    "memory-8b": (memory, memory.run_8b),
    "memory-plan": (memory_plan, memory_plan.run),
    "budget": (budget, budget.run),
    "tracker": (tracker, tracker.run),
    "state-quality": (state_quality, state_quality.run),
    "quality": (compare, compare.run_short),
    "quality-recipe": (compare, compare.run_brief),
    "quality-widths": (compare, compare.run_widths),
    "quality-long": (compare, compare.run_long),
    "quality-longest": (compare, compare.run_longest),
    "ranks": (ranks, ranks.run),
    "gpu": (gpu, gpu.run),
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
        module, run = BENCHMARKS[name]
        print(write_report(name, f"python -m benchmarks {name}", module.__doc__ or "", run(arguments.scratch)))


if __name__ == "__main__":
    main()
