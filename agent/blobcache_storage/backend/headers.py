"""Reading the heads of answers, strictly: what cannot be read is not guessed (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from multidict import CIMultiDictProxy

from blobcache_storage.device import BlobVersion, Validator
from blobcache_storage.errors import OriginProtocolError

ETAG_CHARACTERS_MAX: Final = 1024
DATE_CHARACTERS_MAX: Final = 64
RETRY_AFTER_SECONDS_MAX: Final = 3600.0
"""A longer Retry-After is shortened to this."""

_NUMBER: Final = "[0-9]{1,18}"
_CONTENT_RANGE: Final = re.compile(rf"bytes ({_NUMBER})-({_NUMBER})/({_NUMBER})", re.IGNORECASE)
_UNSATISFIED: Final = re.compile(rf"bytes \*/({_NUMBER})", re.IGNORECASE)
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]+"')
_DIGITS: Final = re.compile(_NUMBER)

Headers = CIMultiDictProxy[str]


def content_length(headers: Headers) -> int | None:
    """Return Content-Length, or None if there is none.

    Raises:
        OriginProtocolError: It cannot be read, or there are several that differ.
    """
    values = set(headers.getall("Content-Length", []))
    if not values:
        return None
    value = values.pop()
    if values or not _DIGITS.fullmatch(value):
        raise OriginProtocolError("the origin's Content-Length cannot be read")
    return int(value)


def content_range(headers: Headers) -> tuple[int, int, int]:
    """Return start, end (exclusive) and whole size of a 206's Content-Range.

    Raises:
        OriginProtocolError: It is missing, not in bytes, of unknown size, or contradictory.
    """
    values = headers.getall("Content-Range", [])
    match = _CONTENT_RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise OriginProtocolError("the origin's Content-Range is missing or cannot be read")
    first, last, size = (int(group) for group in match.groups())
    if not first <= last < size:
        raise OriginProtocolError("the origin's Content-Range contradicts itself")
    return first, last + 1, size


def unsatisfied_size(headers: Headers) -> int | None:
    """Return the blob's size from a 416's Content-Range, or None if it does not say."""
    match = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
    return int(match.group(1)) if match else None


def strong_etag(headers: Headers) -> str | None:
    """Return the strong entity tag, or None: weak, malformed or empty ones join no ranges."""
    value = headers.get("ETag", "")
    is_strong = len(value) <= ETAG_CHARACTERS_MAX and _STRONG_ETAG.fullmatch(value)
    return value if is_strong else None


def http_date(value: str | None) -> datetime | None:
    """Return a date header's time in UTC, or None if it is none."""
    if not value or len(value) > DATE_CHARACTERS_MAX:
        return None
    try:
        found = parsedate_to_datetime(value)
    except (ValueError, IndexError, OverflowError):
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def retry_after_seconds(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds an origin asks to wait, from either form of Retry-After, bounded."""
    value = headers.get("Retry-After", "").strip()
    if _DIGITS.fullmatch(value):
        seconds = float(value)
    else:
        until = http_date(value)
        if until is None:
            return None
        seconds = max(0.0, (until - now).total_seconds())
    return min(seconds, RETRY_AFTER_SECONDS_MAX)


def version_of(headers: Headers, size_bytes: int) -> BlobVersion:
    """Return the version an answer belongs to, by the best validator it carries.

    A Last-Modified of the very second of the answer's Date is weak (RFC 9110 section 8.8.2.2):
    the blob may change once more within that second.
    """
    modified_text = headers.get("Last-Modified")
    modified = http_date(modified_text)
    last_modified = modified_text if modified is not None else None
    etag = strong_etag(headers)
    if etag is not None:
        return BlobVersion(size_bytes, Validator.ETAG, etag, etag, last_modified)
    date = http_date(headers.get("Date"))
    if modified is not None and (date is None or (date - modified).total_seconds() >= 1):
        assert last_modified is not None
        return BlobVersion(size_bytes, Validator.LAST_MODIFIED, last_modified, None, last_modified)
    return BlobVersion(size_bytes, Validator.NONE, "", None, last_modified)
