"""What tests of the store share: one whose records are filled with their positions, visits and a step."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.model.loss import NextTokenLoss
from pcscale.projection.layout import RecordFormat, record_bytes
from pcscale.projection.owners import Round
from pcscale.projection.residency import State
from pcscale.projection.store import RecordStore
from pcscale.projection.sweep import ProjectedAdamW
from tests.optimizers import PUBLISHED_FORMAT
from tests.projection.parts import CPU, Compression, TinyBase, token_batches


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


def alone(names: Iterable[str]) -> list[Round]:
    """The rounds of one process that visits these."""
    return [(name,) for name in names]


def largest_record(compression: Compression, form: RecordFormat = PUBLISHED_FORMAT) -> int:
    return max(record_bytes(planned, form) for planned in compression.plan.matrices)


def all_records(compression: Compression, form: RecordFormat = PUBLISHED_FORMAT) -> int:
    return sum(record_bytes(planned, form) for planned in compression.plan.matrices)


@pytest.fixture
def a_store(compression: Compression, tmp_path: Path) -> Callable[..., RecordStore]:
    """`a_store(home, pinned_bytes)`: every record is filled with its position. With turns and rank: one of several."""

    def make(
        home: Any, pinned_bytes: int | None = None, turns: list[Round] | None = None, rank: int = 0
    ) -> RecordStore:
        matrices = list(compression.plan.matrices)
        residency = State(home, tmp_path / "residency", pinned_bytes)
        turns = turns or alone(planned.name for planned in matrices)
        store = RecordStore(matrices, turns, rank, RecordFormat(), compression.kept, compression.base, residency, CPU)
        for position, name in enumerate(store):
            layout = store.layouts[name]
            store.residency.create(
                name, {part: torch.full(spec.shape, float(position)) for part, spec in layout.items()}
            )
        return store

    return make


def least(home: str, compression: Compression, form: RecordFormat = PUBLISHED_FORMAT) -> int:
    """The least pinned memory that a home works with."""
    if home == "disk":
        return largest_record(compression, form)
    # Each may be followed by a little room, so that the next begins where every dtype may begin.
    return all_records(compression, form) + 512 * len(list(compression.plan.matrices))


def values(store: RecordStore, name: str) -> set[float]:
    """Everything that a record holds."""
    return {value for tensor in store[name].tensors().values() for value in tensor.unique().tolist()}


def visit_all(store: RecordStore, change: bool = True, amount: float = 100.0) -> list[str]:
    """Add `amount` to everything; returns whom was visited."""
    visited = []
    with store.visits(alone(store), change) as visits:
        for visit in visits:
            for tensor in visit.record.tensors().values():
                tensor += amount
            visited.append(visit.planned.name)
    return visited


def one_step(compression: Compression, optimizer: ProjectedAdamW, model: torch.nn.Module, seed: int = 5) -> None:
    NextTokenLoss(model)(token_batches(1, seed=seed)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
