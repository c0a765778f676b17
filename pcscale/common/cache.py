"""The folder for things that are made once for all runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of fetched models and measurements: `$PCSCALE_CACHE`, or pcscale's part of the user's cache."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcscale"
    return Path(os.environ.get("PCSCALE_CACHE") or fallback)
