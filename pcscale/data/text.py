"""Documents, streamed one at a time from files, globs or a Hub data set, through the `datasets` library.

A source is a file if it is an existing path, holds a glob sign or has a known extension; else it is a Hub data set.
"""

import glob
import gzip
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError, kind_and_reason

_GLOB_SIGN = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# NotImplementedError: pyarrow raises a kind of it for a parquet encoding or compression that it cannot read.
_BROKEN_FILE = (ValueError, OSError, EOFError, NotImplementedError, RecursionError, zlib.error)
# A row group may hold a gigabyte of text; this many rows at a time are enough for speed.
_PARQUET_ROWS = 256


def documents(sources: list[str]) -> Iterator[str]:
    """Every document of the sources, in their order; the files of a glob are sorted by name. Empty ones are skipped.

    A `.txt` file is one document; a `.jsonl` or `.json` file has one in the field `text` of each object, a `.parquet`
    file one in each row of its column `text`. Each may be gzipped. A Hub data set is read from its split `train`.

    Args:
        sources: files, globs, or Hub data set ids (`owner/name` or `owner/name:config`).

    Raises:
        RequestError: a source is missing, unreachable, broken, of an unknown kind, or has no `text`.

    Memory: one file's text where the file is one document; otherwise some megabytes.
    """
    found = [(source, _files(source)) for source in sources]
    # datasets leaves a lock file for each source in its cache, even when it streams: this cache goes away again.
    with tempfile.TemporaryDirectory(prefix="pcscale-text-") as scratch:
        for source, files in found:
            if files is None:
                yield from _texts(_hub_rows(source), f"The Hub data set {source}")
            else:
                for file in files:
                    yield from _texts(_file_rows(file, Path(scratch)), str(file))


def describe(sources: list[str]) -> list[dict[str, str | int]]:
    """The key of sources in a token cache: a file's path, size and time of change; a Hub data set's name.

    Raises:
        RequestError: a source is missing or of an unknown kind.
    """
    descriptions: list[dict[str, str | int]] = []
    for source in sources:
        files = _files(source)
        if files is None:
            descriptions.append({"hub": source})
        for file in files or ():
            status = file.stat()
            descriptions.append({"path": str(file), "bytes": status.st_size, "changed_ns": status.st_mtime_ns})
    return descriptions


def _files(source: str) -> list[Path] | None:
    """The files that a source stands for, all of a known kind; None: it is a Hub data set."""
    path = Path(source)
    if path.is_dir():
        raise RequestError(f"{source} is a folder, and text comes from files. Write {source.rstrip('/')}/*.txt.")
    if path.exists():
        files = [path]
    elif _GLOB_SIGN.search(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]  # noqa: PTH207
        if not files:
            raise RequestError(f"{source} matches no file. Correct the pattern.")
    elif _extension(path) not in _READERS and _HUB_ID.fullmatch(source):
        return None
    else:
        raise RequestError(f"{source} does not exist. Name a file, a glob or a Hub data set (owner/name).")
    unknown = next((file for file in files if _extension(file) not in _READERS), None)
    if unknown is not None:
        known = ", ".join(_READERS)
        raise RequestError(f"{unknown} is of an unknown kind. Known are {known}, each also with .gz after it.")
    return files


def _extension(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _texts(rows: Iterator[Any], where: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row, dict):
            raise RequestError(f"{where} holds {type(row).__name__}, expected objects with a field `text`. Correct it.")
        if "text" not in row:
            raise RequestError(f"{where} has no column `text`, only {', '.join(row)}. Rename the one with the text.")
        text = row["text"]
        if not isinstance(text, str | None):
            raise RequestError(f"{where} has {type(text).__name__} in `text`, expected str. Correct it.")
        if text and not text.isspace():
            yield text


def silence_datasets() -> None:
    """Keep the datasets library from showing progress and errors: pcscale shows its own."""
    import datasets.config

    # It counts each use with a web request, for local files too; without a network that waits for seconds.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


def _load(path: str, **options: Any) -> Any:
    import datasets

    silence_datasets()
    return datasets.load_dataset(path, split="train", streaming=True, **options)


def _hub_rows(source: str) -> Iterator[Any]:
    path, _, config = source.partition(":")
    try:
        yield from _load(path, name=config or None)
    except Exception as error:
        raise RequestError(
            f"The Hub data set {source} cannot be read ({kind_and_reason(error)}). "
            "Check its name and the network; there is no file of this name either."
        ) from error


def _file_rows(file: Path, scratch: Path) -> Iterator[Any]:
    try:
        yield from _READERS[_extension(file)](file, scratch)
    except _BROKEN_FILE as error:
        reason = kind_and_reason(error)
        raise RequestError(f"{file} cannot be read ({reason}). Restore the file or leave it out.") from error


def _load_file(builder: str, file: Path, scratch: Path, **options: Any) -> Any:
    data_files = [glob.escape(str(file.absolute()))]
    return _load(builder, data_files=data_files, cache_dir=str(scratch / "cache"), **options)


def _json_rows(file: Path, scratch: Path) -> Iterator[Any]:
    # Not the builder "json": it infers a type for every column, fails where a later one differs, and turns dates in
    # `text` into numbers.
    lines = (row["text"] for row in _load_file("text", file, scratch))
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.lstrip().startswith("["):
            yield from json.loads("\n".join([line, *lines]))
        elif line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            yield row


def _parquet_rows(file: Path, scratch: Path) -> Iterator[Any]:
    if file.suffix == ".gz":
        # Parquet is read from its end, which a gzip stream has no way to.
        plain = scratch / "plain.parquet"
        with gzip.open(file) as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        file = plain
    columns = _load_file("parquet", file, scratch).column_names
    if "text" not in columns:
        yield dict.fromkeys(columns)  # for the error that names them
        return
    yield from _load_file("parquet", file, scratch, columns=["text"], batch_size=_PARQUET_ROWS)


_READERS: dict[str, Callable[[Path, Path], Iterable[Any]]] = {
    ".txt": partial(_load_file, "text", sample_by="document"),
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
