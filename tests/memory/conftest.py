"""One thread for these tests, and the fixtures that some of them share."""

from tests.memory.trees import tree as tree
from tests.memory.trees import warnings as warnings
from tests.projection.parts import one_thread as one_thread
