"""Headers are read to the letter or not at all."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from blobcache_storage.backend.headers import (
    Headers,
    content_length,
    content_range,
    unsatisfied_size,
)
from blobcache_storage.errors import OriginProtocolError


def headers(*pairs: tuple[str, str]) -> Headers:
    """Return headers, repeated ones included."""
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_a_content_range() -> None:
    """Start, end (exclusive) and size."""
    assert content_range(headers(("Content-Range", "bytes 5-9/10"))) == (5, 10, 10)


@pytest.mark.parametrize(
    "value",
    [
        "bytes 5-4/10",
        "bytes 5-10/10",
        "bytes 5-9/*",
        "bytes */10",
        "bytes=5-9/10",
        "bytes 5-9/10, bytes 0-1/10",
        "bytes 5-9/1" + "0" * 30,
        "bytes -5-9/10",
        "bytes \u0665-9/10",
        "5-9/10",
        "",
    ],
)
def test_no_content_range(value: str) -> None:
    """What contradicts itself or is written otherwise is an error."""
    with pytest.raises(OriginProtocolError):
        content_range(headers(("Content-Range", value)))


def test_two_content_ranges() -> None:
    """Which of two would be meant?"""
    both = ("Content-Range", "bytes 5-9/10")
    with pytest.raises(OriginProtocolError):
        content_range(headers(both, both))


def test_content_lengths() -> None:
    """None, one, one repeated; several that differ or are no number are an error."""
    assert content_length(headers()) is None
    assert content_length(headers(("Content-Length", "7"))) == 7
    assert content_length(headers(("Content-Length", "7"), ("Content-Length", "7"))) == 7
    for values in (("7", "8"), ("+7",), ("-7",), ("7 ",), ("",), ("0x7",), ("9" * 30,)):
        with pytest.raises(OriginProtocolError):
            content_length(headers(*(("Content-Length", value) for value in values)))


def test_sizes_of_416() -> None:
    """The size, if it is told."""
    assert unsatisfied_size(headers(("Content-Range", "bytes */42"))) == 42
    assert unsatisfied_size(headers(("Content-Range", "bytes 0-1/42"))) is None
    assert unsatisfied_size(headers()) is None
