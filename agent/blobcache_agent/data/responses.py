"""Heads and error bodies of answers; which error becomes which status."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from blobcache_agent.data.catalog import Forbidden, NotReady, Unauthenticated, UnknownConfig
from blobcache_agent.data.rejection import Rejection
from blobcache_storage import errors
from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.device import BlobVersion, ByteRange

PHRASES = {
    200: "OK",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    412: "Precondition Failed",
    413: "Content Too Large",
    416: "Range Not Satisfiable",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
RETRY_AFTER_SECONDS_DEFAULT = 1.0
RETRY_AFTER_SECONDS_MAX = 3600
CREDENTIALS_RETRY_AFTER_SECONDS = 5.0
MESSAGE_CHARS_MAX = 1024
"""Of an error's message as a reader sees it."""

_ENTITY_TAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
_FIELD_VALUE = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the reader sees it."""

    status: int
    reason: str
    message: str
    headers: str = ""
    """More header lines, each with its line end."""
    close: bool = False


INTERNAL_ERROR = Failure(500, "InternalError", "an error of the cache; its log has the details")


def failure_of(error: BaseException) -> Failure | None:
    """Return what a reader sees of an expected error, None if nobody expected it."""
    match error:
        case Rejection():
            return Failure(error.status, error.reason, error.message, error.headers, error.close)
        case UnknownConfig():
            return Failure(404, "UnknownConfig", "there is no such BlobCacheConfig on this node")
        case NotReady():
            return _unavailable(error.reason, error.message, error.retry_after_seconds)
        case Unauthenticated():
            return Failure(401, "Unauthenticated", error.message, "WWW-Authenticate: Bearer\r\n")
        case Forbidden():
            return Failure(403, "Forbidden", error.message)
        case errors.StorageError():
            return _storage_failure(error)
    return None


def _storage_failure(error: errors.StorageError) -> Failure | None:
    """The engine's errors; their messages hold no secret by contract."""
    message = str(error)
    match error:
        case errors.InvalidBlobId() | errors.BlobNotFound():
            status = 404
        case errors.OriginDenied():
            status = 403
        case errors.RangeNotSatisfiable():
            unsatisfied = f"Content-Range: bytes */{error.size_bytes}\r\n"
            return Failure(416, error.reason, message, unsatisfied)
        case errors.CacheBusy():
            return _unavailable(error.reason, message, error.retry_after_seconds)
        case errors.OriginThrottled() | errors.CircuitOpen():
            return _unavailable(error.reason, message, error.retry_after_seconds)
        case errors.CredentialsPending():
            return _unavailable(error.reason, message, CREDENTIALS_RETRY_AFTER_SECONDS)
        case errors.CacheError() | errors.ConfigError():
            return _unavailable(error.reason, message, None)
        case errors.OriginTimeout():
            status = 504
        case errors.BackendError() | errors.BlobChanged() | errors.DigestMismatch():
            status = 502
        case _:
            return None
    return Failure(status, error.reason, message)


def _unavailable(reason: str, message: str, retry_after_seconds: float | None) -> Failure:
    """Return a 503 that says when to come back: whole seconds, at least one, at most an hour."""
    seconds = RETRY_AFTER_SECONDS_DEFAULT if retry_after_seconds is None else retry_after_seconds
    whole = min(max(math.ceil(seconds), 1), RETRY_AFTER_SECONDS_MAX)
    return Failure(503, reason, message, f"Retry-After: {whole}\r\n")


def error_response(
    failure: Failure,
    *,
    date: str,
    connection: str,
    document: Mapping[str, object] | None = None,
) -> tuple[bytes, bytes]:
    """Return head and JSON body.

    Args:
        failure: What to say.
        date: The Date header.
        connection: A Connection header line with its line end, or "".
        document: The body, where it has another form than most errors.
    """
    if document is None:
        document = {"code": failure.reason, "message": failure.message[:MESSAGE_CHARS_MAX]}
    body = json.dumps(document).encode("ascii") + b"\n"
    head = (
        f"HTTP/1.1 {failure.status} {PHRASES[failure.status]}\r\n"
        f"Date: {date}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        f"{failure.headers}{connection}\r\n"
    )
    return head.encode("latin-1"), body


def blob_head(
    status: int,
    version: BlobVersion,
    cache_status: CacheStatus,
    span: ByteRange | None,
    *,
    date: str,
    connection: str,
) -> bytes:
    """Return the head of a 200, 206, 304 or 412.

    Args:
        status: One of those.
        version: The blob's version.
        cache_status: How it was found.
        span: The bytes that follow (for HEAD: would follow); None for 304 and 412.
        date: The Date header.
        connection: A Connection header line with its line end, or "".
    """
    frame = HeadFrame.of(status, version, cache_status, date=date, connection=connection)
    content = b"Content-Length: 0\r\n" if status == 412 else b""
    if span is not None:
        content = content_lines(status, span.start, span.end, version.size_bytes)
    return frame.before + content + frame.after


@dataclass(frozen=True, slots=True)
class HeadFrame:
    """A head but for the lines that tell which bytes follow."""

    before: bytes
    after: bytes

    @classmethod
    def of(
        cls,
        status: int,
        version: BlobVersion,
        cache_status: CacheStatus,
        *,
        date: str,
        connection: str,
    ) -> HeadFrame:
        """Return the frame; the arguments are those of `blob_head`."""
        before = f"HTTP/1.1 {status} {PHRASES[status]}\r\nDate: {date}\r\n"
        # What an origin sent is checked once more before it becomes our header line.
        if version.etag is not None and _ENTITY_TAG.fullmatch(version.etag):
            before += f"ETag: {version.etag}\r\n"
        if version.last_modified is not None and _FIELD_VALUE.fullmatch(version.last_modified):
            before += f"Last-Modified: {version.last_modified}\r\n"
        after = f"Accept-Ranges: bytes\r\nCache-Status: blobcache; {cache_status.value}\r\n"
        return cls(before.encode("latin-1"), f"{after}{connection}\r\n".encode("latin-1"))


def content_lines(status: int, start: int, end: int, size_bytes: int) -> bytes:
    """Return the lines that tell which bytes of a blob follow: `[start, end)`."""
    lines = b"Content-Type: application/octet-stream\r\nContent-Length: %d\r\n" % (end - start)
    if status == 206:
        lines += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, size_bytes)
    return lines
