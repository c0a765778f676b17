"""Fixtures of tiny runs."""

from tests.runs import light_runs, no_plots

__all__ = ["light_runs", "no_plots"]
