"""metrics.jsonl: what is whole is read, what is broken is named, and a cut leaves every byte before it."""

import re
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.run.metrics import cut_metrics, read_metrics
from tests.reporting.run_folder import SKIPPED_STEP, STEPS, TOKENS_PER_STEP, metrics, write_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_metrics(tmp_path, metrics(STEPS))
    return tmp_path / "metrics.jsonl"


def test_every_row_is_read(path: Path) -> None:
    rows, written = read_metrics(path), metrics(STEPS)
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1].tokens == STEPS * TOKENS_PER_STEP
    for name in ("loss", "learning_rate", "grad_norm", "seconds", "moved_bytes"):
        assert [getattr(row, name) for row in rows] == [row[name] for row in written]
    assert [row.eval_loss for row in rows] == [row.get("eval_loss") for row in written]
    assert [row.step for row in rows if row.skipped] == [SKIPPED_STEP]
    assert rows[SKIPPED_STEP - 1].loss is None


def test_a_last_line_that_was_cut_short_is_left_out(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 25, "tok')
    assert len(read_metrics(path)) == STEPS


def test_a_broken_line_in_the_middle_is_refused(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[6] = lines[6][:20]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RequestError, match=r"metrics\.jsonl line 7 is not JSON \(.*\)\. Restore the file\.$"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("line", "problem"), [('{"step": 1}', " has no 'tokens'"), ("12", " is 12, expected a JSON obj")]
)
def test_a_line_that_is_no_row_is_refused(path: Path, line: str, problem: str) -> None:
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(RequestError, match=rf"metrics\.jsonl line 1{problem}"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tokens", "many", "tokens is 'many', expected a valid integer"),
        ("tokens", -1, "tokens is -1, expected greater than or equal to 0"),
        ("tokens", 10**400, "tokens is 10+.*, expected less than 9223372036854775808"),
        ("seconds", None, "seconds is None, expected a valid number"),
        ("seconds", -0.5, "seconds is -0.5, expected greater than or equal to 0"),
        ("learning_rate", True, "learning_rate is True, expected a valid number"),
        ("eval_loss", float("inf"), "eval_loss is inf, expected a finite number"),
        ("eval_loss", float("nan"), "eval_loss is nan, expected a finite number"),
        ("loss", [3.0], r"loss is \[3\.0\], expected a valid number"),
    ],
)
def test_a_value_that_is_no_number_is_refused(path: Path, key: str, value: object, problem: str) -> None:
    rows = metrics(STEPS)
    rows[3][key] = value
    write_metrics(path.parent, rows)
    with pytest.raises(RequestError, match=rf"metrics\.jsonl line 4: {problem}\. Restore the file\.$"):
        read_metrics(path)


@pytest.mark.parametrize("last_step", [0, 1, 7, STEPS, STEPS + 1])
@pytest.mark.parametrize("tail", ["", '{"step": 25, "tok'])
def test_a_cut_leaves_the_lines_up_to_a_step_as_they_were(path: Path, last_step: int, tail: str) -> None:
    before = path.read_text(encoding="utf-8")
    path.write_text(before + tail, encoding="utf-8")
    cut_metrics(path, last_step)
    assert path.read_text(encoding="utf-8").splitlines() == before.splitlines()[:last_step]
    assert re.search(r"[^\n]\n\Z|\A\Z", path.read_text(encoding="utf-8"))


def test_where_there_is_no_file_nothing_is_cut(tmp_path: Path) -> None:
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
