"""Fixtures of tiny runs on several ranks."""

from tests.training.runs import run, world

__all__ = ["run", "world"]
