"""Where parts lie with a GPU and without one, and how many ranks share a host."""

import pytest

from pcscale.common.ledger import CONTEXT, GRADIENTS, LIBRARIES, PINNED_BUFFERS, RECORDS, WEIGHTS
from pcscale.memory.deployment import Deployment, Part, total

PARTS = {
    LIBRARIES: Part("host", 1),
    CONTEXT: Part("device", 2),
    WEIGHTS: Part("device", 4),
    PINNED_BUFFERS: Part("pinned", 8),
    GRADIENTS: Part("pinned", 16),
    RECORDS: Part("disk", 32),
    "base on its way": Part("device", 64),
}


def test_parts_add_up_by_placement() -> None:
    assert total(PARTS.values(), "device") == 2 + 4 + 64
    assert total(PARTS.values(), "host", "pinned") == 1 + 8 + 16


def test_on_a_gpu_every_part_stays_where_it_is() -> None:
    assert Deployment().settle(PARTS) == PARTS


def test_without_a_gpu_everything_is_the_host_s_and_nothing_is_on_its_way() -> None:
    assert Deployment(on_gpu=False).settle(PARTS) == {
        LIBRARIES: Part("host", 1),
        WEIGHTS: Part("host", 4),
        GRADIENTS: Part("host", 16),
        RECORDS: Part("disk", 32),
    }


@pytest.mark.parametrize(("ranks", "of_a_host", "sharing"), [(1, None, 1), (8, None, 8), (8, 4, 4), (2, 4, 2)])
def test_ranks_share_their_host_s_memory(ranks: int, of_a_host: int | None, sharing: int) -> None:
    assert Deployment(ranks=ranks, ranks_of_a_host=of_a_host).sharing == sharing
