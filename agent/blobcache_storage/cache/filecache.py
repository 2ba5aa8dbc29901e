"""FileCacheMgr: blobs cached in files, by chunks.

The life of a read: `FileCacheMgr.read` -> the current generation (`table`), or a first ranged GET
that tells the version (`_learn`) -> `CachedRead` (`reading`), whose misses are fetched and stored
(`fill`, `flush`) or, where the cache may not or cannot store, relayed (`relay`).

Nydus: `FileCacheMgr` (storage/src/cache/filecache). Differs in quotas and eviction, in the order
of writing, in verification on every serve, and in knowing versions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from typing_extensions import override

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.cache.base import (
    BlobCache,
    BlobCacheMgr,
    BlobRead,
    BlobUsage,
    CacheStatus,
    EvictionResult,
    Hit,
    ManagerStats,
    Victim,
)
from blobcache_storage.cache.chunk_map import (
    CHUNK_SIZE_BYTES_MAX,
    CHUNK_SIZE_BYTES_MIN,
)
from blobcache_storage.cache.digest import WholeCheck, sha256_of
from blobcache_storage.cache.disk import cache_error
from blobcache_storage.cache.fill import Fetch, Origin
from blobcache_storage.cache.finding import Finder, Remembered
from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.handle import Handles
from blobcache_storage.cache.hits import find_hit
from blobcache_storage.cache.pools import Throttle, WorkerPool
from blobcache_storage.cache.prefetch import Prefetcher
from blobcache_storage.cache.reading import CachedRead
from blobcache_storage.cache.reclaim import Reclaimer
from blobcache_storage.cache.relay import Relay, RelayedRead, require_digest_if_empty
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.cache.scrub import Scrubber
from blobcache_storage.cache.table import BlobTable
from blobcache_storage.config import CacheConfig, ConfigV2
from blobcache_storage.device import (
    BlobInfo,
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
)
from blobcache_storage.errors import (
    BlobChanged,
    CacheError,
    ConfigError,
    DigestMismatch,
    StorageError,
)

COOL_DOWN_SECONDS = 30.0
"""After a failed write or sync nothing is stored for so long."""
QUARANTINE_SECONDS = 60.0
"""How long a blob with the wrong digest is refused without asking the origin."""
READ_AHEAD_BYTES_MIN = 256 * 1024
"""First read-ahead of a reader whose requests follow one another; doubles with each."""

_log = logging.getLogger(__name__)


def check_chunk_size(chunk_size_bytes: int) -> int:
    """Return a chunk size that is one.

    Raises:
        ConfigError: It is not.
    """
    is_power = chunk_size_bytes > 0 and not chunk_size_bytes & (chunk_size_bytes - 1)
    if not is_power or not CHUNK_SIZE_BYTES_MIN <= chunk_size_bytes <= CHUNK_SIZE_BYTES_MAX:
        raise ConfigError(
            f"the chunk size must be a power of two between {CHUNK_SIZE_BYTES_MIN} and"
            f" {CHUNK_SIZE_BYTES_MAX} bytes, not {chunk_size_bytes}"
        )
    return chunk_size_bytes


def _mismatch(blob_id: str) -> DigestMismatch:
    return DigestMismatch(f"the blob '{blob_id}' has not the digest that names it")


class FileCacheMgr(BlobCacheMgr):
    """All blobs of one configuration; belongs to one event loop. See the module.

    Args:
        config: Its `cache.work_dir` is not used: the root says where.
        backend: The manager's own; shut down with it.
        runtime: Shared by all managers of the process.
        root: Open, and the one directory all managers share.

    Raises:
        ConfigError: The configuration cannot be used, or has a manager already.
    """

    def __init__(
        self, config: ConfigV2, backend: BlobBackend, runtime: StorageRuntime, root: CacheRoot
    ) -> None:
        cache = config.get_cache_config()
        self._chunk_size_bytes = check_chunk_size(cache.chunk_size_bytes)
        self._cache = cache
        self._backend = backend
        self._runtime = runtime
        self._root = root
        runtime.ensure_buffers(self._chunk_size_bytes)
        self.origin = Origin(
            backend,
            runtime.buffers,
            config.get_backend_config().retry_limit,
            on_failure=self._note_failure,
            on_success=self._note_success,
        )
        self._folder = root.adopt(config)
        self._folder.budget.capacity_bytes = cache.capacity_bytes
        self.table = BlobTable(self._folder, runtime, self._on_disk_error)
        self.reclaimer = Reclaimer(root, self.table, self.origin.counters, cache)
        root.members[self._folder.name] = self.reclaimer
        self._handles = Handles(self)
        self._checks: dict[Generation, WholeCheck] = {}
        self._quarantined = Remembered(runtime.clock, QUARANTINE_SECONDS)
        self._cool_until = 0.0
        self._degraded: StorageError | None = None
        self._disk_problem: CacheError | None = None
        self._corrupt_logged = False
        self._destroyed = False
        self.throttle = Throttle(cache.prefetch.bytes_per_second_limit)
        self.finder = Finder(
            self.table,
            self.origin,
            self.reclaimer,
            self.throttle,
            runtime.clock,
            self._chunk_size_bytes,
            may_store=self._may_store,
            may_begin=lambda: self._may_store() and not runtime.open_files.is_exhausted,
        )
        self._prefetcher = Prefetcher(self, runtime)
        self._scrubber = Scrubber(self.table, runtime, self.note_corrupt)

    # -- handles -----------------------------------------------------------------------------------

    @override
    def init(self) -> None:
        self._prefetcher.configure(self._cache)

    @override
    def get_blob_cache(self, blob_info: BlobInfo) -> BlobCache:
        blob_id = self._backend.check_blob_id(blob_info.id)
        return self._handles.open(blob_id, blob_info.digest)

    @override
    def gc(self, blob_id: str | None) -> bool:
        if blob_id is None:
            for generation in self.table.open_generations():
                if generation.entry.blob_id not in self._handles:
                    self.table.close_idle(generation.entry.blob_id)
        elif blob_id not in self._handles:
            self.table.close_idle(blob_id)
        return not (self._handles or self.table.is_open or self._prefetcher.is_working)

    # -- reading -----------------------------------------------------------------------------------

    async def stat(self, blob_id: str) -> tuple[BlobVersion, CacheStatus]:
        """See `BlobCache.stat`."""
        entry = self._folder.entries.get(blob_id)
        if entry is not None and entry.bytes:
            return entry.version, CacheStatus.HIT
        return await self.stat_origin(blob_id), self._relay_status()

    async def stat_origin(self, blob_id: str) -> BlobVersion:
        """Ask the origin for a blob's version."""
        self.origin.counters.origin_requests += 1
        return await self._backend.stat(blob_id)

    def canonical(self, blob_id: str) -> str:
        """Return the canonical form of an id.

        Raises:
            InvalidBlobId: There can be no such blob.
        """
        return self._backend.check_blob_id(blob_id)

    async def read(
        self, blob_id: str, digest: str | None, request: RangeRequest, source: RequestSource
    ) -> BlobRead:
        """See `BlobCache.read`; a blob that changes before the head was sent is read anew once."""
        self.origin.counters.requests += 1
        sha256 = self.expected_sha256(blob_id, digest)
        try:
            return await self._read(blob_id, sha256, request, source)
        except BlobChanged:
            return await self._read(blob_id, sha256, request, source)

    def expected_sha256(self, blob_id: str, digest: str | None = None) -> bytes | None:
        """Return the digest a blob must have, where its name or a list says one."""
        if not self._cache.validate:
            return None
        named = self._backend.digest_of(blob_id) or digest or self._prefetcher.digest_of(blob_id)
        return sha256_of(named)

    async def _read(
        self, blob_id: str, sha256: bytes | None, request: RangeRequest, source: RequestSource
    ) -> BlobRead:
        if self.is_quarantined(blob_id):
            raise _mismatch(blob_id)
        found = await self.finder.find(blob_id, request, source)
        if found is None:
            return await self._relay_read(blob_id, sha256, request, source)
        generation, is_new = found
        span = request.resolve(generation.version.size_bytes)
        is_whole = span.length == generation.version.size_bytes
        check = None
        if sha256 is not None and is_whole and generation.whole_sha256 != sha256:
            check = self.check_of(generation, sha256)
        status = self._status(generation, span, is_new, self._may_store())
        ahead_end = self.ahead_end(generation, span.start, span.end)
        read = self.new_read(
            generation, span, status, source=source, check=check, ahead_end=ahead_end
        )
        try:
            await read.prepare()
        except BaseException:
            await read.aclose()
            raise
        self.table.touch(generation)
        return read

    def new_read(
        self,
        generation: Generation,
        span: ByteRange,
        status: CacheStatus,
        *,
        source: RequestSource = RequestSource.ON_DEMAND,
        check: WholeCheck | None = None,
        ahead_end: int,
    ) -> CachedRead:
        """Return a read, which holds the generation from now on; see there."""
        return CachedRead(
            self,
            generation,
            span,
            status,
            source,
            check=check,
            may_store=self._may_store(),
            relay_status=self._relay_status(),
            ahead_end=ahead_end,
        )

    @override
    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        return None if self._destroyed else find_hit(self, blob_id, first, last)

    def _status(
        self, generation: Generation, span: ByteRange, is_new: bool, may_store: bool
    ) -> CacheStatus:
        """Return how the read is answered, as of now; a relay makes it a plain miss."""
        if is_new and may_store:
            return CacheStatus.MISS_STORED
        first, end = generation.chunks_of(span)
        present = generation.present_in(first, end)
        if present == end - first and not (is_new and not span.length):
            return CacheStatus.HIT
        if not may_store:
            return self._relay_status()
        return CacheStatus.PARTIAL_STORED if present else CacheStatus.MISS_STORED

    def _relay_status(self) -> CacheStatus:
        """`bypass` where the configuration says not to store, `miss` where it cannot be done."""
        return CacheStatus.BYPASS if self._cache.suspend else CacheStatus.MISS

    def _may_store(self) -> bool:
        cooling = self._runtime.clock.monotonic() < self._cool_until
        return not (self._cache.suspend or cooling or self._destroyed)

    def ahead_end(self, generation: Generation, start: int, end: int) -> int:
        """Note a read; return up to which chunk to fetch: further if reads follow one another."""
        last = generation.last_read_end
        follows = last is not None and 0 <= start - last < generation.chunk_size_bytes
        if follows and end > start:
            doubled = max(2 * generation.read_ahead_bytes, READ_AHEAD_BYTES_MIN)
            generation.read_ahead_bytes = min(doubled, self.origin.pace.segment_bytes)
        else:
            generation.read_ahead_bytes = 0
        generation.last_read_end = end
        if end == start:
            return 0
        ahead = min(end + generation.read_ahead_bytes, generation.version.size_bytes)
        return (ahead - 1) // generation.chunk_size_bytes + 1

    async def _relay_read(
        self, blob_id: str, sha256: bytes | None, request: RangeRequest, source: RequestSource
    ) -> BlobRead:
        """Read past the cache: suspended, cooling down, or a blob that cannot be cached."""
        relay = Relay(self.origin, blob_id, None, source)
        await relay.open(request)
        try:
            await require_digest_if_empty(relay, sha256)
        except DigestMismatch:
            self.quarantine(None, blob_id)
            raise
        read = RelayedRead(
            relay,
            self._relay_status(),
            hashing=self._runtime.hashing,
            sha256=sha256,
            hold_bytes=self._chunk_size_bytes,
        )
        read.on_mismatch = lambda: self.quarantine(None, blob_id)
        read.on_bytes = self._count_miss
        return read

    def _count_miss(self, length: int) -> None:
        self.origin.counters.miss_bytes += length

    def check_of(self, generation: Generation, sha256: bytes) -> WholeCheck:
        """Return the check that all whole reads of a generation share."""
        check = self._checks.get(generation)
        if check is None or check.sha256 != sha256:
            check = self._checks[generation] = WholeCheck(generation, sha256)
        return check

    async def start_fetch(
        self, generation: Generation, first: int, end: int, source: RequestSource
    ) -> Fetch | None:
        """See `ReadOwner`."""
        return await self.finder.start_fetch(generation, first, end, source)

    # -- what reads tell ---------------------------------------------------------------------------

    def retire(self, generation: Generation) -> None:
        """See `ReadOwner`."""
        self.table.retire(generation)

    def release_read(self, generation: Generation) -> None:
        """See `ReadOwner`."""
        check = self._checks.get(generation)
        if check is not None and not check.is_wanted:
            del self._checks[generation]
        self.table.release(generation)

    def quarantine(self, generation: Generation | None, blob_id: str) -> None:
        """See `ReadOwner`."""
        if generation is not None:
            self.table.retire(generation)
        self._quarantined.add(blob_id)
        self._note_failure(_mismatch(blob_id))
        _log.warning("Quarantined a blob of the wrong digest", extra={"blob_id": blob_id})

    def note_corrupt(self, generation: Generation) -> None:
        """See `ReadOwner`."""
        self.origin.counters.corrupt_chunks += 1
        if not self._corrupt_logged:
            self._corrupt_logged = True
            _log.warning(
                "Discarded a cached chunk that was not what was recorded",
                extra={"blob_id": generation.entry.blob_id, "config_id": self._folder.config_id},
            )

    @property
    def hashing(self) -> WorkerPool:
        """See `ReadOwner`."""
        return self._runtime.hashing

    def _on_disk_error(self, error: OSError) -> None:
        problem = cache_error(error)
        self._disk_problem = problem
        self._cool_until = self._runtime.clock.monotonic() + COOL_DOWN_SECONDS
        _log.warning("Stopped storing for a while", extra={"reason": problem.reason})

    def _note_failure(self, error: StorageError) -> None:
        self._degraded = error

    def _note_success(self) -> None:
        self._degraded = None

    def is_quarantined(self, blob_id: str) -> bool:
        """Whether a blob is refused, having proved to be wrong."""
        return blob_id in self._quarantined

    # -- looking after itself ----------------------------------------------------------------------

    @override
    def check_stat(self) -> None:
        if not self._destroyed:
            self.table.spawn(self._look_after())

    async def _look_after(self) -> None:
        if self._runtime.clock.monotonic() >= self._cool_until:
            self._disk_problem = None
        await self.reclaimer.evict_expired()
        budget = self._folder.budget
        if not budget.fits(0):
            await self.reclaimer.make_room(0)
        try:
            await self._root.look_after()
        except OSError as error:
            _log.warning("Could not look after the root", extra={"error": str(cache_error(error))})
        self._prefetcher.wake()
        self._scrubber.wake()

    @override
    def reconfigure(self, config: ConfigV2) -> None:
        cache = config.get_cache_config()
        self._backend.reconfigure(config.get_backend_config())
        self.origin.retry_limit = config.get_backend_config().retry_limit
        self._cache = self.reclaimer.cache = cache
        self._folder.budget.capacity_bytes = cache.capacity_bytes
        self.throttle.bytes_per_second = cache.prefetch.bytes_per_second_limit
        self._prefetcher.configure(cache)

    @property
    def cache_config(self) -> CacheConfig:
        """The cache section in force."""
        return self._cache

    @property
    def used_bytes(self) -> int:
        """Bytes in use or reserved."""
        return self._folder.budget.used_bytes

    @override
    def stats(self) -> ManagerStats:
        counters = self.origin.counters
        problem: StorageError | None = self._disk_problem or self._degraded
        progress = self._prefetcher.progress()
        return ManagerStats(
            bytes=self.used_bytes,
            blobs=sum(1 for entry in self._folder.entries.values() if entry.bytes),
            requests=counters.requests,
            hit_bytes=counters.hit_bytes,
            miss_bytes=counters.miss_bytes,
            origin_bytes=counters.origin_bytes,
            origin_requests=counters.origin_requests,
            origin_errors=counters.origin_errors,
            evicted_bytes=counters.evicted_bytes,
            evicted_blobs=counters.evicted_blobs,
            prefetch_blobs=progress.blobs,
            prefetch_blobs_ready=progress.blobs_ready,
            prefetch_bytes=progress.bytes,
            prefetch_bytes_ready=progress.bytes_ready,
            prefetch_problem=progress.problem,
            degraded_reason=problem.reason if problem else "",
            degraded_message=str(problem) if problem else "",
        )

    @override
    def usage(self) -> Sequence[BlobUsage]:
        return [
            BlobUsage(
                blob_id=candidate.blob_id,
                version=candidate.version,
                bytes=candidate.bytes,
                last_read_time=candidate.last_read_time,
                in_use=candidate.in_use,
                pinned=candidate.pinned,
                wanted=candidate.wanted,
                complete=candidate.complete,
            )
            for candidate in self.reclaimer.candidates()
            if candidate.bytes
        ]

    @override
    async def evict(self, victims: Sequence[Victim]) -> list[EvictionResult]:
        return await self.reclaimer.evict(victims)

    @override
    async def destroy(self) -> None:
        if self._destroyed:
            return
        self._destroyed = True
        await self._prefetcher.stop()
        await self._scrubber.stop()
        await self.table.close()
        self._root.release(self._folder)
        try:
            await self._root.write_index()
        except OSError as error:
            _log.warning("Could not write the index", extra={"error": str(cache_error(error))})
        if self._folder.doomed:
            await self._root.delete_config(self._folder.uid)
        await self._backend.shutdown()
