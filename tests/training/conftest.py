"""Fixtures of tiny runs."""

from tests.runs import config, light_runs, no_plots, run, world

__all__ = ["config", "light_runs", "no_plots", "run", "world"]
