"""The manifest of a checkpoint, which binds its files to each other and to the base."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json, write_json
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.run.documents import checked
from pcscale.storage.hashing import fingerprint_file

MANIFEST_NAME = "manifest.json"
OUTER_NAME = "outer.safetensors"
RECORDS_NAME = "records"
TRAINER_NAME = "trainer.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        step: optimizer steps done.
        method: `projected` or `hard_prune`.
        base_name, base_revision: how the base was named; the Hub's commit, None for a local folder.
        base_config: the base's config.json.
        base_fingerprints: fingerprint of every base weight, by tensor name.
        hidden_size, intermediate_size: the compressed model's widths.
        files: fingerprints of the checkpoint's tensor files, by path below its folder.
        projection_rank: rank of D; None: D is kept whole.
        coded_fingerprints: fingerprints of the 8-bit codes of the base's matrices, by name; empty: training saw them as
            stored.
    """

    step: int
    method: Literal["projected", "hard_prune"]
    base_name: str
    base_revision: str | None
    base_config: dict[str, Any]
    base_fingerprints: dict[str, str]
    hidden_size: int
    intermediate_size: int
    files: dict[str, str]
    projection_rank: int | None = None
    coded_fingerprints: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def plan(self) -> Plan:
        """The plan of the compressed model."""
        family = family_of(self.base_config, MANIFEST_NAME)
        return Plan(family, self.base_config, self.hidden_size, self.intermediate_size)

    def write(self, folder: Path) -> None:
        """Write manifest.json into a checkpoint folder."""
        write_json(folder / MANIFEST_NAME, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint folder.

        Raises:
            RequestError: the folder is no checkpoint, or one of another format.
        """
        if not (folder / MANIFEST_NAME).is_file():
            raise RequestError(
                f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}. Name a step-… folder of a run."
            )
        values = read_json(folder / MANIFEST_NAME)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise RequestError(f"{folder} has checkpoint format {version!r}, this version reads {FORMAT_VERSION}.")
        return checked(values, cls, str(folder / MANIFEST_NAME), "The file was changed.")

    def file(self, folder: Path, name: str) -> Path:
        """The path of a tensor file, after its bytes were found to be those that were written.

        Raises:
            RequestError: the file is missing or changed.
        """
        path = folder / name
        if name not in self.files or not path.is_file():
            raise RequestError(f"{path} is missing from the checkpoint. Use another checkpoint.")
        if fingerprint_file(path) != self.files[name]:
            raise RequestError(f"{path} is not what was written (its fingerprint differs). Use another checkpoint.")
        return path


def record_file(name: str) -> str:
    """The path of a matrix's record below the checkpoint folder."""
    return f"{RECORDS_NAME}/{name}.safetensors"
