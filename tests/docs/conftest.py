"""Fixtures of tiny runs."""

from tests.runs import light_runs

__all__ = ["light_runs"]
