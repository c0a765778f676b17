"""Whole runs on a GPU come to what they come to on processors, wherever state lives and in whatever precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.jobs.compress import compress
from tests.runs import World, build_world, invoke, metrics, run_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("no_plots"),
]

CLOSE = 2e-3
"""Of losses in float32, whose products a GPU sums up in another order, over ten steps."""
CODED = 2e-2
"""Of losses where state is rounded: to bfloat16 at random, or to 8 bits, which a GPU codes by bitsandbytes' search."""
SMALL = {"record_dtype": "bfloat16", "moments": "8bit"}
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "records on the device": ({}, CLOSE),
    "records in host memory": ({"residency": "cpu"}, CLOSE),
    "records in files": ({"residency": "disk"}, CLOSE),
    "gradients in host memory": ({"residency": "cpu", "gradient_home": "cpu"}, CLOSE),
    "4 bytes on the device": (SMALL, CODED),
    "4 bytes in host memory": ({**SMALL, "residency": "cpu"}, CODED),
    "4 bytes in files": ({**SMALL, "residency": "disk"}, CODED),
    "8-bit base": ({"base_precision": "int8"}, CODED),
    "8-bit base on the device": ({"base_precision": "int8", "base_home": "device"}, CODED),
    "base on the device": ({"base_home": "device"}, CLOSE),
    "base in host memory": ({"base_home": "cpu"}, CLOSE),
    "low rank": ({"projection_rank": 4}, CLOSE),
    "hard pruning": ({"method": "hard_prune"}, CLOSE),
    "checkpointed activations": ({"gradient_checkpointing": True}, CLOSE),
    "rescaled": ({"start": "rescaled"}, CLOSE),
    "least squares": ({"start": "least_squares", "importance": "energy"}, CLOSE),
    "rotated": ({"start": "pca"}, CLOSE),
    "rotated, least squares": ({"start": "pca_least_squares", "projection_rates": "per_matrix"}, CLOSE),
    "rotated, least squares, all small": (
        {"start": "pca_least_squares", "base_precision": "int8", **SMALL, "residency": "cpu"},
        CODED,
    ),
    "taught": ({"distill": {"weight": 0.5}}, CLOSE),
    "taught by the most likely": ({"distill": {"weight": 0.5, "top_k": 8}}, CLOSE),
    "bfloat16": ({"bf16": True}, 5e-2),
    "bfloat16, all small, taught": (
        {"bf16": True, "gradient_dtype": "bfloat16", **SMALL, "residency": "cpu", "distill": {"top_k": 8}},
        5e-2,
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_the_device_comes_to_that_on_processors(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tolerance = SETTINGS[name]
    on_device = compress(run_config(world, tmp_path / "device", **settings))
    assert on_device["peak"]["device"]["measured_bytes"] > 0
    with monkeypatch.context() as hidden:
        hidden.setattr(torch.cuda, "is_available", lambda: False)
        on_host = compress(run_config(world, tmp_path / "host", **settings))
    losses = [[row["loss"] for row in metrics(tmp_path / where)] for where in ("device", "host")]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for part in ("base", "start", "compressed"):
        found = [document["evaluation"][part]["loss"] for document in (on_device, on_host)]
        assert found[0] == pytest.approx(found[1], rel=tolerance)
    assert on_device["evaluation"]["compressed"]["loss"] < on_device["evaluation"]["start"]["loss"]
    assert invoke("verify", tmp_path / "device").exit_code == 0


@pytest.mark.parametrize("settings", [{}, {**SMALL, "residency": "cpu", "base_precision": "int8"}])
def test_a_run_that_goes_on_takes_the_steps_of_one_that_did_not_stop(
    settings: dict[str, Any], world: World, tmp_path: Path
) -> None:
    whole = compress(run_config(world, tmp_path / "whole", **settings))
    compress(run_config(world, tmp_path / "parts", **settings, max_steps=10, save_steps=4))
    for folder in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
        folder.rename(tmp_path / folder.name)
    found = compress(run_config(world, tmp_path / "parts", **settings), resume=True)
    assert found["evaluation"]["compressed"]["loss"] == pytest.approx(
        whole["evaluation"]["compressed"]["loss"], rel=CLOSE
    )


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 cannot record its allocator")
def test_a_snapshot_of_the_allocator_is_left_for_the_viewer(world: World, tmp_path: Path) -> None:
    compress(run_config(world, tmp_path / "run", memory_snapshot=True, max_steps=2))
    assert (tmp_path / "run" / "memory_snapshot.pickle").stat().st_size > 0
