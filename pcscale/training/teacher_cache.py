"""Teacher targets in a folder: the base's most likely next tokens of a text, for every run on that text.

    TEACHER_FOLDER/  teacher.json  shard-00000.safetensors …

A shard holds `keys` [N, 16], `ids` and `log_probabilities` [N, T, k]. A sequence is found by the hash of its token ids,
so the order, the batches, the epochs and the ranks are those of each run (docs/decisions/0015).

Legend: N sequences, T tokens of a sequence, k most likely tokens.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.files import read_json, write_json
from pcscale.common.sizes import token_bytes
from pcscale.config.schema import DistillConfig
from pcscale.run.documents import checked
from pcscale.run.manifest import Manifest
from pcscale.storage.hashing import fingerprint, fingerprint_file
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import write_tensors

TEACHER_NAME = "teacher.json"
FORMAT_VERSION = 1
LOG_DTYPE = torch.float16
"""Dtype of logarithms of probabilities: a relative error of 2^-11, and none below its range matters."""
KEYS, IDS, LOG_PROBABILITIES = "keys", "ids", "log_probabilities"
OPEN_SHARDS = 64
"""Shards that stay mapped, those used last: each takes one of the some 1,000 files that a process may have open."""

SequenceAddress = tuple[str, int]
"""A shard, and the row of a sequence in it."""


def sequence_key(ids_T: torch.Tensor) -> bytes:
    """The key of a sequence: a hash of its token ids as int32."""
    return bytes.fromhex(fingerprint(ids_T.int().contiguous().numpy().data))


@dataclass(frozen=True)
class TeacherManifest:
    """The contents of teacher.json.

    Attributes:
        base_name, base_revision, base_config, base_fingerprints: as in a checkpoint's manifest.
        temperature: divisor of logits before the softmax.
        dtype: of the base's pass.
        shards: fingerprints of the files, by name.
    """

    base_name: str
    base_revision: str | None
    base_config: dict[str, Any]
    base_fingerprints: dict[str, str]
    sequence_length: int
    top_k: int
    temperature: float
    dtype: str
    shards: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> "TeacherManifest":
        """The manifest of a teacher's folder; another folder, or one of another format, is refused."""
        path = folder / TEACHER_NAME
        if not path.is_file():
            raise RequestError(f"{folder} holds no {TEACHER_NAME}. Fill it with `pcscale teach`, or name one that is.")
        values = read_json(path)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise RequestError(f"{folder} has teacher format {version!r}, this version reads {FORMAT_VERSION}.")
        found = checked(values, cls, str(path), "The file was changed.")
        if any(Path(name).name != name for name in found.shards):
            raise RequestError(f"{path} names shards outside its folder. The file was changed.")
        return found

    def write(self, folder: Path) -> None:
        write_json(folder / TEACHER_NAME, dataclasses.asdict(self))

    def check(self, folder: Path, base: MappedBase, **wanted: tuple[str, Any]) -> None:
        """Refuse a folder that was made from another base, or in another way: with another value of an attribute in
        `wanted`, which gives each one's setting and value.
        """
        if self.base_config != base.config:
            raise RequestError(
                f"{folder} was made from {self.base_name}, whose config.json is not that of {base.folder}. "
                "Use the same base and revision, or name another folder."
            )
        for attribute, (setting, value) in wanted.items():
            found = getattr(self, attribute)
            if found != value:
                raise RequestError(
                    f"{setting} is {value}, {folder} was made with {found}. Set that, or name another folder."
                )


class TeacherCache:
    """A teacher's folder, to be read. Memory: file-backed."""

    def __init__(self, folder: Path, manifest: TeacherManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shard = lru_cache(OPEN_SHARDS)(lambda name: TensorReader(read_header(folder / name)[0]))

    def check(self, remedy: str) -> None:
        """Refuse a folder of which a file is missing or has another fingerprint; `remedy` ends the message."""
        with console.progress("check teacher", len(self.manifest.shards), "files") as progress:
            for name, expected in self.manifest.shards.items():
                path = self.folder / name
                if not path.is_file():
                    raise RequestError(f"{path} is missing. {remedy}")
                if fingerprint_file(path) != expected:
                    raise RequestError(f"{path} is not what was written (its fingerprint differs). {remedy}")
                progress.advance(1)

    def addresses(self) -> Iterator[tuple[bytes, SequenceAddress]]:
        """Every sequence's key and address."""
        for name in self.manifest.shards:
            for row, key_16 in enumerate(self._shard(name).tensor(KEYS).numpy()):
                yield key_16.tobytes(), (name, row)

    def targets(self, address: SequenceAddress, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and logarithms of the most likely tokens after each of a sequence, `[T, k]`: views, in stored dtypes."""
        name, row = address
        ids_NTk, log_p_NTk = (self._shard(name).tensor(tensor) for tensor in (IDS, LOG_PROBABILITIES))
        return ids_NTk[row, :, :top_k], log_p_NTk[row, :, :top_k]


def open_cache(
    distill: DistillConfig, sequence_length: int, base: MappedBase, manifest: Manifest | None
) -> TeacherCache:
    """The cache that a run is taught from, whose base is compared as it is read, or with `manifest`, that of the
    checkpoint that the run goes on from.

    Raises:
        RequestError: there is no such cache, or it is of another base, or made in another way.
    """
    assert distill.cache is not None
    assert distill.top_k is not None
    folder = Path(distill.cache).expanduser()
    found = TeacherManifest.read(folder)
    temperature = ("distill.temperature", distill.temperature)
    found.check(folder, base, sequence_length=("sequence_length", sequence_length), temperature=temperature)
    if distill.top_k > found.top_k:
        raise RequestError(
            f"distill.top_k is {distill.top_k}, {folder} holds the {found.top_k} most likely tokens. "
            "Set at most that, or name another folder."
        )
    if manifest is None:
        base.expect(found.base_fingerprints, f"that {folder} was made from")
    elif manifest.base_fingerprints != found.base_fingerprints:
        raise RequestError(
            f"{folder} was made from other weights than the base that this run began with. Name another folder."
        )
    return TeacherCache(folder, found)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(
    path: Path, ids_NT: torch.Tensor, targets: list[tuple[torch.Tensor, torch.Tensor]], vocab_size: int
) -> str:
    """Write the targets of sequences, by batch ids and logarithms `[B, T, k]`; returns the file's fingerprint."""
    keys_N16 = torch.frombuffer(bytearray(b"".join(map(sequence_key, ids_NT))), dtype=torch.uint8)
    id_dtype = torch.uint16 if token_bytes(vocab_size) == 2 else torch.int32
    lowest = torch.finfo(LOG_DTYPE).min
    tensors = {
        KEYS: keys_N16.view(len(ids_NT), -1),
        IDS: torch.cat([top_BTk.to(id_dtype) for top_BTk, _ in targets]),
        LOG_PROBABILITIES: torch.cat([log_p_BTk.clamp_min(lowest).to(LOG_DTYPE) for _, log_p_BTk in targets]),
    }
    return write_tensors(path, tensors, {"format": "pt"})
