"""The tensors in a folder of safetensors shards, read from headers alone: no torch, no weight."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json

_WITH_BITS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U16", "I8", "U8")
ITEM_BYTES = {name: int(name.lstrip("BFIU")) // 8 for name in _WITH_BITS} | {"BOOL": 1}
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place in a file. `start` counts from the beginning of the file. Units: bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the metadata of one safetensors file.

    Raises:
        RequestError: the file is missing, truncated or may not be read, or its header is not one of safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header_bytes = handle.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    except (FileNotFoundError, IsADirectoryError):
        raise RequestError(f"{file} is missing. Fetch or copy it again.") from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror}). Check its permissions and its disk.") from None
    if size < 8 or (0 < length <= _MAX_HEADER_BYTES and len(header_bytes) < length):
        raise RequestError(f"{file} is truncated inside its header ({size} bytes). Fetch or copy it again.")
    try:
        header = json.loads(header_bytes)
        metadata = header.pop("__metadata__", None) or {}  # To the format's own reader null is as good as absent.
        if any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__")
        entries = {name: _entry(name, file, fields, 8 + length) for name, fields in header.items()}
    except RequestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RequestError(f"{file} is not a safetensors file: its header cannot be read.") from None
    end = max((entry.start + entry.num_bytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise RequestError(f"{file} is truncated: {size} bytes, its header says {end}. Fetch or copy it again.")
    return entries, metadata


def _entry(name: str, file: Path, fields: dict, data_start: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if any(not isinstance(number, int) or number < 0 for number in (begin, end, *shape)):
        raise ValueError(name)
    if fields["dtype"] not in ITEM_BYTES:
        raise RequestError(
            f"{file}: {name} has dtype {fields['dtype']}, expected one of {', '.join(ITEM_BYTES)}. "
            "Use the checkpoint in its full precision."
        )
    if end - begin != math.prod(shape) * ITEM_BYTES[fields["dtype"]]:
        raise ValueError(name)
    return TensorEntry(name, file, fields["dtype"], shape, data_start + begin, end - begin)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds a safetensors checkpoint, by file names alone."""
    return (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists()


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder, by name, in the order of its files.

    Raises:
        RequestError: no safetensors, a shard is missing or broken, or the index names absent tensors.
    """
    path = folder / INDEX_NAME
    if path.exists():
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequestError(f"{path} has no weight_map. Fetch or copy it again.")
        if any(not isinstance(shard, str) or Path(shard).name != shard for shard in weight_map.values()):
            raise RequestError(f"{path} names shards outside its folder. Fetch or copy it again.")
        shards = {shard: read_header(folder / shard)[0] for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise RequestError(f"{path} says that {name} is in {shard}, and it is not. Fetch both files again.")
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    if (folder / SINGLE_NAME).exists():
        return read_header(folder / SINGLE_NAME)[0]
    others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.gguf"))
    found = f"; found {others[0]}, which pcscale does not read" if others else ""
    raise RequestError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{found}. Save the model as safetensors.")
