"""The interface of a backend: ranged, versioned reads of one origin's blobs.

A backend sends one request per call, retries what is retryable within its budget, follows the
origin's manners (breaker, Retry-After), and checks that an answer is what was asked. It keeps no
bytes. Nydus: `BlobBackend` and `BlobReader` (storage/src/backend/mod.rs); differs in that the
answer carries the blob's version and is streamed.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from blobcache_storage.config import BackendConfig
from blobcache_storage.device import BlobVersion, ByteRange, RangeRequest, RequestSource
from blobcache_storage.errors import BlobChanged


def check_expected(blob_id: str, found: BlobVersion, expect: BlobVersion | None) -> None:
    """Compare the version an origin answered with the one expected, if any.

    Versions are the same if size, kind of validator and its value are: an origin may leave out
    Last-Modified beside an entity tag. Two answers without a validator are never the same.

    Raises:
        BlobChanged: They are not the same.
    """
    if expect is None:
        return
    same = (found.size_bytes, found.validator, found.token) == (
        expect.size_bytes,
        expect.validator,
        expect.token,
    )
    if not same or not found.is_cacheable:
        raise BlobChanged(f"the origin now has another version of blob '{blob_id}'")


def resolve_span(request: RangeRequest, size_bytes: int) -> ByteRange:
    """Return the bytes a fetch yields of a blob of `size_bytes`.

    As `RangeRequest.resolve`, but a fetch from offset 0 of an empty blob yields its no bytes: a
    cache learns of a blob by such a fetch, and that an empty one exists must come out.

    Raises:
        RangeNotSatisfiable: The range begins at or beyond the blob's end.
    """
    if size_bytes == 0 and request.first == 0:
        return ByteRange(0, 0)
    return request.resolve(size_bytes)


class FetchStream(abc.ABC):
    """The answer to one fetch: its head is known, its body is read once, in order.

    Use as an async context manager, which always ends the request. One task at a time.
    """

    version: BlobVersion
    """The version the bytes belong to, its size that of the whole blob."""
    span: ByteRange
    """The bytes that follow. As asked (cut at the blob's end), or from 0 to the blob's end
    where the origin answered 200 with a known length to a fetch from offset 0."""

    @abc.abstractmethod
    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces of any size, in all exactly `span.length` bytes.

        Raises:
            BackendError: The body broke off, was too long, or stalled. Pieces already yielded
                are the origin's; the caller may go on from there with another fetch.
        """

    def promote(self) -> None:  # noqa: B027 a stream without a throttle has nothing to lift
        """Treat the rest of the body as a reader's: a read joined this prefetch."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """End the request; safe to call twice."""

    async def __aenter__(self) -> Self:
        """Return the stream."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the request."""
        await self.aclose()


class BlobBackend(abc.ABC):
    """One origin. Safe for use by many tasks of one event loop."""

    @abc.abstractmethod
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        """Ask for a range and return once the answer's head was checked.

        Args:
            request: The bytes wanted.
            expect: The version they must belong to: sent as If-Match where the origin knows
                it, and compared with the answer in any case.
            source: Prefetch is retried less.

        Raises:
            BlobChanged: The origin has another version than `expect`.
            RangeNotSatisfiable: No byte of the range exists (`resolve_span`: a fetch from
                offset 0 of an empty blob succeeds with an empty span).
            BlobNotFound, OriginDenied, …: see `errors`.
        """

    @abc.abstractmethod
    async def stat(self, blob_id: str) -> BlobVersion:
        """Return the blob's current version without its bytes (a HEAD request)."""

    @abc.abstractmethod
    def check_blob_id(self, blob_id: str) -> str:
        """Return the id in its canonical form (`sha256:<hex>` for a bare digest, say).

        Raises:
            InvalidBlobId: This backend can have no such blob.
        """

    @abc.abstractmethod
    def digest_of(self, blob_id: str) -> str | None:
        """Return the `sha256:<hex>` that names the blob's bytes, if its id does."""

    @abc.abstractmethod
    def reconfigure(self, config: BackendConfig) -> None:
        """Take new credentials, limits and time-outs in place; requests under way go on."""

    @abc.abstractmethod
    async def shutdown(self) -> None:
        """Close connections; idempotent."""
