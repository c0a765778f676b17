"""One thread for these tests."""

from tests.projection.parts import one_thread as one_thread
