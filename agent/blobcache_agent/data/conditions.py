"""Conditional requests (RFC 9110 section 13)."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Mapping

from blobcache_agent.data.dates import parse_http_date
from blobcache_storage.device import BlobVersion

IF_MATCH = b"if-match"
IF_NONE_MATCH = b"if-none-match"
IF_MODIFIED_SINCE = b"if-modified-since"
IF_UNMODIFIED_SINCE = b"if-unmodified-since"
IF_RANGE = b"if-range"
_ALL = (IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE, IF_RANGE)

STRONG_DATE_SECONDS = 60
"""A modification date younger than this may hide a second change within the same second, or a
clock that is off: it is no strong validator (section 8.8.2.2)."""

_ENTITY_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAG_AND_SEPARATOR = re.compile(rf"[ \t,]*({_ENTITY_TAG})[ \t]*(?:,|\Z)")
_ONLY_SEPARATORS = re.compile(r"[ \t,]*")
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')


class Verdict(enum.Enum):
    """What the preconditions say of a version."""

    PROCEED = 0
    NOT_MODIFIED = 304
    FAILED = 412


def is_conditional(headers: Mapping[bytes, str]) -> bool:
    """Whether any precondition is there."""
    return any(name in headers for name in _ALL)


def evaluate(headers: Mapping[bytes, str], version: BlobVersion) -> Verdict:
    """Judge a GET's or HEAD's preconditions in the order of section 13.2.2 (If-Range apart)."""
    if_match = headers.get(IF_MATCH)
    if if_match is not None:
        if not _any_strong_match(if_match, version.etag):
            return Verdict.FAILED
    elif _is_modified_since(headers.get(IF_UNMODIFIED_SINCE), version) is True:
        return Verdict.FAILED
    if_none_match = headers.get(IF_NONE_MATCH)
    if if_none_match is not None:
        if _any_weak_match(if_none_match, version.etag):
            return Verdict.NOT_MODIFIED
    elif _is_modified_since(headers.get(IF_MODIFIED_SINCE), version) is False:
        return Verdict.NOT_MODIFIED
    return Verdict.PROCEED


def range_applies(headers: Mapping[bytes, str], version: BlobVersion) -> bool:
    """Whether the Range may be answered with a part (section 13.1.5).

    An entity tag must be equal and strong; a date must equal Last-Modified to the letter and be
    old enough to be a strong validator.
    """
    if_range = headers.get(IF_RANGE)
    if if_range is None:
        return True
    if _STRONG_TAG.fullmatch(if_range):
        return if_range == version.etag
    if version.last_modified is None or if_range != version.last_modified:
        return False
    modified = parse_http_date(if_range)
    return modified is not None and time.time() - modified >= STRONG_DATE_SECONDS


def _parse_tags(value: str) -> list[str]:
    """Return the entity tags of a list; none at all if any part of it is malformed."""
    tags: list[str] = []
    position = 0
    while position < len(value):
        match = _TAG_AND_SEPARATOR.match(value, position)
        if match is None:
            return tags if _ONLY_SEPARATORS.fullmatch(value, position) else []
        tags.append(match.group(1))
        position = match.end()
    return tags


def _any_strong_match(value: str, etag: str | None) -> bool:
    """Section 8.8.3.2: equal, and neither is weak."""
    if value == "*":
        return True
    return etag is not None and not etag.startswith("W/") and etag in _parse_tags(value)


def _any_weak_match(value: str, etag: str | None) -> bool:
    """Section 8.8.3.2: equal apart from the weakness mark."""
    if value == "*":
        return True
    if etag is None:
        return False
    opaque = etag.removeprefix("W/")
    return any(tag.removeprefix("W/") == opaque for tag in _parse_tags(value))


def _is_modified_since(value: str | None, version: BlobVersion) -> bool | None:
    """Return None where the header is to be ignored: absent, no date, or nothing to compare."""
    if value is None or version.last_modified is None:
        return None
    since = parse_http_date(value)
    modified = parse_http_date(version.last_modified)
    if since is None or modified is None:
        return None
    return modified > since
