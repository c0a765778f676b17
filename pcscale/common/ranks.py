"""Work that ranks share: done by the first for all, or by each, with the errors of all known to all."""

from collections.abc import Callable
from typing import TypeVar

from pcscale.common.errors import PcscaleError, PeerFailed
from pcscale.common.topology import Group

Result = TypeVar("Result")


def on_first_rank(group: Group, work: Callable[[], Result]) -> Result:
    """Do the work on the first rank while the others wait; every rank gets its result.

    Raises:
        PeerFailed: the work failed on the first rank; raised on all others.
    """
    return group.gather(on_every_rank(group, work if group.topology.is_first else lambda: None))[0]  # pyright: ignore[reportReturnType]


def on_every_rank(group: Group, work: Callable[[], Result]) -> Result:
    """Do the work on every rank, and go on only if it succeeded on all.

    Raises:
        PeerFailed: another rank failed, and reports why; the first of several does.
    """
    if group.topology.world_size == 1:
        return work()
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    # None: it went well. False: this rank only heard of another one's failure.
    known = None if failed is None else not isinstance(failed, PeerFailed)
    outcomes = group.gather((known, getattr(failed, "exit_code", PcscaleError.exit_code)))
    failures = [(rank, code) for rank, (known, code) in enumerate(outcomes) if known] or [
        (rank, code) for rank, (known, code) in enumerate(outcomes) if known is not None
    ]
    if not failures:
        return result  # pyright: ignore[reportReturnType]
    rank, code = failures[0]
    if rank == group.topology.rank:
        assert failed is not None
        raise failed
    raise PeerFailed(code)
