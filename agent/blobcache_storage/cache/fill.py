"""One fetch: a run of missing chunks, one origin request, many who wait.

Chunks go to the generation as each completes. The fetch ends early only when nobody is interested
any more. Bounds: at most two requests at once (the second after 2 s without progress, while
somebody waits), at most `retry_limit` resumes without progress, one chunk of memory per request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from crc32c import crc32c

from blobcache_storage.backend.base import BlobBackend, FetchStream
from blobcache_storage.cache.chunk_memory import ChunkBuffer
from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.pace import OriginPace
from blobcache_storage.cache.pools import BufferPool, Throttle
from blobcache_storage.device import BlobVersion, RangeRequest, RequestSource
from blobcache_storage.errors import (
    BackendError,
    BlobChanged,
    BlobNotFound,
    CacheBusy,
    OriginProtocolError,
    RangeNotSatisfiable,
    StorageError,
)

STALL_SECONDS = 2.0
"""Without progress for so long, a competing request is sent."""
CLAIM_BYTES = 64 * 1024 * 1024
"""Of an answer longer than asked for so much is claimed ahead: as far as readers look ahead."""
CLAIM_CHUNKS = 64
"""Claimed with one reservation."""
RESUME_DELAY_SECONDS = 0.05
RESUMES_MAX = 64
"""Resumes of one fetch in all, however much each brings."""
FRUIT_BYTES = 64 * 1024
"""A request that brought less, and no whole chunk, was fruitless: an origin that drips is one that
fails, and its readers must be told in seconds."""

NO_FAILURES = (BlobNotFound, BlobChanged, RangeNotSatisfiable, CacheBusy)
"""What does not make a configuration degraded: a reader may ask for what there is not."""


@dataclass(slots=True)
class Counters:
    """What one manager did since the process started."""

    requests: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    origin_bytes: int = 0
    origin_requests: int = 0
    origin_errors: int = 0
    evicted_bytes: int = 0
    evicted_blobs: int = 0
    corrupt_chunks: int = 0


@dataclass(slots=True)
class Origin:
    """An origin as a manager's fetches share it."""

    backend: BlobBackend
    buffers: BufferPool
    retry_limit: int
    counters: Counters = field(default_factory=Counters)
    pace: OriginPace = field(default_factory=OriginPace)
    demand: int = 0
    """Fetches under way that readers wait for."""
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last of them ends; who waits clears it first."""
    on_failure: Callable[[StorageError], None] = lambda _: None
    on_success: Callable[[], None] = lambda: None

    def note_failure(self, error: StorageError) -> None:
        """Tell of a failure, unless it is the reader's own or no failure of the origin."""
        if not isinstance(error, NO_FAILURES):
            self.on_failure(error)


@dataclass(slots=True)
class _Assembly:
    """A chunk being put together by one request."""

    position: int
    """Blob offset of the next byte."""
    buffer: ChunkBuffer | None = None
    filled: int = 0
    crc: int = 0
    is_answered: bool = False

    def drop(self) -> None:
        """Give the unfinished chunk's memory back."""
        if self.buffer is not None:
            self.buffer.release()
            self.buffer = None
        self.filled = self.crc = 0


class Fetch:
    """See the module. Create with `start`; belongs to the event loop."""

    def __init__(
        self,
        generation: Generation,
        origin: Origin,
        source: RequestSource,
        throttle: Throttle | None,
    ) -> None:
        self._generation = generation
        self._origin = origin
        self._source = source
        self._throttle = throttle
        self._left: set[int] = set()
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}
        self._interested = 0
        self._demanded = False
        self._lifted = asyncio.Event()
        self._streams: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._last_progress = 0.0
        self._held = 0
        """Requests that wait for us (memory, throttle), not for the origin."""
        self._competed = False
        self._started = False
        self._head_known = False
        self._head_waiters: list[asyncio.Future[None]] = []
        self._first = 0
        self._end = 0
        self._whole_end = 0
        """Where the answer ends, if it goes on beyond what was asked for."""
        self.lingers = False
        """Goes on with nobody interested: a bounded read-ahead."""
        self.ended = False
        self.error: StorageError | None = None

    @property
    def end(self) -> int:
        """One past the last chunk claimed, so far."""
        return self._end

    @classmethod
    def start(
        cls,
        generation: Generation,
        origin: Origin,
        first: int,
        end: int,
        *,
        source: RequestSource,
        throttle: Throttle | None = None,
        stream: FetchStream | None = None,
    ) -> Fetch | None:
        """Claim the absent chunks `[first, end)` and begin; None if there is no room for them.

        Args:
            stream: An answer that was opened already and holds these chunks; it is the fetch's
                from now on, unless None is returned.
        """
        fetch = cls(generation, origin, source, throttle)
        if not generation.claim(first, end, fetch):
            return None
        fetch._left.update(range(first, end))
        fetch._first, fetch._end = first, end
        if source is RequestSource.ON_DEMAND:
            fetch._demand()
        loop = asyncio.get_running_loop()
        fetch._last_progress = loop.time()
        if stream is not None:
            fetch._note_head(stream)
        fetch._task = loop.create_task(fetch._supervise(stream))
        return fetch

    # -- those who wait ----------------------------------------------------------------------------

    def join(self, source: RequestSource) -> None:
        """Add somebody who is interested; demand lifts a prefetch's throttle."""
        self._interested += 1
        if source is RequestSource.ON_DEMAND:
            self._demand()
            self._lifted.set()

    def _demand(self) -> None:
        if not self._demanded and not self.ended:
            self._demanded = True
            self._origin.demand += 1

    def leave(self) -> None:
        """Take somebody's interest back; the last to go ends the fetch."""
        self._interested -= 1
        assert self._interested >= 0, "a fetch was left twice"
        if not self._interested and not self.lingers:
            self.cancel()

    def stay(self) -> None:
        """Take an interest back without ending the fetch: whoever says so comes again."""
        self._interested -= 1
        assert self._interested >= 0, "a fetch was left twice"

    async def wait_head(self) -> None:
        """Return once the origin has answered.

        Raises:
            StorageError: It did not, or not with these bytes.
        """
        if not self._head_known and not self.ended:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._head_waiters.append(waiter)
            await waiter
        if self.error is not None:
            raise self.error

    async def wait(self, index: int) -> None:
        """Return when a chunk was published, or will not be by this fetch."""
        if self.ended or index not in self._left:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(index, []).append(waiter)
        await waiter

    def cancel(self) -> None:
        """End it at once; its chunks are absent when this returns."""
        if not self.ended:
            self._end_now()
            # A task cancelled before its first step would never close its stream.
            if self._started and self._task is not None:
                self._task.cancel()

    async def settle(self) -> None:
        """Return when its requests have ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _end_now(self) -> None:
        """Give up what is left and wake all who wait; they look at `error`."""
        self.ended = True
        if self._demanded:
            self._origin.demand -= 1
            if not self._origin.demand:
                self._origin.quiet.set()
        self._generation.unclaim(self, self._left)
        self._left.clear()
        for waiters in self._waiters.values():
            _wake(waiters)
        self._waiters.clear()
        _wake(self._head_waiters)

    # -- requests ----------------------------------------------------------------------------------

    async def _supervise(self, stream: FetchStream | None) -> None:
        self._started = True
        try:
            if not self.ended:
                self._spawn(stream)
            while self._streams and self._left:
                await self._watch()
        finally:
            if not self.ended:
                self._end_now()
            for task in self._streams:
                task.cancel()
            if self._streams:
                await asyncio.wait(self._streams)
            if stream is not None:
                await stream.aclose()

    def _spawn(self, stream: FetchStream | None) -> None:
        self._streams.add(asyncio.get_running_loop().create_task(self._deliver(stream)))

    async def _watch(self) -> None:
        """Wait until a request ends or stalls; then compete, or note the failure."""
        may_compete = not self._competed and self._demanded
        idle = asyncio.get_running_loop().time() - self._last_progress
        timeout = max(0.0, STALL_SECONDS - idle) if may_compete else None
        done, self._streams = await asyncio.wait(
            self._streams, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            if not task.cancelled():
                self._note_end(task.exception())
        if done or not may_compete:
            return
        now = asyncio.get_running_loop().time()
        if self._held:
            self._last_progress = now  # it is we who are slow
        elif now - self._last_progress >= STALL_SECONDS and self._interested:
            # Whichever publishes a chunk first ends the other (`_publish`).
            self._last_progress = now
            self._competed = True
            self._spawn(None)

    def _note_end(self, error: BaseException | None) -> None:
        if error is None or self._streams:
            return
        if not isinstance(error, StorageError):
            # A defect of ours: those who wait must not start over for ever.
            self.error = BackendError(f"the fetch failed unexpectedly: {type(error).__name__}")
            raise error
        self.error = error
        self._origin.note_failure(error)

    async def _deliver(self, stream: FetchStream | None) -> None:
        """Carry one request through, resuming it where it breaks."""
        size = self._generation.chunk_size_bytes
        at = _Assembly((min(self._left) if stream is None else self._first) * size)
        if stream is not None:
            at.position = stream.span.start
        resumes = fruitless = 0
        try:
            while self._left:
                before, left = at.position, len(self._left)
                try:
                    await self._request(at, stream)
                except BackendError as error:
                    self._origin.counters.origin_errors += 1
                    is_fruitful = len(self._left) < left or at.position - before >= FRUIT_BYTES
                    fruitless = 1 if is_fruitful else fruitless + 1
                    resumes += 1
                    # A head that failed the backend asked for as often as it may.
                    may_resume = error.retryable and at.is_answered and resumes <= RESUMES_MAX
                    if not may_resume or fruitless > self._origin.retry_limit:
                        raise
                    await asyncio.sleep(RESUME_DELAY_SECONDS * (1 << min(fruitless, 5)))
                stream = None
        finally:
            at.drop()

    async def _request(self, at: _Assembly, stream: FetchStream | None) -> None:
        """Send one request (or take an opened one) and consume its body."""
        loop, origin, generation = asyncio.get_running_loop(), self._origin, self._generation
        begun = loop.time()
        at.is_answered = stream is not None
        if stream is None:
            self._skip_to_wanted(at)
            last = min(self._end * generation.chunk_size_bytes, generation.version.size_bytes) - 1
            request = RangeRequest(first=at.position, last=last)
            origin.counters.origin_requests += 1
            stream = await origin.backend.fetch(
                generation.entry.blob_id, request, expect=generation.version, source=self._source
            )
            at.is_answered = True
            origin.pace.observe_head(loop.time() - begun)
            begun = loop.time()
        async with stream:
            if not _is_same(stream.version, generation.version):
                # Backends check this too; a mixture of versions is what must never happen.
                raise BlobChanged(f"the origin now has another '{generation.entry.blob_id}'")
            if stream.span.start > at.position:
                raise OriginProtocolError("the origin's answer begins after what was asked for")
            self._note_head(stream)
            if stream.span.start != at.position:
                at.drop()
                at.position = stream.span.start
            await self._consume(at, stream)
            origin.pace.observe_body(at.position - stream.span.start, loop.time() - begun)
            if self._left and at.position >= stream.span.end and self._wants_before(at.position):
                raise OriginProtocolError("the origin's answer ended before what was asked for")

    def _wants_before(self, position: int) -> bool:
        """Whether a chunk is still missing that this request has passed."""
        passed = position // self._generation.chunk_size_bytes
        at_end = position == self._generation.version.size_bytes
        return any(index < passed or at_end for index in self._left)

    def _skip_to_wanted(self, at: _Assembly) -> None:
        """Move on to the first chunk still missing, unless in the middle of one that is."""
        size = self._generation.chunk_size_bytes
        if at.position // size not in self._left or not at.filled:
            at.drop()
            at.position = min(self._left) * size

    def _note_head(self, stream: FetchStream) -> None:
        """Let go those who wait for the head; claim what else a whole answer brings."""
        generation = self._generation
        self._last_progress = asyncio.get_running_loop().time()
        end = generation.chunks_of(stream.span)[1]
        if end > self._end and stream.span.end == generation.version.size_bytes:
            self._whole_end = end
            self._claim_ahead(self._end)
        self._head_known = True
        self._origin.on_success()
        _wake(self._head_waiters)

    def _claim_ahead(self, index: int) -> None:
        """Claim what a whole answer brings, so far ahead: it may be announced longer than it is."""
        generation = self._generation
        stop = min(index + max(1, CLAIM_BYTES // generation.chunk_size_bytes), self._whole_end)
        while self._end < stop or (not self._left and self._end < self._whole_end):
            first = min(generation.first_absent(self._end), self._whole_end)
            if first >= stop and (self._left or first == self._whole_end):
                self._end = first if first == self._whole_end else stop
                return
            end = generation.first_taken(first, min(first + CLAIM_CHUNKS, max(stop, first + 1)))
            if not generation.claim(first, end, self):
                end = first + 1
                if not generation.claim(first, end, self):
                    self._whole_end = self._end  # no room: the rest is not stored
                    return
            self._left.update(range(first, end))
            self._end = end

    async def _consume(self, at: _Assembly, stream: FetchStream) -> None:
        loop, counters = asyncio.get_running_loop(), self._origin.counters
        size = self._generation.chunk_size_bytes
        pieces = aiter(stream)
        while True:
            # Memory first: a piece that waits for memory is memory too, and not the pool's.
            if self._is_next(at) and at.buffer is None:
                at.buffer = await self._new_buffer(at.position // size)
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
            counters.origin_bytes += len(piece)
            self._last_progress = loop.time()
            if self._throttle is not None and not self._lifted.is_set():
                self._held += 1
                try:
                    await self._throttle.spend(len(piece), self._lifted)
                finally:
                    self._held -= 1
            await self._take(at, memoryview(piece))
            if not self._left:
                return

    async def _take(self, at: _Assembly, piece: memoryview) -> None:
        """Put a piece of body where it belongs, publishing each chunk it completes."""
        generation = self._generation
        size = generation.chunk_size_bytes
        while piece:
            index, inside = divmod(at.position, size)
            if index >= generation.chunk_count:
                raise OriginProtocolError("the origin's answer is longer than the blob")
            length = generation.chunk_length(index)
            count = min(len(piece), length - inside)
            if self._is_next(at):
                if at.buffer is None:
                    at.buffer = await self._new_buffer(index)
                part = piece[:count]
                memoryview(at.buffer.data)[inside : inside + count] = part
                at.crc = crc32c(part, at.crc)
                at.filled += count
                if at.filled == length:
                    self._publish(index, at)
            elif at.buffer is not None:
                at.drop()  # a competing request was faster with this chunk
            at.position += count
            piece = piece[count:]

    def _is_next(self, at: _Assembly) -> bool:
        """Whether the request's next byte is the next of a chunk that is wanted."""
        index, inside = divmod(at.position, self._generation.chunk_size_bytes)
        return index in self._left and at.filled == inside

    async def _new_buffer(self, index: int) -> ChunkBuffer:
        length = self._generation.chunk_length(index)
        self._held += 1
        try:
            await self._origin.buffers.acquire(length)
        finally:
            self._held -= 1
        self._last_progress = asyncio.get_running_loop().time()
        return ChunkBuffer(self._origin.buffers, bytearray(length))

    def _publish(self, index: int, at: _Assembly) -> None:
        buffer, crc = at.buffer, at.crc
        assert buffer is not None
        at.buffer, at.filled, at.crc = None, 0, 0
        if index in self._left:
            self._left.discard(index)
            self._generation.publish(self, index, buffer, crc)
            if self._end < self._whole_end:
                self._claim_ahead(index)
            _wake(self._waiters.pop(index, []))
            for task in self._streams:
                if task is not asyncio.current_task():
                    task.cancel()
        else:
            buffer.release()


def _is_same(one: BlobVersion, other: BlobVersion) -> bool:
    """Whether bytes of both are of the same version."""
    return (one.size_bytes, one.validator, one.token) == (
        other.size_bytes,
        other.validator,
        other.token,
    )


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
