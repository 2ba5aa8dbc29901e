"""What S3 and OSS have in common: keys in URLs, error documents, and clocks that disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

from blobcache_storage.backend.headers import http_date

SKEW_SECONDS_MIN: Final = 300
"""Services tolerate 15 minutes; a refusal with a smaller difference has another cause."""
SKEW_SECONDS_MAX: Final = 24 * 3600
"""What an origin says of the time is believed so far and no further."""

_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")


def quote_key(key: str) -> str:
    """Return an object's key as both services put it into path and signature: once encoded."""
    return quote(key, safe="/-_.~")


def error_code(body: bytes) -> str:
    """Return the `Code` of an error document, "" if there is none."""
    match = _CODE.search(body)
    return match.group(1).decode() if match else ""


class ClockSkew:
    """How far the origin's clock is ahead of ours, learnt when it refuses a signature for it."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        """Return the time in UTC as the origin sees it."""
        return datetime.now(UTC) + self._ahead

    def learn(self, headers: Mapping[str, str]) -> bool:
        """Take the time from a refusal's Date; return whether it explains the refusal.

        The Date decides alone, because the answer to a HEAD request has no document with a code.
        """
        theirs = http_date(headers.get("Date"))
        if theirs is None:
            return False
        if abs((theirs - self.now()).total_seconds()) < SKEW_SECONDS_MIN:
            return False
        ahead = theirs - datetime.now(UTC)
        if abs(ahead.total_seconds()) > SKEW_SECONDS_MAX:
            return False
        self._ahead = ahead
        return True
