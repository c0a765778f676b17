"""Merging a synthetic 7B-shaped base (bf16, 5 GB shards) to 1024/2816 with bf16 records without moments, under a cap of
2 GiB, in a process of its own. Time is compared with the larger of its matrix products alone, in a plain loop over
whole float32 matrices, and its bytes at the speed of a plain copy. Everything is made here and deleted after."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.report import Row
from benchmarks.shapes import fill, make_base, noise
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.console import console
from pcscale.common.units import format_bytes, format_seconds
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.families.registry import family_of
from pcscale.families.widths import plan_widths
from pcscale.projection.checkpoint import DIRECT, FIXED
from pcscale.projection.costs import out_side_first
from pcscale.projection.layout import value_shapes
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.writer import ShardWriter, TensorShape, write_tensors

NEEDED_BYTES = 40 * 10**9
SHARD_BYTES = 5 * 10**9
MAX_MEMORY = "2GiB"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
HIDDEN_SIZE, INTERMEDIATE_SIZE = 1024, 2816


def run(scratch: Path) -> list[Row]:
    scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(scratch).free
    if free < NEEDED_BYTES:
        return [("not run: free disk", format_bytes(free), f"{format_bytes(NEEDED_BYTES)} needed")]
    folder = scratch / "merge-7b"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return _measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(folder: Path) -> list[Row]:
    plan = plan_widths(family_of(CONFIG, "benchmark"), CONFIG, HIDDEN_SIZE, INTERMEDIATE_SIZE)
    base_bytes = make_base(folder / "base", CONFIG, SHARD_BYTES)
    record_bytes = _make_checkpoint(folder / "step-00000001", plan, folder / "base")
    copy_rate = _copy_rate(next((folder / "base").glob("model-00001*")), folder / "copy")
    products = _products_seconds(plan)
    command = [sys.executable, "-m", "pcscale", "merge", str(folder / "step-00000001"), "--base", str(folder / "base")]
    command += ["--output", str(folder / "merged"), "--max-memory", MAX_MEMORY, "--json"]
    started = time.perf_counter()
    merged = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    process_seconds = time.perf_counter() - started
    copied = (base_bytes + record_bytes + merged["bytes_written"]) / copy_rate
    again = _products_seconds(plan)
    limit = max((products + again) / 2, copied)
    peak, cap = merged["peak_anonymous_bytes"], merged["max_memory_bytes"]
    return [
        (
            "base / records / merged",
            " / ".join(map(format_bytes, (base_bytes, record_bytes, merged["bytes_written"]))),
            "",
        ),
        ("peak anonymous memory", format_bytes(peak), f"{format_bytes(cap)} + 300 MiB at most"),
        ("merge", format_seconds(merged["seconds"]), f"process start included: {format_seconds(process_seconds)}"),
        ("its products alone, before and after", f"{products:.1f} and {again:.1f} s", ""),
        ("its bytes at the speed of a plain copy", f"{copied:.1f} s", f"{format_bytes(copy_rate)}/s"),
        ("merge over the larger of the two", f"{merged['seconds'] / limit:.2f}", "1.2 at most"),
    ]


def _make_checkpoint(folder: Path, plan: Plan, base: Path) -> int:
    values, files = noise(1e-3), {}
    kept = select(plan, random_scores(plan, seed=0))
    (folder / "records").mkdir(parents=True)
    outer = {FIXED + name: indices for name, indices in kept.items()}
    with console.progress("make records", len(plan.weights), "tensors") as progress:
        for planned in plan.weights:
            progress.advance(1)
            if not planned.is_matrix:
                outer[DIRECT + planned.name] = torch.ones(planned.shape)
                continue
            shapes: dict[str, TensorShape] = {
                name: (torch.bfloat16, shape) for name, shape in value_shapes(planned).items()
            }
            path = folder / record_file(planned.name)
            with ShardWriter(path, shapes) as writer:
                for name in shapes:
                    fill(writer[name], values)
            files[record_file(planned.name)] = fingerprint_file(path)
    files[OUTER_NAME] = write_tensors(folder / OUTER_NAME, outer)
    fingerprints = MappedBase(BaseFolder(base, str(base), None)).check_all()
    Manifest(
        step=1,
        method="projected",
        base_name=str(base),
        base_revision=None,
        base_config=CONFIG,
        base_fingerprints=fingerprints,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        files=files,
    ).write(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _copy_rate(source: Path, target: Path) -> float:
    """Bytes a second of a plain copy, synced."""
    started = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - started
    size = target.stat().st_size
    target.unlink()
    return size / seconds


def _products_seconds(plan: Plan) -> float:
    """The time of all matrix products, from one matrix of each shape (median of three) times how many there are."""
    groups: dict[tuple[tuple[int, ...], ...], list[PlannedWeight]] = {}
    for planned in plan.matrices:
        groups.setdefault((planned.base_shape, planned.shape), []).append(planned)
    return sum(len(group) * _product_seconds(group[0]) for group in groups.values())


def _product_seconds(planned: PlannedWeight) -> float:
    (O, I), (o, i) = planned.base_shape, planned.shape
    W_OI = torch.randn(O, I)
    D_oO = torch.randn(o, O) if planned.projects_out else None
    D_Ii = torch.randn(I, i) if planned.projects_in else None
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        if D_oO is not None and (D_Ii is None or out_side_first((O, I), (o, i))):
            X = D_oO @ W_OI
            X = X if D_Ii is None else X @ D_Ii
        else:
            assert D_Ii is not None
            X = W_OI @ D_Ii
            X = X if D_oO is None else D_oO @ X
        seconds.append(time.perf_counter() - started)
    assert math.prod(X.shape) == o * i
    return sorted(seconds)[1]
