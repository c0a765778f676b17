"""One thread for these tests, and the fixtures that some of them share."""

import gc
from collections.abc import Iterator

import pytest

from tests.memory.trees import tree as tree
from tests.memory.trees import warnings as warnings
from tests.projection.parts import one_thread as one_thread


@pytest.fixture(scope="package", autouse=True)
def imported_objects_stay() -> Iterator[None]:
    """Tests that look at what is held collect garbage often; what libraries have made by now is never any."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
