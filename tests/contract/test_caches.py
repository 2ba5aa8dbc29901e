"""Every cache manager passes the conformance kit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from blobcache_storage.cache.base import BlobCacheMgr
from blobcache_storage.cache.dummycache import DummyCacheMgr
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import BackendConfig, CacheConfig, ConfigV2, LocalFSConfig
from blobcache_storage.testing.cache_suite import CacheSuite
from blobcache_storage.testing.memory_backend import MemoryBackend

BACKEND = BackendConfig("localfs", localfs=LocalFSConfig("/nowhere"))


class TestFileCache(CacheSuite):
    """Chunks of 64 KiB, the default."""

    stores: ClassVar[bool] = True
    chunk_size_bytes: ClassVar[int] = 64 * 1024

    @override
    async def open_manager(
        self, backend: MemoryBackend, directory: Path
    ) -> AsyncIterator[BlobCacheMgr]:
        runtime = StorageRuntime()
        root = await asyncio.to_thread(CacheRoot.open, str(directory), runtime)
        cache = CacheConfig(chunk_size_bytes=self.chunk_size_bytes)
        manager = FileCacheMgr(ConfigV2("ns/a", BACKEND, cache, "uid"), backend, runtime, root)
        manager.init()
        yield manager
        await asyncio.to_thread(root.close)
        await runtime.close()


class TestFileCacheOfSmallChunks(TestFileCache):
    """Many chunks to a blob."""

    chunk_size_bytes: ClassVar[int] = 16 * 1024


class TestFileCacheOfLargeChunks(TestFileCache):
    """A blob smaller than its only chunk."""

    chunk_size_bytes: ClassVar[int] = 1024 * 1024


class TestDummyCache(CacheSuite):
    """Nothing is kept."""

    stores: ClassVar[bool] = False

    @override
    async def open_manager(
        self, backend: MemoryBackend, directory: Path
    ) -> AsyncIterator[BlobCacheMgr]:
        cache = CacheConfig(type="")
        manager = DummyCacheMgr(ConfigV2("ns/a", BACKEND, cache, "uid"), backend)
        manager.init()
        yield manager
