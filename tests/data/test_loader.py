"""The data order is a pure function of the step."""

import pytest
import torch

from pcscale.common.topology import Topology
from pcscale.data.loader import sequence_order, step_batches


def seen(train_NT: torch.Tensor, steps: int, sequences_per_step: int, batch_size: int, seed: int = 0) -> list[int]:
    """The first token of every sequence, in the order in which a run of so many steps sees them."""
    return [
        int(row_T[0])
        for step in range(1, steps + 1)
        for batch_BT in step_batches(train_NT, step, sequences_per_step, batch_size, seed)
        for row_T in batch_BT
    ]


def numbered(num_sequences: int) -> torch.Tensor:
    """Sequences of three tokens; sequence n holds n, n + 100, n + 200."""
    return torch.arange(num_sequences, dtype=torch.int32)[:, None] + torch.tensor([0, 100, 200], dtype=torch.int32)


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): sequence_order(50, seed, epoch).tolist() for seed in (0, 1, 2**32) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_an_order_stays_what_it_was_in_earlier_versions() -> None:
    assert sequence_order(8, 0, 0).tolist() == [4, 1, 6, 0, 5, 7, 3, 2]
    assert sequence_order(8, 2**63 - 1, 7).tolist() == [1, 0, 5, 6, 3, 2, 4, 7]


def test_batches_are_whole_sequences_as_int64() -> None:
    batches = list(step_batches(numbered(10), step=1, sequences_per_step=6, batch_size=3, seed=0))
    assert [tuple(batch_BT.shape) for batch_BT in batches] == [(3, 3), (3, 3)]
    assert all(batch_BT.dtype == torch.int64 for batch_BT in batches)
    for batch_BT in batches:
        assert torch.equal(batch_BT, batch_BT[:, :1] + torch.tensor([0, 100, 200]))


def test_an_epoch_shows_every_sequence_once_in_its_order() -> None:
    order = seen(numbered(12), steps=6, sequences_per_step=4, batch_size=2, seed=3)
    assert order[:12] == sequence_order(12, 3, 0).tolist()
    assert order[12:] == sequence_order(12, 3, 1).tolist()


def test_a_step_may_reach_over_several_epochs() -> None:
    order = seen(numbered(3), steps=1, sequences_per_step=8, batch_size=8)
    assert order == [n for epoch in range(3) for n in sequence_order(3, 0, epoch).tolist()][:8]


def test_equal_products_of_batch_and_accumulation_see_the_same_order() -> None:
    train_NT = numbered(10)
    orders = [seen(train_NT, steps=5, sequences_per_step=6, batch_size=size) for size in (1, 2, 3, 6)]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 3), (3, 2), (2, 1), (6, 1)])
def test_ranks_take_the_batches_of_one_process_in_turn(ranks: int, batch_size: int) -> None:
    train_NT = numbered(10)
    for step in (1, 4):
        alone = list(step_batches(train_NT, step, 6, batch_size, 0))
        for rank in range(ranks):
            found = list(step_batches(train_NT, step, 6, batch_size, 0, Topology(rank, ranks)))
            assert len(found) == 6 // (ranks * batch_size)
            assert all(torch.equal(one, other) for one, other in zip(found, alone[rank::ranks], strict=True))


def test_a_later_step_needs_no_earlier_one() -> None:
    train_NT = numbered(10)
    whole = seen(train_NT, steps=7, sequences_per_step=4, batch_size=2)
    last = [int(row_T[0]) for batch_BT in step_batches(train_NT, 7, 4, 2, seed=0) for row_T in batch_BT]
    assert last == whole[24:]


def test_a_batch_size_that_does_not_divide_leaves_a_smaller_last_batch() -> None:
    sizes = [len(batch_BT) for batch_BT in step_batches(numbered(9), 1, sequences_per_step=5, batch_size=2, seed=0)]
    assert sizes == [2, 2, 1]


def test_a_permutation_is_made_once_an_epoch() -> None:
    sequence_order.cache_clear()
    seen(numbered(20), steps=10, sequences_per_step=4, batch_size=2)
    assert sequence_order.cache_info().misses == 2


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (10, 10), (25, 10)])
def test_what_a_run_sees_is_each_sequence_of_its_steps_once(count: int, expected: int) -> None:
    train_NT = numbered(10)
    found = sequence_order(10, seed=3, epoch=0)[:count].tolist()
    steps = [batch for step in range(1, count + 1) for batch in step_batches(train_NT, step, 1, 1, seed=3)]
    assert len(found) == expected
    assert {int(train_NT[row, 0]) for row in found} == {int(batch_BT[0, 0]) for batch_BT in steps}
