"""Fixtures of tiny runs."""

from tests.training.runs import light_runs, silent_console

__all__ = ["light_runs", "silent_console"]
