"""DummyCacheMgr: no cache at all; every read is the origin's answer, passed through.

Nydus: `DummyCacheMgr` (storage/src/cache/dummycache.rs). Differs in that gc can reclaim it.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.cache.base import (
    BlobCache,
    BlobCacheMgr,
    BlobRead,
    BlobUsage,
    CacheStatus,
    EvictionOutcome,
    EvictionResult,
    ManagerStats,
    Victim,
)
from blobcache_storage.cache.digest import sha256_of
from blobcache_storage.cache.fill import Origin
from blobcache_storage.cache.handle import Handles
from blobcache_storage.cache.pools import BufferPool
from blobcache_storage.cache.relay import Relay, RelayedRead, require_digest_if_empty
from blobcache_storage.config import CHUNK_SIZE_BYTES_DEFAULT, ConfigV2
from blobcache_storage.device import BlobInfo, BlobVersion, RangeRequest, RequestSource
from blobcache_storage.errors import StorageError


class DummyCacheMgr(BlobCacheMgr):
    """Blobs of one configuration, passed through; belongs to one event loop."""

    def __init__(self, config: ConfigV2, backend: BlobBackend) -> None:
        self._backend = backend
        self._validate = config.get_cache_config().validate
        self._degraded: StorageError | None = None
        self._origin = Origin(
            backend,
            BufferPool(0, 0),
            config.get_backend_config().retry_limit,
            on_failure=self._note_failure,
            on_success=self._note_success,
        )
        self._handles = Handles(self)
        self._destroyed = False

    @override
    def init(self) -> None:
        """Nothing is warmed."""

    @override
    def get_blob_cache(self, blob_info: BlobInfo) -> BlobCache:
        blob_id = self._backend.check_blob_id(blob_info.id)
        return self._handles.open(blob_id, blob_info.digest)

    async def read(
        self, blob_id: str, digest: str | None, request: RangeRequest, source: RequestSource
    ) -> BlobRead:
        """See `BlobCache.read`."""
        counters = self._origin.counters
        counters.requests += 1
        relay = Relay(self._origin, blob_id, None, source)
        await relay.open(request)
        sha256 = sha256_of(self._backend.digest_of(blob_id) or digest) if self._validate else None
        await require_digest_if_empty(relay, sha256)
        read = RelayedRead(
            relay, CacheStatus.BYPASS, sha256=sha256, hold_bytes=CHUNK_SIZE_BYTES_DEFAULT
        )
        read.on_bytes = self._count
        return read

    def _count(self, length: int) -> None:
        self._origin.counters.miss_bytes += length

    async def stat(self, blob_id: str) -> tuple[BlobVersion, CacheStatus]:
        """See `BlobCache.stat`."""
        self._origin.counters.origin_requests += 1
        return await self._backend.stat(blob_id), CacheStatus.BYPASS

    @override
    def gc(self, blob_id: str | None) -> bool:
        return not self._handles

    @override
    def check_stat(self) -> None:
        """There is nothing to look after."""

    @override
    def reconfigure(self, config: ConfigV2) -> None:
        self._backend.reconfigure(config.get_backend_config())
        self._origin.retry_limit = config.get_backend_config().retry_limit
        self._validate = config.get_cache_config().validate

    def _note_failure(self, error: StorageError) -> None:
        self._degraded = error

    def _note_success(self) -> None:
        self._degraded = None

    @override
    def stats(self) -> ManagerStats:
        counters, problem = self._origin.counters, self._degraded
        return ManagerStats(
            requests=counters.requests,
            miss_bytes=counters.miss_bytes,
            origin_bytes=counters.origin_bytes,
            origin_requests=counters.origin_requests,
            origin_errors=counters.origin_errors,
            degraded_reason=problem.reason if problem else "",
            degraded_message=str(problem) if problem else "",
        )

    @override
    def usage(self) -> Sequence[BlobUsage]:
        return ()

    @override
    async def evict(self, victims: Sequence[Victim]) -> list[EvictionResult]:
        return [EvictionResult(victim.blob_id, EvictionOutcome.UNKNOWN) for victim in victims]

    @override
    async def destroy(self) -> None:
        if not self._destroyed:
            self._destroyed = True
            await self._backend.shutdown()
