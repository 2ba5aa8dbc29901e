"""Quantities: what they mean, and how they are written for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobcache_api.quantity import (
    QUANTITY_BYTES_MAX,
    QUANTITY_MESSAGE,
    format_quantity,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        (0, 0),
        (1048576, 1048576),
        ("1048576", 1048576),
        ("1Ki", 1024),
        ("1.5Gi", 3 * 2**29),
        ("1k", 1000),
        ("2T", 2 * 10**12),
        ("3P", 3 * 10**15),
        ("1000m", 1),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1000e-3", 1),
        ("+5M", 5_000_000),
        ("1.", 1),
        (".5Ki", 512),
        ("8Pi", QUANTITY_BYTES_MAX),
    ],
    ids=repr,
)
def test_meaning(written: int | str, size_bytes: int) -> None:
    """Suffixes and exponents mean what they mean in Kubernetes."""
    assert parse_quantity(written) == size_bytes


@pytest.mark.parametrize(
    "written",
    [
        *["", "-1", -1, "100m", "1.1Gi", "50 GB", "1Ei", "1E", "1K", "1e99", "1e999", "٣", True],
        *[1.0, None, [], "0" * 33, QUANTITY_BYTES_MAX + 1, "1Gi\n"],
    ],
    ids=repr,
)
def test_refusal(written: object) -> None:
    """What is no whole number of bytes is refused in one sentence."""
    with pytest.raises(ValueError, match="must be a quantity of whole bytes") as caught:
        parse_quantity(written)
    assert str(caught.value) == QUANTITY_MESSAGE


@given(st.integers(0, QUANTITY_BYTES_MAX))
def test_integers_and_their_text_mean_themselves(size_bytes: int) -> None:
    """Plain numbers need no suffix, as integer or as string."""
    assert parse_quantity(size_bytes) == parse_quantity(str(size_bytes)) == size_bytes


@given(st.text(max_size=40) | st.from_regex(r"[+-]?[0-9.]{0,9}[KMGTPEkmnu]?i?[eE0-9+-]{0,5}"))
def test_any_text_is_read_or_refused(written: str) -> None:
    """No text does anything but yield bytes in bounds, or the one sentence."""
    problem, size_bytes = "", 0
    try:
        size_bytes = parse_quantity(written)
    except ValueError as error:
        problem = str(error)
    assert problem in ("", QUANTITY_MESSAGE)
    assert 0 <= size_bytes <= QUANTITY_BYTES_MAX


@pytest.mark.parametrize(
    ("size_bytes", "written"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1Ki"),
        (65536, "64Ki"),
        (1536 * 1024, "1.5Mi"),
        (50 * 2**30 - 1, "49.9Gi"),
        (1023 * 2**30, "1023Gi"),
        (2**60, "1024Pi"),
    ],
)
def test_for_people(size_bytes: int, written: str) -> None:
    """Bytes are shown in the largest fitting unit, rounded down."""
    assert format_quantity(size_bytes) == written
