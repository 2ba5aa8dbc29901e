"""The conformance kit of caches: what every BlobCacheMgr must do, over a backend in memory.

Inherit from `CacheSuite`, say how a manager is made, and let pytest collect the class. What a
cache may do or leave (store, count hits) is said by class attributes.
"""

from __future__ import annotations

import abc
import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import ClassVar

import pytest

from blobcache_storage.cache.base import BlobCacheMgr, BlobRead, CacheStatus, FileSpan
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import BlobNotFound, InvalidBlobId, OriginDenied, RangeNotSatisfiable
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend
from blobcache_storage.testing.oracle import ByteOracle

SIZE = 300_001
"""Of the suite's blob: no multiple of anything."""


async def read_all(read: BlobRead) -> bytes:
    """Return all bytes of a read, and release it."""
    parts = []
    async with read:
        async for piece in read.pieces():
            if isinstance(piece, FileSpan):
                parts.append(os.pread(piece.fd, piece.length, piece.offset))
            else:
                parts.append(bytes(piece))
    return b"".join(parts)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what background work brings about; it has no event to wait for."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class CacheSuite(abc.ABC):
    """See the module. Tests run in any order, each with a manager of its own."""

    stores: ClassVar[bool]
    """Whether a second read of the same bytes is a hit."""

    oracle = ByteOracle(11)

    @abc.abstractmethod
    def open_manager(self, backend: MemoryBackend, directory: Path) -> AsyncIterator[BlobCacheMgr]:
        """Yield one initialised manager, then end what was made for it."""

    @pytest.fixture
    def backend(self) -> MemoryBackend:
        """The origin."""
        return MemoryBackend()

    @pytest.fixture
    async def manager(self, backend: MemoryBackend, tmp_path: Path) -> AsyncIterator[BlobCacheMgr]:
        """The manager under test; its backend is shut down by `destroy`."""
        async for made in self.open_manager(backend, tmp_path / "root"):
            yield made
            await made.destroy()
            await made.destroy()
            assert backend.is_shut_down
            assert not backend.open_streams

    def put(self, backend: MemoryBackend, blob_id: str = "a", size: int = SIZE) -> bytes:
        """Store a blob at the origin."""
        data = self.oracle.blob(blob_id, 0, size)
        backend.put(blob_id, data)
        return data

    async def read(self, manager: BlobCacheMgr, request: RangeRequest) -> tuple[bytes, CacheStatus]:
        """Read of blob `a`."""
        with manager.get_blob_cache(BlobInfo("a")) as cache:
            read = await cache.read(request)
            return await read_all(read), read.status

    @pytest.mark.parametrize(
        "request_",
        [
            RangeRequest(),
            RangeRequest(first=0),
            RangeRequest(first=0, last=0),
            RangeRequest(first=65_535, last=65_536),
            RangeRequest(first=SIZE - 1),
            RangeRequest(first=1000, last=10 * SIZE),
            RangeRequest(suffix_length=1),
            RangeRequest(suffix_length=100_000),
            RangeRequest(suffix_length=10 * SIZE),
        ],
        ids=str,
    )
    async def test_every_kind_of_range(
        self, manager: BlobCacheMgr, backend: MemoryBackend, request_: RangeRequest
    ) -> None:
        """First and second time alike: version, span and bytes are right."""
        data = self.put(backend)
        span = request_.resolve(SIZE)
        for _ in range(2):
            with manager.get_blob_cache(BlobInfo("a")) as cache:
                read = await cache.read(request_)
                assert read.span == span
                assert read.version == await backend.stat("a")
                assert await read_all(read) == data[span.start : span.end]

    async def test_ranges_beyond_the_end(
        self, manager: BlobCacheMgr, backend: MemoryBackend
    ) -> None:
        """Are refused, cold and warm."""
        self.put(backend)
        for _ in range(2):
            with pytest.raises(RangeNotSatisfiable):
                await self.read(manager, RangeRequest(first=SIZE))
            with pytest.raises(RangeNotSatisfiable):
                await self.read(manager, RangeRequest(suffix_length=0))
            await self.read(manager, RangeRequest())

    async def test_an_empty_blob(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """Can be read as a whole."""
        self.put(backend, size=0)
        assert (await self.read(manager, RangeRequest()))[0] == b""

    async def test_statuses(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """A cache that stores says so, and a hit asks the origin nothing."""
        data = self.put(backend)
        assert (await self.read(manager, RangeRequest()))[0] == data
        sent = backend.bytes_sent
        again, status = await self.read(manager, RangeRequest())
        assert again == data
        if self.stores:
            assert (status, backend.bytes_sent) == (CacheStatus.HIT, sent)
        else:
            assert status is CacheStatus.BYPASS

    async def test_errors_of_the_origin(
        self, manager: BlobCacheMgr, backend: MemoryBackend
    ) -> None:
        """Come through as they are, and the next read asks again."""
        with pytest.raises(BlobNotFound):
            await self.read(manager, RangeRequest())
        data = self.put(backend)
        backend.fail_next(OriginDenied("no"))
        with pytest.raises(OriginDenied):
            await self.read(manager, RangeRequest())
        assert manager.stats().degraded_reason == "OriginDenied"
        assert (await self.read(manager, RangeRequest()))[0] == data
        assert manager.stats().degraded_reason == ""

    async def test_a_broken_body_is_resumed(
        self, manager: BlobCacheMgr, backend: MemoryBackend
    ) -> None:
        """Without the reader noticing."""
        data = self.put(backend)
        backend.fail_next(Fault(cut_after_bytes=123_456))
        assert (await self.read(manager, RangeRequest()))[0] == data

    async def test_many_readers_at_once(
        self, manager: BlobCacheMgr, backend: MemoryBackend
    ) -> None:
        """Each gets its own bytes."""
        data = self.put(backend)
        requests = [RangeRequest(first=i * 9000, last=i * 9000 + 70_000) for i in range(30)]
        found = await asyncio.gather(*(self.read(manager, request) for request in requests))
        for request, (got, _) in zip(requests, found, strict=True):
            span = request.resolve(SIZE)
            assert got == data[span.start : span.end]

    async def test_stat(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """Tells the version a read would get."""
        self.put(backend)
        with manager.get_blob_cache(BlobInfo("a")) as cache:
            version, status = await cache.stat()
            assert version == await backend.stat("a")
            assert status is not CacheStatus.HIT
            await self.read(manager, RangeRequest())
            assert (await cache.stat())[0] == version
            assert ((await cache.stat())[1] is CacheStatus.HIT) is self.stores

    async def test_handles_and_gc(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """A manager is in use while a handle is out, and gc takes nothing from anybody."""
        data = self.put(backend)
        assert manager.gc(None)
        handle = manager.get_blob_cache(BlobInfo("a"))
        other = manager.get_blob_cache(BlobInfo("a"))
        assert not manager.gc("a")
        handle.close()
        handle.close()
        assert not manager.gc(None)
        assert await read_all(await other.read(RangeRequest())) == data
        other.close()
        await until(lambda: manager.gc(None))
        assert (await self.read(manager, RangeRequest()))[0] == data

    async def test_ids_that_cannot_be(self, manager: BlobCacheMgr) -> None:
        """Are refused before anything is asked."""
        with pytest.raises(InvalidBlobId):
            manager.get_blob_cache(BlobInfo("../etc/passwd"))

    async def test_figures_add_up(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """Bytes served are hits plus misses; bytes received are the origin's."""
        self.put(backend)
        await self.read(manager, RangeRequest(first=10, last=99_999))
        await self.read(manager, RangeRequest())
        stats = manager.stats()
        assert stats.requests == 2
        assert stats.hit_bytes + stats.miss_bytes == 99_990 + SIZE
        assert stats.origin_bytes == backend.bytes_sent

    async def test_a_reader_who_leaves(self, manager: BlobCacheMgr, backend: MemoryBackend) -> None:
        """Takes its requests along."""
        self.put(backend)
        hold = asyncio.Event()
        backend.fail_next(Fault(hold_body=hold))
        with manager.get_blob_cache(BlobInfo("a")) as cache:
            read = await cache.read(RangeRequest())
            await read.aclose()
            await read.aclose()
        await until(lambda: not backend.open_streams)
