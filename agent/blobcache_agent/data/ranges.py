"""The Range header (RFC 9110 section 14)."""

from __future__ import annotations

import re

from blobcache_storage.device import RangeRequest

_RANGES = re.compile(r"[Bb][Yy][Tt][Ee][Ss]=(.*)", re.DOTALL)
_RANGE = re.compile(r"(?:([0-9]+)-([0-9]*)|-([0-9]+))")
_PLAIN = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")
"""Nearly all ranges look like this; they take a shorter way to the same answer."""
_OPTIONAL_SPACE = " \t"
_DIGITS_MAX = 18
"""Longer numbers count as `_BEYOND`: no blob reaches there, and int() refuses thousands of
digits."""
_BEYOND: int = 10**_DIGITS_MAX


def parse_range(value: str | None) -> RangeRequest | None:
    """Return the one range that is asked for, or None for the whole blob.

    What is not exactly one valid range of bytes is ignored, as section 14.2 permits: other units,
    bad syntax, several ranges (a reader wants those in one answer only if it asked for them as a
    whole; the whole blob holds them all).
    """
    if value is None:
        return None
    plain = _PLAIN.fullmatch(value)
    if plain is not None:
        return _ordered(int(plain[1]), int(plain[2]))
    ranges = _RANGES.fullmatch(value)
    if ranges is None:
        return None
    # Empty list elements are to be skipped (section 5.6.1.2).
    elements = [part for part in ranges.group(1).split(",") if part.strip(_OPTIONAL_SPACE)]
    if len(elements) != 1:
        return None
    only = elements[0]
    # Optional space belongs to a list's commas; without one there is none.
    match = _RANGE.fullmatch(only.strip(_OPTIONAL_SPACE) if "," in ranges.group(1) else only)
    if match is None:
        return None
    first, last, suffix_length = match.groups()
    if suffix_length is not None:
        return RangeRequest(suffix_length=_number(suffix_length))
    if not last:
        return RangeRequest(first=_number(first))
    return _ordered(_number(first), _number(last))


def _ordered(first: int, last: int) -> RangeRequest | None:
    """Return the range, None if it ends before it begins: that is bad syntax."""
    return RangeRequest(first=first, last=last) if first <= last else None


def _number(digits: str) -> int:
    """Return a number of any length, capped."""
    significant = digits.lstrip("0")
    if len(significant) > _DIGITS_MAX:
        return _BEYOND
    return int(significant or "0")
