"""Reads: what the data API holds while it answers one request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import AsyncGeneratorType
from typing import Protocol

from typing_extensions import override

from blobcache_storage.cache.base import BlobRead, CacheStatus, FileSpan, Piece
from blobcache_storage.cache.chunk_memory import Lease
from blobcache_storage.cache.digest import WholeCheck
from blobcache_storage.cache.fill import Fetch, Origin
from blobcache_storage.cache.generation import ChunkState, Generation
from blobcache_storage.cache.pools import WorkerPool
from blobcache_storage.cache.relay import Relay, verified
from blobcache_storage.device import ByteRange, RangeRequest, RequestSource
from blobcache_storage.errors import BlobChanged, DigestMismatch

FETCHES_AT_ONCE_MAX = 3
"""Requests one reader has under way."""
AHEAD_BYTES_MAX = 64 * 1024 * 1024
"""How far a reader's fetches run ahead of it."""
SPAN_BYTES_MAX = 16 * 1024 * 1024
"""Longest span of a file yielded at once."""
SLICE_BYTES = 64 * 1024
"""Bytes that are not synced yet are yielded so many at a time: what a slow reader holds."""
CHECK_BYTES = 1024 * 1024
"""Recorded chunks are verified so many bytes at a time."""


class ReadOwner(Protocol):
    """What a read needs of its manager."""

    origin: Origin

    async def start_fetch(
        self, generation: Generation, first: int, end: int, source: RequestSource
    ) -> Fetch | None:
        """Fetch and store absent chunks; None where they cannot be stored now."""

    def retire(self, generation: Generation) -> None:
        """The origin has another version."""

    def quarantine(self, generation: Generation | None, blob_id: str) -> None:
        """The blob has not the digest that names it."""

    def release_read(self, generation: Generation) -> None:
        """A read ended."""

    def note_corrupt(self, generation: Generation) -> None:
        """A chunk was not what was recorded."""

    @property
    def hashing(self) -> WorkerPool:
        """Threads that hash."""


class CachedRead(BlobRead):
    """A read of one generation; misses are filled, or relayed where they cannot be stored.

    Args:
        check: The digest check this whole read waits for before its last chunk; it is joined
            here and left when the read is closed.
        may_store: Whether misses may be stored; else they are relayed.
        ahead_end: Chunks up to here may be fetched along, beyond those asked for.
    """

    def __init__(
        self,
        owner: ReadOwner,
        generation: Generation,
        span: ByteRange,
        status: CacheStatus,
        source: RequestSource,
        *,
        check: WholeCheck | None = None,
        may_store: bool = True,
        relay_status: CacheStatus = CacheStatus.MISS,
        ahead_end: int = 0,
    ) -> None:
        self.version = generation.version
        self.span = span
        self.status = status
        self._owner = owner
        self._generation = generation
        self._source = source
        self._check = check
        self._may_store = may_store
        self._relay_status = relay_status
        self._first, self._end = generation.chunks_of(span)
        self._ahead_end = max(ahead_end, self._end)
        self._front = self._first
        """First chunk for which no fetch was arranged yet."""
        self._fetches: list[Fetch] = []
        self._relay: Relay | None = None
        self._relay_from = 0
        """Where the relay takes over; what comes before is served from the cache."""
        self._position = span.start
        self._failed_at = -1
        """Where a span of the file failed last."""
        self._closed = False
        self._pieces_begun: AsyncGeneratorType[Piece, None] | None = None
        self._was_here = False if status is CacheStatus.MISS_STORED else self._remember()
        generation.readers += 1
        if check is not None:
            check.join()

    def _remember(self) -> bytes | bool:
        """Note which chunks are hits: all, none, or these."""
        generation = self._generation
        present = generation.present_in(self._first, self._end)
        if present in (0, self._end - self._first):
            return present > 0
        return bytes(generation.states[self._first : self._end])

    async def prepare(self) -> None:
        """Have the first missing chunk on its way, its head answered.

        Raises:
            StorageError: It cannot be had; nothing was sent to the reader yet.
        """
        if not self.span.length and self._check is not None:
            await self._release_end(0)  # there is no last chunk to hold back
        if self.status is CacheStatus.HIT:
            return
        index = self._first_missing()
        while index is not None:
            fetch = self._generation.fetches.get(index)
            if fetch is None and not (self._may_store and await self._arrange(index)):
                await self._open_relay(index)
                return
            fetch = self._generation.fetches.get(index)
            if isinstance(fetch, Fetch):
                self._join(fetch)
                await self._wait_head(fetch)
                return
            index = self._first_missing()

    def _first_missing(self) -> int | None:
        states = self._generation.states
        for index in range(self._first, self._end):
            if states[index] < ChunkState.BUFFERED:
                return index
        return None

    async def _wait_head(self, fetch: Fetch) -> None:
        try:
            await fetch.wait_head()
        except BlobChanged:
            self._owner.retire(self._generation)
            raise

    async def _open_relay(self, index: int) -> None:
        """Pass the rest, from chunk `index` on, straight through."""
        blob_id = self._generation.entry.blob_id
        relay = Relay(self._owner.origin, blob_id, self.version, self._source)
        self._relay_from = max(self._position, index * self._generation.chunk_size_bytes)
        if self._check is not None:
            # The digest is of the whole: what was yielded already is fetched again to be hashed.
            request = RangeRequest(first=0)
        else:
            request = RangeRequest(first=self._relay_from, last=self.span.end - 1)
        if self._relay is not None:
            await self._relay.aclose()
        try:
            await relay.open(request)
        except BlobChanged:
            self._owner.retire(self._generation)
            raise
        self._relay = relay
        self.status = self._relay_status

    # -- fetches -----------------------------------------------------------------------------------

    def _join(self, fetch: Fetch) -> None:
        if fetch not in self._fetches:
            fetch.join(self._source)
            self._fetches.append(fetch)

    async def _arrange(self, index: int) -> bool:
        """Have chunk `index`, and as much after it as is wise, fetched.

        Returns:
            Whether `index` is present or on its way; False where it cannot be stored.
        """
        generation = self._generation
        self._fetches = [fetch for fetch in self._fetches if not fetch.ended]
        if generation.states[index] == ChunkState.ABSENT:
            self._front = index
        ahead = AHEAD_BYTES_MAX // generation.chunk_size_bytes
        while (
            self._front < self._ahead_end
            and (self._front == index or self._front - index < ahead)
            and (self._front == index or len(self._fetches) < FETCHES_AT_ONCE_MAX)
        ):
            front = self._front
            if generation.is_present(front):
                self._front += 1
                continue
            fetch = generation.fetches.get(front)
            if fetch is None:
                fetch = await self._start(front)
                if fetch is None:
                    return generation.states[index] != ChunkState.ABSENT
            assert isinstance(fetch, Fetch)
            self._join(fetch)
            self._front = max(front + 1, fetch.end)
        return True

    async def _start(self, front: int) -> Fetch | None:
        generation = self._generation
        segment = max(1, self._owner.origin.pace.segment_bytes // generation.chunk_size_bytes)
        stop = front + 1
        limit = min(self._ahead_end, front + segment)
        while stop < limit and generation.states[stop] == ChunkState.ABSENT:
            stop += 1
        fetch = await self._owner.start_fetch(generation, front, stop, self._source)
        if fetch is not None and stop > self._end:
            fetch.lingers = True
        return fetch

    # -- pieces ------------------------------------------------------------------------------------

    @override
    def file_span(self) -> FileSpan | None:
        generation, span = self._generation, self.span
        if self._position != span.start or self._relay is not None or not span.length:
            return None
        if self._check is not None or self._closed:
            return None
        if generation.verified_end(self._first, self._end) != self._end:
            return None
        self._position = span.end
        self._count(span.start, span.length)
        return FileSpan(generation.files.data_fd, span.start, span.length)

    @override
    def span_failed(self, span: FileSpan, sent_bytes: int) -> bool:
        position = span.offset + sent_bytes
        if self._closed or position == self._failed_at:
            return False  # what was found right cannot be read all the same
        generation, end = self._generation, span.offset + span.length
        generation.distrust(*generation.chunks_of(ByteRange(position, end)))
        self._failed_at = self._position = position
        self._count(position, end - position, -1)
        return True

    @override
    def pieces(self) -> AsyncIterator[Piece]:
        begun = self._pieces()
        assert isinstance(begun, AsyncGeneratorType)
        self._pieces_begun = begun
        return begun

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        generation, size = self._generation, self._generation.chunk_size_bytes
        while self._position < self.span.end:
            index = self._position // size
            end = await self._release_end(index)
            state = generation.states[index]
            if end is None:
                await self._open_relay(index)
            if self._relay is not None and self._position >= self._relay_from:
                async with contextlib.aclosing(self._relayed()) as relayed:
                    async for piece in relayed:
                        yield piece
                return
            assert end is not None
            if self._relay is not None:
                end = min(end, self._relay_from // size)  # else its bytes would come twice
            if state == ChunkState.VERIFIED:
                yield self._span(index, end)
            elif state == ChunkState.DURABLE:
                await self._verify(index, end)
            elif state == ChunkState.BUFFERED:
                async with contextlib.aclosing(self._from_memory(index)) as parts:
                    async for part in parts:
                        yield part
            else:
                await self._await_chunk(index)

    async def _release_end(self, index: int) -> int | None:
        """Return up to which chunk may be yielded now; None if only a relay can tell.

        Raises:
            DigestMismatch: The last chunk is next, and the blob is not what its name says.
        """
        if self._check is None:
            return self._end
        last = self._end - 1
        if index < last:
            return last
        generation = self._generation
        while not self._check.is_done:
            seen = generation.changes.count
            if generation.states.count(ChunkState.ABSENT) and not await self._arrange_all():
                return None
            await self._check.wait_a_while(seen)
        try:
            self._check.require()
        except DigestMismatch:
            self._owner.quarantine(generation, generation.entry.blob_id)
            raise
        self._check.leave()
        self._check = None
        return self._end

    async def _arrange_all(self) -> bool:
        """Have whatever is missing fetched again; False where it cannot be stored."""
        missing = self._first_missing()
        while missing is not None and self._generation.states[missing] == ChunkState.ABSENT:
            self._check_failure(missing)
            self._front = missing
            if not self._may_store or not await self._arrange(missing):
                return False
            missing = self._first_missing()
        return True

    def _check_failure(self, index: int) -> None:
        """Raise if a fetch of this read should have brought a chunk and failed."""
        for fetch in self._fetches:
            if fetch.error is not None and index < fetch.end:
                if isinstance(fetch.error, BlobChanged):
                    self._owner.retire(self._generation)
                raise fetch.error

    async def _relayed(self) -> AsyncGenerator[Piece, None]:
        relay = self._relay
        assert relay is not None
        pieces = relay.pieces()
        if self._check is not None:
            # Whether the blob is right is now for the relay to find out.
            sha256 = self._check.sha256
            pieces = verified(
                relay,
                self._owner.hashing,
                sha256,
                start=self._position,
                hold_bytes=self._generation.chunk_size_bytes,
            )
        try:
            async for piece in pieces:
                start, self._position = self._position, self._position + len(piece)
                self._count(start, len(piece))
                yield piece
        except BlobChanged:
            self._owner.retire(self._generation)
            raise
        except DigestMismatch:
            self._owner.quarantine(self._generation, self._generation.entry.blob_id)
            raise

    def _span(self, index: int, end: int) -> FileSpan:
        generation, size = self._generation, self._generation.chunk_size_bytes
        stop = generation.verified_end(index, end)
        length = min(stop * size, self.span.end) - self._position
        length = min(length, SPAN_BYTES_MAX)
        start = self._position
        self._position += length
        self._count(start, length)
        return FileSpan(generation.files.data_fd, start, length)

    async def _verify(self, index: int, end: int) -> None:
        """Verify recorded chunks, so that they may be sent from the file."""
        generation = self._generation
        stop = index + 1
        limit = min(end, index + max(1, CHECK_BYTES // generation.chunk_size_bytes))
        while stop < limit and generation.states[stop] == ChunkState.DURABLE:
            stop += 1
        if await generation.check(index, stop):
            self._owner.note_corrupt(generation)

    async def _from_memory(self, index: int) -> AsyncGenerator[Piece, None]:
        """Yield a chunk that is not synced yet, as long as it is not, from checked bytes."""
        generation = self._generation
        buffer = await generation.memory.borrow(index)
        if buffer is None:
            self._owner.note_corrupt(generation)
            return
        begin = index * generation.chunk_size_bytes
        end = min(begin + len(buffer.data), self.span.end)
        lease = Lease(buffer)
        try:
            while self._position < end and generation.states[index] == ChunkState.BUFFERED:
                start, stop = self._position, min(self._position + SLICE_BYTES, end)
                piece = lease.copy(start - begin, stop - begin, is_last=stop == end)
                if piece is None:
                    return
                self._position = stop
                self._count(start, len(piece))
                yield piece
        finally:
            lease.end()

    async def _await_chunk(self, index: int) -> None:
        """Wait for a missing chunk, having it fetched if nobody does."""
        generation = self._generation
        if not (self._may_store and await self._arrange(index)):
            await self._open_relay(index)
            return
        fetch = generation.fetches.get(index)
        if not isinstance(fetch, Fetch):
            return
        self._join(fetch)
        await fetch.wait(index)
        if fetch.error is not None and not generation.is_present(index):
            if isinstance(fetch.error, BlobChanged):
                self._owner.retire(generation)
            raise fetch.error

    def _count(self, start: int, length: int, sign: int = 1) -> None:
        counters, here = self._owner.origin.counters, self._was_here
        if not isinstance(here, bytes):
            hit = length if here else 0
        else:
            hit, size, at, end = 0, self._generation.chunk_size_bytes, start, start + length
            while at < end:
                index, stop = at // size, min(end, (at // size + 1) * size)
                hit += (stop - at) * (here[index - self._first] >= ChunkState.BUFFERED)
                at = stop
        counters.hit_bytes += sign * hit
        counters.miss_bytes += sign * (length - hit)

    @override
    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        begun = self._pieces_begun
        if begun is not None and not begun.ag_running:
            await begun.aclose()  # it may hold memory of the pool
        for fetch in self._fetches:
            fetch.leave()
        self._fetches.clear()
        if self._check is not None:
            self._check.leave()
        self._generation.readers -= 1
        self._owner.release_read(self._generation)
        if self._relay is not None:
            await self._relay.aclose()
