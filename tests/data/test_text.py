"""Documents: every kind of file, globs, Hub data sets, and what is said when one of them cannot be read."""

import gzip
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from pcscale.common.errors import RequestError
from pcscale.data.text import describe, documents


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_gzipped(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data))
    return path


def error_of(*sources: str | Path) -> str:
    with pytest.raises(RequestError) as caught:
        list(documents([str(source) for source in sources]))
    return str(caught.value)


def test_a_txt_file_is_one_document_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße\n\nsecond paragraph\n", encoding="utf-8")
    assert list(documents([str(tmp_path / "a.txt")])) == ["Grüße\n\nsecond paragraph\n"]


@pytest.mark.parametrize("extension", [".jsonl", ".json"])
def test_json_lines_give_the_field_text_of_each_object(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a{extension}"
    path.write_text('{"text": "one", "id": 1}\n\n{"id": "x", "text": "Grüße\\nthere"}\n', encoding="utf-8")
    assert list(documents([str(path)])) == ["one", "Grüße\nthere"]


def test_a_json_array_of_objects_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    assert list(documents([str(path)])) == ["one", "two"]


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "2020-01-01"}\n')
    assert list(documents([str(tmp_path / "a.jsonl")])) == ["2020-01-01"]


def test_a_json_field_may_change_its_type_after_many_megabytes(tmp_path: Path) -> None:
    text = "x" * 400
    lines = [json.dumps({"text": text, "note": None})] * 27_000 + [json.dumps({"text": text, "note": {"a": 1}})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert sum(1 for _ in documents([str(tmp_path / "a.jsonl")])) == 27_001


def test_parquet_gives_its_column_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["one", "two"]})
    assert list(documents([str(path)])) == ["one", "two"]


def test_gzipped_files_read_like_plain_ones(tmp_path: Path) -> None:
    plain = write_parquet(tmp_path / "a.parquet", {"text": ["from parquet"]})
    sources = [
        write_gzipped(tmp_path / "a.txt.gz", "Grüße\nthere".encode()),
        write_gzipped(tmp_path / "a.jsonl.gz", b'{"text": "from jsonl"}\n'),
        write_gzipped(tmp_path / "a.json.gz", b'[{"text": "from json"}]'),
        write_gzipped(tmp_path / "a.parquet.gz", plain.read_bytes()),
    ]
    expected = ["Grüße\nthere", "from jsonl", "from json", "from parquet"]
    assert list(documents([str(source) for source in sources])) == expected


def test_empty_documents_are_skipped_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "kept"}\n')
    (tmp_path / "d.jsonl").write_text("")
    write_parquet(tmp_path / "e.parquet", {"text": ["", None, "kept too"]})
    assert list(documents([str(tmp_path / "*")])) == ["kept", "kept too"]


def test_sources_keep_their_order_and_a_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert list(documents([str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")])) == ["c", "a", "b"]


def test_two_stars_reach_into_every_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("top")
    (tmp_path / "deep" / "deeper" / "b.txt").write_text("bottom")
    assert list(documents([str(tmp_path / "**" / "*.txt")])) == ["top", "bottom"]
    assert list(documents([str(tmp_path / "**")])) == ["top", "bottom"]


def test_a_name_with_glob_signs_is_taken_literally_where_it_exists(tmp_path: Path) -> None:
    (tmp_path / "part[1]*.txt").write_text("literal")
    (tmp_path / "part1.txt").write_text("matched")
    assert list(documents([str(tmp_path / "part[1]*.txt")])) == ["literal"]


def test_relative_paths_start_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert list(documents(["text/a.txt"])) == list(documents(["text/*.txt"])) == ["here"]


def test_reading_leaves_nothing_behind_and_shows_no_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    cache.mkdir()
    scratch.mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    datasets.enable_progress_bars()
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("text")
    plain = write_parquet(tmp_path / "a.parquet", {"text": ["text"]})
    write_gzipped(tmp_path / "a.parquet.gz", plain.read_bytes())
    assert set(documents([str(tmp_path / "*.*")])) == {"text"}
    reader = documents([str(tmp_path / "*.*")])
    next(reader)
    assert list(scratch.iterdir())
    reader.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not list(cache.iterdir())
    assert not list(scratch.iterdir())
    assert datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_local_files_are_read_without_a_web_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    monkeypatch.setattr("datasets.load.get_session", lambda: requests.append("session"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: requests.append("socket"))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text('{"text": "two"}')
    write_parquet(tmp_path / "a.parquet", {"text": ["three"]})
    assert list(documents([str(tmp_path / "a.*")])) == ["two", "three", "one"]
    assert not requests


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'a.txt'} does not exist" in error_of(tmp_path / "a.txt")
    assert "corpus does not exist. Name a file, a glob or a Hub data set (owner/name)." in error_of("corpus")


def test_all_sources_are_looked_for_before_the_first_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("there")
    with pytest.raises(RequestError, match=r"b\.txt does not exist"):
        next(documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))


def test_a_glob_without_matches_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "*.txt") == f"{tmp_path / '*.txt'} matches no file. Correct the pattern."


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    expected = f"{tmp_path / 'a.csv'} is of an unknown kind. Known are .txt, .jsonl, .json, .parquet, each also with"
    assert expected in error_of(tmp_path / "a.csv")
    assert expected in error_of(tmp_path / "*.csv")


def test_a_folder_is_refused_with_the_glob_to_write(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"{tmp_path} is a folder, and text comes from files. Write {tmp_path}/*.txt."


def test_a_missing_text_column_is_named_with_those_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    plain = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    packed = write_gzipped(tmp_path / "b.parquet.gz", plain.read_bytes())
    for path in (tmp_path / "a.jsonl", plain, packed):
        assert error_of(path) == f"{path} has no column `text`, only body, id. Rename the one with the text."


def test_json_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"just a string"\n')
    assert "a.jsonl holds str, expected objects with a field `text`. Correct it." in error_of(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    assert "b.jsonl has int in `text`, expected str. Correct it." in error_of(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", "é".encode("latin-1"), "UnicodeDecodeError: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', "ValueError: line 2, column 9: Expecting value"),
        ("a.json", b'[{"text": "x"},\n', "JSONDecodeError: "),
        pytest.param("a.jsonl", b'{"text": ' + b"[" * 90_000, "RecursionError: maximum recursion depth", id="nested"),
        ("a.parquet", b"nonsense", "ArrowInvalid: Parquet magic bytes not found"),
        ("a.txt.gz", b"nonsense", "BadGzipFile: Not a gzipped file"),
        ("b.txt.gz", gzip.compress(os.urandom(1000))[:500], "EOFError: Compressed file ended"),
        ("a.parquet.gz", b"nonsense", "BadGzipFile: Not a gzipped file"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    library_log = logging.getLogger("datasets")
    library_log.addHandler(caplog.handler)
    try:
        message = error_of(tmp_path / name)
    finally:
        library_log.removeHandler(caplog.handler)
    assert message.startswith(f"{tmp_path / name} cannot be read ({reason}")
    assert message.endswith("Restore the file or leave it out.")
    assert "\n" not in message
    assert not caplog.records  # the library says nothing of its own


def test_corrupt_bytes_inside_a_gzip_file_are_a_broken_file(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(os.urandom(10_000).hex().encode()))
    data[2000:2100] = bytes(100)
    (tmp_path / "a.txt.gz").write_bytes(data)
    assert "a.txt.gz cannot be read (" in error_of(tmp_path / "a.txt.gz")


def test_a_hub_data_set_is_read_from_its_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, **options: Any) -> list[dict]:
        calls.append((path, options))
        return [{"text": "one", "id": 1}, {"text": "", "id": 2}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents(["owner/name", "owner/name:config"])) == ["one", "one"]
    assert calls == [
        ("owner/name", {"split": "train", "streaming": True, "name": None}),
        ("owner/name", {"split": "train", "streaming": True, "name": "config"}),
    ]


def test_a_hub_data_set_without_text_is_refused_with_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: [{"body": "one", "id": 1}])
    assert error_of("owner/name").startswith("The Hub data set owner/name has no column `text`, only body, id.")


def test_a_hub_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = error_of("pcscale-nobody/no-such-data")
    assert message.startswith("The Hub data set pcscale-nobody/no-such-data cannot be read (")
    assert "Check its name and the network; there is no file of this name either." in message


def test_a_hub_stream_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict]:
        yield {"text": "one"}
        raise ConnectionError("Server Disconnected\nmore")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: rows())
    reader = documents(["owner/name"])
    assert next(reader) == "one"
    with pytest.raises(RequestError, match=r"owner/name cannot be read \(ConnectionError: Server Disconnected\)"):
        next(reader)


def test_a_description_holds_path_size_and_time_of_every_file(tmp_path: Path) -> None:
    for name, text in (("b.txt", "four"), ("a.txt", "seventh")):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, ns=(5, 1_700_000_000_123_456_789))
    assert describe([str(tmp_path / "*.txt"), "owner/name:config"]) == [
        {"path": str(tmp_path / "a.txt"), "bytes": 7, "changed_ns": 1_700_000_000_123_456_789},
        {"path": str(tmp_path / "b.txt"), "bytes": 4, "changed_ns": 1_700_000_000_123_456_789},
        {"hub": "owner/name:config"},
    ]


def test_a_description_refuses_what_reading_refuses(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        describe([str(tmp_path / "a.txt")])
