"""A manager over a backend in memory and a root in a temporary directory."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.cache.base import BlobRead, CacheStatus, FileSpan
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import OPEN_FILES_MAX, Clock, StorageRuntime
from blobcache_storage.config import BackendConfig, CacheConfig, ConfigV2, LocalFSConfig
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import StorageError
from blobcache_storage.testing.memory_backend import MemoryBackend
from blobcache_storage.testing.oracle import ByteOracle

CHUNK = 16 * 1024


def make_config(**cache: object) -> ConfigV2:
    """Return a configuration with small chunks."""
    settings = CacheConfig(chunk_size_bytes=CHUNK)
    return ConfigV2(
        id="ns/name",
        uid="uid-1",
        backend=BackendConfig(type="localfs", localfs=LocalFSConfig("/nowhere"), retry_limit=2),
        cache=replace(settings, **cache),  # type: ignore[arg-type]
    )


async def take(read: BlobRead) -> tuple[bytes, type[Exception] | None]:
    """Return the bytes of a read, spans read from their file, and the error that ended it."""
    parts = []
    try:
        async for piece in read.pieces():
            if isinstance(piece, FileSpan):
                parts.append(os.pread(piece.fd, piece.length, piece.offset))
                assert len(parts[-1]) == piece.length
            else:
                parts.append(bytes(piece))
    except StorageError as error:
        return b"".join(parts), type(error)
    return b"".join(parts), None


async def collect(read: BlobRead) -> bytes:
    """Return all bytes of a read that must succeed."""
    data, error = await take(read)
    assert error is None, error
    return data


class FakeClock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self._now = 1_000_000.0

    def time(self) -> float:
        """Return unix seconds."""
        return self._now

    def monotonic(self) -> float:
        """Return the same."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class Rig:
    """See the module."""

    def __init__(
        self,
        directory: Path,
        *,
        disk: Disk | None = None,
        clock: Clock | None = None,
        backend: MemoryBackend | None = None,
        capacity_bytes: int | None = None,
        min_free_bytes: int = 0,
        capacity_bytes_config: int | None = None,
        open_files_max: int = OPEN_FILES_MAX,
        **cache: object,
    ) -> None:
        self.directory = directory
        cache["capacity_bytes"] = capacity_bytes_config
        self.config = make_config(**cache)
        self.oracle = ByteOracle(7)
        self.backend = backend or MemoryBackend()
        self._disk = disk
        self._open_files_max = open_files_max
        self.clock = clock
        self._capacity_bytes = capacity_bytes
        self._min_free_bytes = min_free_bytes

    async def start(self) -> Rig:
        """Open root and manager."""
        self.runtime = StorageRuntime(
            disk=self._disk, clock=self.clock, open_files_max=self._open_files_max
        )
        self.root = await asyncio.to_thread(
            CacheRoot.open,
            str(self.directory),
            self.runtime,
            capacity_bytes=self._capacity_bytes,
            min_free_bytes=self._min_free_bytes,
        )
        self.manager = FileCacheMgr(self.config, self.backend, self.runtime, self.root)
        self.manager.init()
        return self

    async def stop(self) -> None:
        """Close manager, root and threads."""
        await self.manager.destroy()
        await asyncio.to_thread(self.root.close)
        await self.runtime.close()

    async def restart(self, **cache: object) -> None:
        """Stop and start over the same directory and backend."""
        await self.stop()
        if cache:
            self.config = make_config(**cache)
        await self.start()

    def put(self, blob_id: str, size: int, version: int = 0) -> bytes:
        """Store an oracle's blob at the origin."""
        data = self.oracle.blob(blob_id, version, size)
        self.backend.put(blob_id, data)
        return data

    async def read(
        self, blob_id: str, first: int | None = None, last: int | None = None
    ) -> tuple[bytes, CacheStatus]:
        """Read a range and return its bytes and status."""
        with self.manager.get_blob_cache(BlobInfo(blob_id)) as cache:
            async with await cache.read(RangeRequest(first=first, last=last)) as read:
                return await collect(read), read.status

    async def durable(self) -> None:
        """Wait until everything fetched is recorded."""
        for generation in self.manager.table.open_generations():
            await generation.writer.drain()

    async def settled(self) -> None:
        """Wait until retired generations are gone from the disk."""
        await self.durable()
        await self.manager.table.settled()


__all__ = ["CHUNK", "BlobBackend", "Rig", "collect", "make_config"]
