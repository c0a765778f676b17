"""Steps under DeepSpeed against the slow obvious steps of one process in memory."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_on_ranks
from tests.distributed.stepping import RATES, Case, Stepped, build_bases, compression_of, step_each, steps_of
from tests.projection.parts import copies
from tests.reference import Reference

FLOAT32_TOLERANCE = 1e-3
"""Of a weight's movement, as in one process (tests/projection/test_equivalence.py)."""
BFLOAT16_TOLERANCE = 0.2
"""Of the records' movement, as a root mean square, as there."""
ENGINES = ((0, False), (1, False), (2, False), (2, True), (3, False), (3, True))
"""Stage, and whether what it partitions is offloaded; stage 0 has nothing to offload."""
FLOAT32 = [
    Case(*engine, base_home, accumulation, base)
    for engine, base_home, accumulation, base in itertools.product(
        ENGINES, ("disk", "zero"), (1, 2), ("tied", "untied")
    )
] + [Case(*engine, "zero", 1, "odd") for engine in ENGINES]
BFLOAT16 = [Case(*engine, base_home, 2, "tied", True) for engine in ENGINES[1:] for base_home in ("disk", "zero")]
BFLOAT16 += [Case(*engine, "disk", 1, "odd", True) for engine in ENGINES[1:]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def stepped(request: pytest.FixtureRequest, folders: dict[str, Path]) -> list[dict[Case, Stepped]]:
    """By rank, what all cases left; one start of the processes serves them all."""
    return run_on_ranks(request.param, step_each, FLOAT32 + BFLOAT16, folders)


@cache
def reference(base: str, folder: Path, micro_batches: int) -> Reference:
    """After the steps, with so many micro batches in each."""
    compression = compression_of(base, folder)
    reference = Reference(compression.plan.config, compression.weights, compression.kept, RATES)
    for batches in steps_of(micro_batches):
        reference.step(batches)
    return reference


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_steps_are_those_of_the_reference(
    case: Case, stepped: list[dict[Case, Stepped]], folders: dict[str, Path]
) -> None:
    folder = folders[case.base]
    expected = reference(case.base, folder, case.accumulation * len(stepped))
    start = copies(compression_of(case.base, folder).model())
    composed = {name: weight.detach() for name, weight in expected.composed().items()}
    assert composed.keys() == start.keys()
    for rank in stepped:
        assert min(rank[case].norms) > RATES.max_grad_norm, "clipping has something to do"
        assert rank[case].norms == pytest.approx(expected.norms, rel=FLOAT32_TOLERANCE)
        for name, weight in composed.items():
            movement = (weight - start[name]).abs().max()
            assert movement > 0
            assert (rank[case].weights[name] - weight).abs().max() <= FLOAT32_TOLERANCE * movement, name


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_steps_stay_close_to_the_reference(
    case: Case, stepped: list[dict[Case, Stepped]], folders: dict[str, Path]
) -> None:
    expected = reference(case.base, folders[case.base], case.accumulation * len(stepped))
    leaves = {
        (name, part): leaf.detach()
        for name, matrix in expected.matrices.items()
        for part, own in (("delta_out", matrix.out), ("delta_in", matrix.in_), ("aux", [matrix.aux_oi]))
        for leaf in own
    }
    found = {key: value for rank in stepped for key, value in rank[case].records.items()}
    assert found.keys() == leaves.keys()
    whole = torch.cat([leaves[key].flatten() for key in sorted(leaves)])
    rounded = torch.cat([found[key].flatten() for key in sorted(leaves)])
    assert 0 < (rounded - whole).norm() <= BFLOAT16_TOLERANCE * whole.norm()


@pytest.mark.parametrize("case", FLOAT32[:1] + BFLOAT16[:1], ids=str)
def test_every_record_has_one_owner_and_all_ranks_the_same_weights(
    case: Case, stepped: list[dict[Case, Stepped]]
) -> None:
    owned = [set(rank[case].records) for rank in stepped]
    assert all(owned)
    assert sum(map(len, owned)) == len(set().union(*owned))
    for rank in stepped[1:]:
        assert rank[case].losses == stepped[0][case].losses
        assert all(torch.equal(weight, stepped[0][case].weights[name]) for name, weight in rank[case].weights.items())
