"""A factory whose managers and backends record what is done to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from typing_extensions import override

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.cache.base import (
    BlobCache,
    BlobCacheMgr,
    BlobRead,
    BlobUsage,
    CacheStatus,
    EvictionResult,
    ManagerStats,
    Victim,
)
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import BackendConfig, ConfigV2
from blobcache_storage.device import BlobInfo, BlobVersion, RangeRequest, RequestSource
from blobcache_storage.errors import ConfigError
from blobcache_storage.factory import BlobFactory, ManagerKey
from blobcache_storage.testing.memory_backend import MemoryBackend


class FakeBlob(BlobCache):
    """A counted handle, and nothing to read."""

    def __init__(self, manager: FakeManager, blob_id: str) -> None:
        self.manager = manager
        self.blob_id = blob_id
        manager.handles.append(self)

    @override
    async def read(
        self, request: RangeRequest, *, source: RequestSource = RequestSource.ON_DEMAND
    ) -> BlobRead:
        raise NotImplementedError

    @override
    async def stat(self) -> tuple[BlobVersion, CacheStatus]:
        raise NotImplementedError

    @override
    def close(self) -> None:
        if self in self.manager.handles:
            self.manager.handles.remove(self)


class FakeManager(BlobCacheMgr):
    """Holds what was opened; fails where told to."""

    def __init__(self, key: ManagerKey, config: ConfigV2, backend: BlobBackend) -> None:
        self.key = key
        self.configs = [config]
        self.backend = backend
        self.handles: list[FakeBlob] = []
        self.blobs: set[str] = set()
        self.checks = 0
        self.checked_thrice = asyncio.Event()
        self.started = False
        self.destroyed = 0
        self.check_error: Exception | None = None
        self.destroy_error: Exception | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    @override
    def init(self) -> None:
        self.started = True

    @override
    def get_blob_cache(self, blob_info: BlobInfo) -> BlobCache:
        blob_id = self.backend.check_blob_id(blob_info.id)
        self.blobs.add(blob_id)
        return FakeBlob(self, blob_id)

    @override
    def gc(self, blob_id: str | None) -> bool:
        used = {handle.blob_id for handle in self.handles}
        self.blobs -= (self.blobs if blob_id is None else {blob_id}) - used
        return not self.blobs

    @override
    def check_stat(self) -> None:
        self.checks += 1
        if self.checks == 3:
            self.checked_thrice.set()
        if self.check_error is not None:
            raise self.check_error

    @override
    def reconfigure(self, config: ConfigV2) -> None:
        self.configs.append(config)

    @override
    def stats(self) -> ManagerStats:
        return ManagerStats()

    @override
    def usage(self) -> Sequence[BlobUsage]:
        return []

    @override
    async def evict(self, victims: Sequence[Victim]) -> list[EvictionResult]:
        return []

    @override
    async def destroy(self) -> None:
        await self.may_end.wait()
        self.destroyed += 1
        await self.backend.shutdown()
        if self.destroy_error is not None:
            raise self.destroy_error


class RecordingFactory(BlobFactory):
    """The real factory with fake managers over backends in memory."""

    def __init__(self, runtime: StorageRuntime) -> None:
        super().__init__(runtime, cast("Any", None), open_backend=self._open_memory)
        self.made: list[FakeManager] = []
        self.backends: list[MemoryBackend] = []
        self.on_make: Callable[[FakeManager], None] = lambda manager: None

    def _open_memory(self, config: BackendConfig, *, environment: object) -> BlobBackend:
        if config.type != "s3":
            raise ConfigError(f"unsupported backend type '{config.type}'")
        self.backends.append(MemoryBackend())
        return self.backends[-1]

    @override
    def _new_manager(self, key: ManagerKey, config: ConfigV2, blob_id: str) -> BlobCacheMgr:
        backend = self.new_backend(config.get_backend_config(), blob_id)
        manager = FakeManager(key, config, backend)
        self.made.append(manager)
        self.on_make(manager)
        return manager


def with_backend(config: ConfigV2, **changes: Any) -> ConfigV2:
    """Change fields of the backend section."""
    return replace(config, backend=replace(config.get_backend_config(), **changes))


def with_cache(config: ConfigV2, **changes: Any) -> ConfigV2:
    """Change fields of the cache section."""
    return replace(config, cache=replace(config.get_cache_config(), **changes))
