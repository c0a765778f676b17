"""What the ledger has been told in a test, whatever earlier tests left in it."""

import gc

from pcscale.common.ledger import Key, ledger


class Entered:
    """The ledger's entries since this was made."""

    def __init__(self) -> None:
        gc.collect()
        self._before = ledger.held()

    def now(self) -> dict[Key, int]:
        """By home and component; what is as it was is left out."""
        gc.collect()
        found = {key: num_bytes - self._before.get(key, 0) for key, num_bytes in ledger.held().items()}
        return {key: num_bytes for key, num_bytes in found.items() if num_bytes}
