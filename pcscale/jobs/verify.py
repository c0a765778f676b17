"""The job behind `pcscale verify`: whether what a run left behind is what it claims to be."""

from pathlib import Path
from typing import Any

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.config.load import check_values, read_values
from pcscale.merging.verify import check_bytes, check_models
from pcscale.run.folder import RunFolder


def verify(run: Path) -> dict[str, Any]:
    """Check what a run left behind against what it was made from.

    Returns:
        `passed`, and `rows` of (check, found, allowed).

    Raises:
        RequestError: no run, no checkpoint, or a changed file.
    """
    folder = RunFolder(run)
    if not folder.settings.exists():
        raise RequestError(f"{run} is not a run folder: it has no run.yaml.")
    checkpoint = folder.latest_checkpoint()
    if checkpoint is None:
        raise RequestError(f"{run} has no checkpoint yet. Train first.")
    config = check_values(read_values(folder.settings), str(folder.settings))
    merged = folder.merged if folder.merged.exists() and _merged_step(folder) in (None, checkpoint.name) else None
    if merged is None:
        console.warn(f"{folder.merged} is not of the last checkpoint: merged weights were not compared")
    base = MappedBase(resolve_base(config.base))
    manifest, checks = check_bytes(checkpoint, base)
    checks += check_models(checkpoint, manifest, base, merged)
    return {
        "checkpoint": str(checkpoint),
        "passed": all(check.passed for check in checks),
        "checks": {check.name: {"found": check.found, "allowed": check.allowed} for check in checks},
        "rows": [[check.name, f"{check.found:.3g}", f"{check.allowed:.3g}"] for check in checks],
    }


def _merged_step(folder: RunFolder) -> str | None:
    """The checkpoint that `merged` was made from; None: nobody wrote it down."""
    return read_json(folder.merge_result).get("checkpoint") if folder.merge_result.exists() else None
