"""What the data port answers besides `/v1/blobs`: a part of its paths belongs to another service.

The server knows only this protocol; who answers (the mirror) plugs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from blobcache_agent.data.catalog import Entry
from blobcache_agent.data.request import Request
from blobcache_agent.data.responses import Failure
from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.device import BlobVersion


@dataclass(frozen=True, slots=True)
class BlobAnswer:
    """A blob of a configuration, sent as any other."""

    entry: Entry
    blob_id: str
    headers: str
    """More header lines, each with its line end."""


@dataclass(frozen=True, slots=True)
class DocumentAnswer:
    """A small body that is in memory, verified."""

    body: bytes
    media_type: str
    headers: str
    """More header lines, each with its line end."""
    version: BlobVersion | None = None
    """What conditional requests are judged by; None if there is nothing to judge."""
    cache_status: CacheStatus | None = None
    namespace: str = ""
    name: str = ""
    blob_id: str = ""


Answer = BlobAnswer | DocumentAnswer


class Service(Protocol):
    """Answers requests for some paths. Called in the event loop."""

    def owns(self, path: str) -> bool:
        """Whether a request target belongs to it."""

    def answering(self, request: Request) -> AbstractAsyncContextManager[Answer]:
        """Find the answer; it is used within the context, and given back at its end.

        Raises:
            Exception: Whatever `responses.failure_of` knows.
        """

    def error_document(self, failure: Failure) -> Mapping[str, object]:
        """Return the JSON body of an error answer."""


def document_head(answer: DocumentAnswer, *, date: str, connection: str) -> bytes:
    """Return the head of a 200.

    Args:
        answer: What is sent.
        date: The Date header.
        connection: A Connection header line with its line end, or "".
    """
    lines = f"HTTP/1.1 200 OK\r\nDate: {date}\r\n"
    if answer.version is not None and answer.version.etag is not None:
        lines += f"ETag: {answer.version.etag}\r\n"
    lines += f"Content-Type: {answer.media_type}\r\nContent-Length: {len(answer.body)}\r\n"
    if answer.cache_status is not None:
        lines += f"Cache-Status: blobcache; {answer.cache_status.value}\r\n"
    return f"{lines}{answer.headers}{connection}\r\n".encode("latin-1")
