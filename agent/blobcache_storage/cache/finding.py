"""From a blob id to the generation to read, asking the origin where nothing is cached yet.

The first ranged GET of a blob tells its version, and its body is the first fetch: there is no HEAD
before it. All who ask meanwhile wait for that one answer.
"""

from __future__ import annotations

from collections.abc import Callable

from blobcache_storage.backend.base import FetchStream
from blobcache_storage.cache.chunk_map import is_representable
from blobcache_storage.cache.fill import Fetch, Origin
from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.pools import Throttle
from blobcache_storage.cache.reclaim import Reclaimer
from blobcache_storage.cache.runtime import Clock
from blobcache_storage.cache.shared import SharedWork
from blobcache_storage.cache.table import BlobTable
from blobcache_storage.device import RangeRequest, RequestSource
from blobcache_storage.errors import CacheBusy, RangeNotSatisfiable, StorageError

UNCACHEABLE_SECONDS = 60.0
"""How long a blob without a validator is relayed without asking again whether it has one."""
REMEMBERED_MAX = 4096
"""Blob ids remembered of one kind."""


class Remembered:
    """Blob ids kept in mind for a while; the oldest goes when there are too many."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._until: dict[str, float] = {}

    def add(self, blob_id: str) -> None:
        """Keep an id in mind from now on."""
        if len(self._until) >= REMEMBERED_MAX:
            self._until.pop(next(iter(self._until)))
        self._until[blob_id] = self._clock.monotonic() + self._seconds

    def __contains__(self, blob_id: str) -> bool:
        until = self._until.get(blob_id)
        if until is None:
            return False
        if self._clock.monotonic() < until:
            return True
        del self._until[blob_id]
        return False


class Finder:
    """See the module; belongs to the event loop.

    Args:
        may_store: Whether anything may be stored now.
        may_begin: Whether a blob may be begun of which nothing is stored yet.
    """

    def __init__(
        self,
        table: BlobTable,
        origin: Origin,
        reclaimer: Reclaimer,
        throttle: Throttle,
        clock: Clock,
        chunk_size_bytes: int,
        *,
        may_store: Callable[[], bool],
        may_begin: Callable[[], bool],
    ) -> None:
        self._table = table
        self._origin = origin
        self._reclaimer = reclaimer
        self._throttle = throttle
        self._chunk_size_bytes = chunk_size_bytes
        self._may_store = may_store
        self._may_begin = may_begin
        self._learning: dict[str, SharedWork[Generation | None]] = {}
        self._uncacheable = Remembered(clock, UNCACHEABLE_SECONDS)

    async def find(
        self, blob_id: str, request: RangeRequest, source: RequestSource
    ) -> tuple[Generation, bool] | None:
        """Return the generation to read and whether it is new; None where only a relay can.

        Raises:
            StorageError: The origin does not tell the blob's version.
        """
        while True:
            try:
                generation = await self._table.get(blob_id)
            except CacheBusy:
                return None  # what is cached cannot be read now; the origin has it too
            if generation is not None:
                return generation, False
            if not self._may_begin() or blob_id in self._uncacheable:
                return None
            learning, leads = self._learning.get(blob_id), False
            if learning is not None and learning.is_abandoned:
                await learning.settle()  # its readers left; its end is no answer to us
                continue
            if learning is None:
                leads = True
                learning = SharedWork(self._learn(blob_id, request, source))
                self._learning[blob_id] = learning
            try:
                generation = await learning.wait()
            except RangeNotSatisfiable:
                if leads:
                    raise
                continue  # somebody else's range; ours may be fine
            if generation is None:
                return None
            if not generation.closed and not generation.retired:
                return generation, leads

    async def _learn(
        self, blob_id: str, request: RangeRequest, source: RequestSource
    ) -> Generation | None:
        """Send the first request, which tells the version; its body fills the new generation."""
        try:
            return await self._learn_once(blob_id, request, source)
        except StorageError as error:
            self._origin.note_failure(error)
            raise
        finally:
            self._learning.pop(blob_id, None)

    async def _learn_once(
        self, blob_id: str, request: RangeRequest, source: RequestSource
    ) -> Generation | None:
        stream = await self._first_answer(blob_id, request, source)
        if stream is None:
            version = await self._origin.backend.stat(blob_id)
        else:
            version = stream.version
        if not is_representable(blob_id, version, self._chunk_size_bytes):
            self._uncacheable.add(blob_id)
            if stream is not None:
                await stream.aclose()
            return None
        if not self._may_begin():
            # Suspended, cooling down or destroyed while the origin answered.
            if stream is not None:
                await stream.aclose()
            return None
        generation = self._table.create(blob_id, version, self._chunk_size_bytes)
        if stream is not None:
            await self._fill_from(generation, stream, source)
        return generation

    async def _first_answer(
        self, blob_id: str, request: RangeRequest, source: RequestSource
    ) -> FetchStream | None:
        """Ask for the range in whole chunks; None if the blob is empty."""
        counters, size = self._origin.counters, self._chunk_size_bytes
        segment = self._origin.pace.segment_bytes
        if request.suffix_length is not None:
            asked = RangeRequest(suffix_length=request.suffix_length + size)
            if request.suffix_length == 0:
                asked = RangeRequest(first=0, last=size - 1)
        else:
            first = (request.first or 0) // size * size
            last = first + max(segment, size) - 1
            if request.last is not None:
                last = min(last, (request.last // size + 1) * size - 1)
            asked = RangeRequest(first=first, last=last)
        counters.origin_requests += 1
        try:
            return await self._origin.backend.fetch(blob_id, asked, source=source)
        except RangeNotSatisfiable as error:
            if error.size_bytes == 0:
                return None
            raise
        except StorageError:
            counters.origin_errors += 1
            raise

    async def _fill_from(
        self, generation: Generation, stream: FetchStream, source: RequestSource
    ) -> None:
        """Have an opened answer fill the chunks it covers."""
        size = generation.chunk_size_bytes
        first = -(-stream.span.start // size)
        end = stream.span.end // size
        if stream.span.end == generation.version.size_bytes:
            end = generation.chunk_count
        fetch = None
        try:
            if first < end:
                fetch = await self._start(generation, first, end, source, stream)
        finally:
            if fetch is None:
                await stream.aclose()

    async def start_fetch(
        self, generation: Generation, first: int, end: int, source: RequestSource
    ) -> Fetch | None:
        """Fetch and store absent chunks, making room if need be; None where that cannot be."""
        if not self._may_store():
            return None
        return await self._start(generation, first, end, source, None)

    async def _start(
        self,
        generation: Generation,
        first: int,
        end: int,
        source: RequestSource,
        stream: FetchStream | None,
    ) -> Fetch | None:
        is_prefetch = source is RequestSource.PREFETCH
        throttle = self._throttle if is_prefetch else None

        def start() -> Fetch | None:
            return Fetch.start(
                generation,
                self._origin,
                first,
                end,
                source=source,
                throttle=throttle,
                stream=stream,
            )

        fetch = start()
        if fetch is None and not is_prefetch:
            # While room is made, this very generation must not be what goes.
            generation.readers += 1
            try:
                await self._reclaimer.make_room(generation.disk_bytes(first, end))
            finally:
                generation.readers -= 1
            first_taken = generation.first_taken(first, end)
            if first_taken == first:
                other = generation.fetches.get(first)
                return other if isinstance(other, Fetch) and stream is None else None
            end = first_taken
            fetch = start()
        return fetch
