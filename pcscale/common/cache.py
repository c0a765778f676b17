"""Where pcscale keeps what is made once for all runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where fetched models and measurements of the machine stay: `$PCSCALE_CACHE`, or our part of the user's cache."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcscale"
    return Path(os.environ.get("PCSCALE_CACHE") or fallback)
