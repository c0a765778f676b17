"""`pcscale demo` from nothing but the fetched base: its time, its memory and its held-out losses."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Row
from pcscale.common.units import format_bytes, format_seconds


def run(scratch: Path) -> list[Row]:
    output = scratch / "demo"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pcscale", "demo", "--output", str(output)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    report = json.loads((output / "report.json").read_text())
    peak = report["peak"]["host_anonymous"]
    evaluation = report["evaluation"]
    rows = [
        ("time, installation aside", format_seconds(seconds), "10:00 at most"),
        ("peak anonymous memory", format_bytes(peak["measured_bytes"]), "6 GiB at most"),
        ("predicted peak", format_bytes(peak["predicted_bytes"]), ""),
        ("kept share of parameters", f"{report['plan']['compressed']['keep_fraction']:.3f}", "about half"),
    ]
    for name, label in (("base", "base"), ("start", "start"), ("compressed", "compressed")):
        result = evaluation[name]
        figure = f"{result['loss']:.3f} nats, perplexity {result['perplexity']:.1f}"
        rows.append((f"held-out loss: {label}", figure, f"{result['parameters'] / 1e6:.1f} M parameters"))
    for phase, usage in report["phases"].items():
        if usage["seconds"] is not None:
            memory = format_bytes(usage["host_anonymous"]["measured_bytes"])
            rows.append((f"phase {phase}", f"{format_seconds(usage['seconds'])}, {memory}", ""))
    return rows
