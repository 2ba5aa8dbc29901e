"""Bytes straight from the origin to one reader, where the cache cannot or may not store them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from typing_extensions import override

from blobcache_storage.backend.base import FetchStream
from blobcache_storage.cache.base import BlobRead, CacheStatus, Piece
from blobcache_storage.cache.fill import RESUME_DELAY_SECONDS, RESUMES_MAX, Origin
from blobcache_storage.cache.pools import WorkerPool
from blobcache_storage.device import BlobVersion, ByteRange, RangeRequest, RequestSource
from blobcache_storage.errors import BackendError, DigestMismatch, OriginProtocolError


class Relay:
    """One range of one version, resumed by range where the version can be told from others.

    One task at a time.

    Args:
        version: What the bytes must belong to; None takes what the origin has.
        source: Passed to the origin.
    """

    def __init__(
        self, origin: Origin, blob_id: str, version: BlobVersion | None, source: RequestSource
    ) -> None:
        self._origin = origin
        self._blob_id = blob_id
        self._version = version
        self._source = source
        self._stream: FetchStream | None = None
        self._position = 0
        self._end = 0

    @property
    def version(self) -> BlobVersion:
        """The version the bytes belong to, once opened."""
        assert self._version is not None, "the relay was not opened"
        return self._version

    @property
    def span(self) -> ByteRange:
        """What is still to come."""
        return ByteRange(self._position, self._end)

    async def open(self, request: RangeRequest) -> None:
        """Ask for a range and return when the origin has answered with its head."""
        stream = await self._fetch(request)
        self._version = stream.version
        span = request.resolve(stream.version.size_bytes)
        self._position, self._end = span.start, span.end

    async def _fetch(self, request: RangeRequest) -> FetchStream:
        self._origin.counters.origin_requests += 1
        try:
            stream = await self._origin.backend.fetch(
                self._blob_id, request, expect=self._version, source=self._source
            )
        except BackendError as error:
            self._origin.counters.origin_errors += 1
            self._origin.note_failure(error)
            raise
        self._stream = stream
        self._origin.on_success()
        return stream

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield exactly the range asked for."""
        fruitless = resumes = 0
        while self._position < self._end:
            before = self._position
            try:
                async for piece in self._body():
                    yield piece
            except BackendError as error:
                fruitless = fruitless + 1 if self._position == before else 1
                resumes += 1
                # Without a stream it is the head that failed, which the backend asked for again
                # as often as it may.
                is_answered = self._stream is not None
                may_resume = error.retryable and self.version.is_cacheable and is_answered
                if not may_resume or max(fruitless - self._origin.retry_limit, 0):
                    raise
                if resumes > RESUMES_MAX:
                    raise
                await self.aclose()
                await asyncio.sleep(RESUME_DELAY_SECONDS * (1 << min(fruitless, 5)))

    async def _body(self) -> AsyncIterator[bytes]:
        if self._stream is None:
            await self._fetch(RangeRequest(first=self._position, last=self._end - 1))
        stream = self._stream
        assert stream is not None
        at = stream.span.start
        if at > self._position:
            raise OriginProtocolError("the origin's answer begins after what was asked for")
        async for piece in stream:
            self._origin.counters.origin_bytes += len(piece)
            wanted = piece[max(0, self._position - at) : max(0, self._end - at)]
            at += len(piece)
            if wanted:
                self._position += len(wanted)
                yield wanted
            if self._position == self._end:
                return
        raise OriginProtocolError("the origin's answer ended before what was asked for")

    async def aclose(self) -> None:
        """End the request; safe to call twice."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()


async def verified(
    relay: Relay, hashing: WorkerPool | None, sha256: bytes, *, start: int, hold_bytes: int
) -> AsyncIterator[bytes]:
    """Yield a whole blob's bytes from `start`, the last `hold_bytes` only if the digest matches.

    Args:
        hashing: Threads to hash in; None takes the loop's own.
        relay: Opened for the whole blob: what comes before `start` is hashed too.

    Raises:
        DigestMismatch: The blob has other bytes; the end was not yielded.
    """
    digest = hashlib.sha256()
    held: deque[bytes] = deque()
    held_bytes = skipped = 0
    async for piece in relay.pieces():
        work = functools.partial(digest.update, piece)
        await (hashing.run(work) if hashing is not None else asyncio.to_thread(work))
        skip = min(len(piece), start - skipped)
        skipped += skip
        held.append(piece[skip:])
        held_bytes += len(piece) - skip
        while held and held_bytes - len(held[0]) >= hold_bytes:
            held_bytes -= len(held[0])
            yield held.popleft()
    if digest.digest() != sha256:
        raise DigestMismatch("the blob's bytes do not have the digest that names it")
    for piece in held:
        yield piece


async def require_digest_if_empty(relay: Relay, sha256: bytes | None) -> None:
    """Check a blob that has no bytes, whose digest no end can be held back for.

    Raises:
        DigestMismatch: It should have some.
    """
    empty = not relay.version.size_bytes
    if empty and sha256 not in (None, hashlib.sha256().digest()):
        await relay.aclose()
        raise DigestMismatch("the blob's bytes do not have the digest that names it")


class RelayedRead(BlobRead):
    """A read that the cache has no part in.

    Args:
        sha256: What the whole blob must have, where the whole blob is read.
    """

    def __init__(
        self,
        relay: Relay,
        status: CacheStatus,
        *,
        hashing: WorkerPool | None = None,
        sha256: bytes | None = None,
        hold_bytes: int = 0,
    ) -> None:
        self.version = relay.version
        self.span = relay.span
        self.status = status
        self._relay = relay
        self._hashing = hashing
        self._sha256 = sha256
        self._hold_bytes = hold_bytes
        self.on_mismatch: Callable[[], None] = _ignore
        self.on_bytes: Callable[[int], None] = _ignore_count

    @override
    def pieces(self) -> AsyncIterator[Piece]:
        return self._pieces()

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        pieces = self._relay.pieces()
        whole = self.span == ByteRange(0, self.version.size_bytes)
        if self._sha256 is not None and whole:
            hold = self._hold_bytes
            pieces = verified(self._relay, self._hashing, self._sha256, start=0, hold_bytes=hold)
        try:
            async for piece in pieces:
                self.on_bytes(len(piece))
                yield piece
        except DigestMismatch:
            self.on_mismatch()
            raise

    @override
    async def aclose(self) -> None:
        await self._relay.aclose()


def _ignore() -> None:
    """Nobody minds."""


def _ignore_count(_: int) -> None:
    """Nobody counts."""
