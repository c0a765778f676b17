"""Sizes, counts and times as people write and read them."""

import re
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.common.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("5GiB", 5_368_709_120),
        ("5000000000", 5_000_000_000),
        (5000000000, 5_000_000_000),
        ("24 GB", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("24g", 24_000_000_000),
        ("24 gib", 25_769_803_776),
        ("24Gi", 25_769_803_776),
        ("1.5k", 1500),
        ("1.5KiB", 1536),
        ("2MB", 2_000_000),
        ("2MiB", 2_097_152),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("5e9", 5_000_000_000),
        ("7b", 7),
        ("7 B", 7),
        ("  7  ", 7),
        (1, 1),
    ],
)
def test_a_size_is_read_in_decimal_and_in_binary_units(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["lots", "", " ", "-1", "0", "0GB", "0.2", "nan", "inf", "1e400", "GB", "5iB", "5i", "5XB", "5GBs", "1,5GB", "5 5"],
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    message = f"'{text}' is not a size. Write it like 5GB, 5GiB or 5000000000."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [-1, 0, True, None])
def test_values_of_yaml_that_are_no_size_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=f"^'{value}' is not a size"):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40 // 2, "1.50 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_are_written_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_written_sizes_are_read_back_to_within_their_last_digit() -> None:
    for exponent in range(0, 45):
        size_bytes = 3 * 2**exponent
        assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 K"),
        (134_515_008, "134.5 M"),
        (8_030_261_248, "8.03 G"),
        (9.0e12, "9.00 T"),
        (1.27e17, "127.00 P"),
        (2e18, "2.00 E"),
        (-1500, "-1.5 K"),
    ],
)
def test_counts_are_written_with_a_prefix(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (3725, "1:02:05"),
        (360_000, "100:00:00"),
        (float("inf"), "-"),
        (float("nan"), "-"),
    ],
)
def test_times_are_written_like_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
