"""Warming: the blobs of `prefetch.blobs`, fetched without anybody asking.

Warming never harms those who read: it evicts nothing, stops at the high watermark, is throttled,
and a reader who needs what it is fetching lifts the throttle. It goes through the list in order, a
few blobs at a time, and starts over with what failed after a back-off; what is on disk already,
from a former process too, is not fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blobcache_storage.cache.budget import on_disk
from blobcache_storage.cache.fill import Fetch
from blobcache_storage.cache.generation import ChunkState, Generation
from blobcache_storage.cache.reclaim import watermark_bytes
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import CacheConfig
from blobcache_storage.device import BlobInfo, RangeRequest, RequestSource
from blobcache_storage.errors import BlobChanged, DigestMismatch, InvalidBlobId, StorageError

if TYPE_CHECKING:
    from blobcache_storage.cache.filecache import FileCacheMgr

BACK_OFF_SECONDS_MIN = 1.0
BACK_OFF_SECONDS_MAX = 60.0
FETCHES_PER_BLOB_MAX = 2
YIELD_SECONDS_MAX = 1.0
"""How long the next request is put off while readers wait for the same origin."""
EXCEEDS_CAPACITY = "PrefetchExceedsCapacity"


class ExceedsCapacity(StorageError):
    """The next blob would pass the high watermark, and warming evicts nothing."""

    reason = EXCEEDS_CAPACITY


@dataclass(frozen=True, slots=True)
class PrefetchProgress:
    """How far warming is; bytes are durable ones."""

    blobs: int
    blobs_ready: int
    bytes: int
    bytes_ready: int
    problem: str


class Prefetcher:
    """Warms one manager's list; belongs to the event loop."""

    def __init__(self, manager: FileCacheMgr, runtime: StorageRuntime) -> None:
        self._manager = manager
        self._runtime = runtime
        self._blobs: dict[str, BlobInfo] = {}
        self._concurrency = 1
        self._is_on = False
        self._sizes: dict[str, int] = {}
        self._ready: dict[str, int] = {}
        """Generation that was found complete and right, by blob id."""
        self._promised: dict[str, int] = {}
        """Disk that each blob being warmed will take when complete."""
        self._problems: dict[str, StorageError] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def configure(self, cache: CacheConfig) -> None:
        """Take a list; what is under way and still wanted goes on."""
        prefetch = cache.prefetch
        blobs: dict[str, BlobInfo] = {}
        invalid: dict[str, StorageError] = {}
        for blob in prefetch.blobs if prefetch.enable else ():
            try:
                blobs[self._manager.canonical(blob.id)] = blob
            except InvalidBlobId as error:
                blobs[blob.id], invalid[blob.id] = blob, error
        is_on = not cache.suspend and bool(blobs)
        unchanged = (blobs, is_on, prefetch.concurrency) == (
            self._blobs,
            self._is_on,
            self._concurrency,
        )
        self._blobs, self._is_on = blobs, is_on
        self._concurrency = max(1, prefetch.concurrency)
        if unchanged:
            return
        self._problems = invalid
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.wake()

    def digest_of(self, blob_id: str) -> str | None:
        """Return the digest the list gives a blob, if it does."""
        blob = self._blobs.get(blob_id)
        return blob.digest if blob is not None else None

    @property
    def is_working(self) -> bool:
        """Whether anything is being warmed."""
        return self._task is not None and not self._task.done()

    def wake(self) -> None:
        """Start, or look again whether what was refused has room now."""
        if self._stopped or not self._is_on or self.is_working:
            return
        if any(not self._is_ready(blob_id) for blob_id in self._blobs):
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End; returns when nothing runs any more."""
        self._stopped = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    # -- progress ----------------------------------------------------------------------------------

    def progress(self) -> PrefetchProgress:
        """Return how far it is."""
        total = ready = blobs_ready = 0
        for blob_id in self._blobs:
            size = self._size_of(blob_id)
            total += size
            if self._is_ready(blob_id):
                blobs_ready += 1
                ready += size
            else:
                ready += min(self._durable_bytes(blob_id), max(0, size - 1))
        problem = next((p for b in self._blobs if (p := self._problems.get(b))), None)
        text = f"{problem.reason}: {problem}" if problem is not None else ""
        return PrefetchProgress(len(self._blobs), blobs_ready, total, ready, text)

    def _size_of(self, blob_id: str) -> int:
        entry = self._manager.table.folder.entries.get(blob_id)
        if entry is not None:
            return entry.version.size_bytes
        return self._sizes.get(blob_id) or self._blobs[blob_id].size_bytes or 0

    def _is_ready(self, blob_id: str) -> bool:
        entry = self._manager.table.folder.entries.get(blob_id)
        return entry is not None and entry.complete and self._ready.get(blob_id) == entry.generation

    def _durable_bytes(self, blob_id: str) -> int:
        generation = self._manager.table.current(blob_id)
        if generation is not None:
            return generation.durable_bytes
        entry = self._manager.table.folder.entries.get(blob_id)
        return entry.version.size_bytes if entry is not None and entry.complete else 0

    # -- work --------------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay = BACK_OFF_SECONDS_MIN
        while True:
            waiting = [blob_id for blob_id in self._blobs if not self._is_ready(blob_id)]
            workers = [self._work(waiting) for _ in range(self._concurrency)]
            await asyncio.gather(*workers)
            if not any(not self._is_ready(blob_id) for blob_id in self._blobs):
                return
            if any(isinstance(p, ExceedsCapacity) for p in self._problems.values()):
                return  # `wake` looks again
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(2 * delay, BACK_OFF_SECONDS_MAX)

    async def _work(self, waiting: list[str]) -> None:
        while waiting:
            blob_id = waiting.pop(0)
            try:
                try:
                    await self._warm(blob_id)
                finally:
                    self._promised.pop(blob_id, None)
            except ExceedsCapacity as error:
                # In list order: what comes later must not take the room of what was refused.
                self._problems[blob_id] = error
                waiting.clear()
            except StorageError as error:
                self._problems[blob_id] = error
            else:
                self._problems.pop(blob_id, None)

    async def _warm(self, blob_id: str) -> None:
        """Have one blob complete, durable and of the right digest."""
        manager = self._manager
        await self._check_room(blob_id)
        request = RangeRequest(first=0)
        found = await manager.finder.find(blob_id, request, RequestSource.PREFETCH)
        if found is None:
            raise StorageError("the blob cannot be cached now: it has no validator, or no room")
        generation = found[0]
        generation.readers += 1
        try:
            await self._fill(generation)
            await generation.writer.drain()
            if not generation.entry.complete:
                raise StorageError("the blob could not be written to the cache's disk")
            await self._check_digest(generation)
            self._ready[blob_id] = generation.header.generation
        except BlobChanged:
            manager.retire(generation)
            raise
        finally:
            generation.readers -= 1
            manager.release_read(generation)

    async def _fill(self, generation: Generation) -> None:
        count = generation.chunk_count
        while (first := generation.first_absent(0)) < count or generation.fetches:
            joined: list[Fetch] = []
            for source in set(generation.fetches.values()):
                if isinstance(source, Fetch):
                    joined.append(source)
            while first < count and len(joined) < FETCHES_PER_BLOB_MAX:
                segment = self._manager.origin.pace.segment_bytes // generation.chunk_size_bytes
                stop = min(count, first + max(1, segment))
                await self._let_readers_go_first()
                if generation.states[first] != ChunkState.ABSENT:
                    break  # a reader came for it meanwhile
                end = generation.first_taken(first, stop)
                fetch = await self._manager.finder.start_fetch(
                    generation, first, end, RequestSource.PREFETCH
                )
                if fetch is None:
                    self._refuse(generation.disk_bytes(first, end))
                else:
                    joined.append(fetch)
                first = generation.first_absent(end)
            if joined:
                await self._settle(joined)

    async def _let_readers_go_first(self) -> None:
        origin = self._manager.origin
        if not origin.demand:
            return
        origin.quiet.clear()
        with contextlib.suppress(TimeoutError):  # never starved by steady readers
            await asyncio.wait_for(origin.quiet.wait(), YIELD_SECONDS_MAX)

    async def _settle(self, fetches: list[Fetch]) -> None:
        """Wait until one of them ends; the others go on meanwhile, unless it failed."""
        for fetch in fetches:
            fetch.join(RequestSource.PREFETCH)
        waits = [asyncio.ensure_future(fetch.settle()) for fetch in fetches]
        is_well = False
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            is_well = all(fetch.error is None for fetch in fetches)
        finally:
            for fetch, wait in zip(fetches, waits, strict=True):
                wait.cancel()
                if is_well:
                    fetch.stay()
                else:
                    fetch.leave()
        for fetch in fetches:
            if fetch.error is not None:
                raise fetch.error

    async def _check_digest(self, generation: Generation) -> None:
        manager, blob_id = self._manager, generation.entry.blob_id
        sha256 = manager.expected_sha256(blob_id)
        if sha256 is None or generation.whole_sha256 == sha256:
            return
        check = manager.check_of(generation, sha256)
        check.join()
        try:
            while not check.is_done:
                seen = generation.changes.count
                await self._fill(generation)  # what proves wrong on the disk is fetched again
                await check.wait_a_while(seen)
            check.require()
        except DigestMismatch:
            manager.quarantine(generation, blob_id)
            raise
        finally:
            check.leave()
        await generation.writer.drain()

    # -- room --------------------------------------------------------------------------------------

    async def _check_room(self, blob_id: str) -> None:
        """Refuse a blob that would pass the high watermark, before anything of it is fetched."""
        if blob_id not in self._manager.table.folder.entries:
            size = self._sizes.get(blob_id) or self._blobs[blob_id].size_bytes
            if size is None:
                version = await self._manager.stat_origin(blob_id)
                self._sizes[blob_id] = version.size_bytes
        length = on_disk(self._size_of(blob_id))
        self._check_watermark(self._missing(blob_id, length))
        self._promised[blob_id] = length

    def _missing(self, blob_id: str, length: int) -> int:
        """Return how much of the disk a blob will take it does not have yet."""
        entry = self._manager.table.folder.entries.get(blob_id)
        return max(0, length - entry.bytes) if entry is not None else length

    def _check_watermark(self, length: int) -> None:
        cache = self._manager.cache_config
        capacity = cache.capacity_bytes
        if capacity is None:
            return
        # Blobs warmed at the same time have not reserved yet what they will need.
        promised = sum(self._missing(*promise) for promise in self._promised.items())
        high = watermark_bytes(capacity, cache.high_watermark_percent)
        if length and self._manager.used_bytes + promised + length > high:
            self._refuse(length)

    def _refuse(self, length: int) -> None:
        cache = self._manager.cache_config
        needed = sum(self._size_of(blob_id) for blob_id in self._blobs)
        capacity = cache.capacity_bytes
        of = "the disk" if capacity is None else f"{capacity}"
        raise ExceedsCapacity(
            f"needs {max(needed, length)} bytes of {of} (high watermark"
            f" {cache.high_watermark_percent} %)"
        )
