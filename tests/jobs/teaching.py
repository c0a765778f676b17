"""Teachers' folders of tiny bases: how tests make and read them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pcscale.common.console import console
from tests.runs import World, invoke

TOP_K = 8
TEMPERATURE = 1.5
TAUGHT = {"weight": 0.7, "top_k": TOP_K, "temperature": TEMPERATURE}
"""`distill` of a run that is taught by the live base."""
SHARD_SEQUENCES = 12
"""So that the text of a run is four shards."""


def small_shards() -> None:
    """In a process of its own."""
    import pcscale.jobs.teach as module

    module.SHARD_TOKENS = SHARD_SEQUENCES * 24


def teach_arguments(world: World, folder: Path, *more: str) -> list[str | Path]:
    """The command that asks the base about the 40 sequences of a run of `run_values`."""
    arguments = ["teach", world.base, "--data", world.text, "--output", folder, "--sequence-length", "24"]
    kept = ["--top-k", str(TOP_K), "--temperature", str(TEMPERATURE)]
    return [*arguments, *kept, "--tokens", str(40 * 24), *more]


def teach(world: World, folder: Path, *more: str) -> dict[str, Any]:
    """What the command says that it did."""
    outcome = invoke(*teach_arguments(world, folder, *more), "--json")
    assert outcome.exit_code == 0, outcome
    console.configure(quiet=True)  # The command has turned it on, onto streams that are gone now.
    return json.loads(outcome.stdout)


def shards(folder: Path) -> list[dict[str, Any]]:
    """The tensors of each, by safetensors' own reader."""
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
