"""Fixtures of tiny runs on several ranks."""

from tests.runs import run, world

__all__ = ["run", "world"]
