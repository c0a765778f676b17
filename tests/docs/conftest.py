"""Fixtures of tiny runs."""

from tests.training.runs import light_runs

__all__ = ["light_runs"]
