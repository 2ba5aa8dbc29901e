"""Chunks that are not synced yet: in memory once, for however many, and for nobody too long."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, Rig, collect

from blobcache_storage.cache import chunk_memory
from blobcache_storage.cache.chunk_memory import ChunkBuffer
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.pools import BufferPool
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.testing.cache_suite import until

LARGE = 8 * CHUNK
"""A chunk that is yielded in two slices."""


class UnsyncedDisk(Disk):
    """A disk whose syncs of data wait, and which counts reads of its data."""

    def __init__(self) -> None:
        self.may_sync = threading.Event()
        self.may_read = threading.Event()
        self.may_read.set()
        self.reads: Counter[int] = Counter()

    def sync_data(self, fd: int) -> None:
        """Sync, of data only when it may."""
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".data"):
            assert self.may_sync.wait(60)
        super().sync_data(fd)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Count a read of a large chunk."""
        if length == LARGE:
            self.reads[offset // LARGE] += 1
            assert self.may_read.wait(30)
        return super().read(fd, length, offset)

    def read_resident(self, fd: int, length: int, offset: int) -> bytearray | None:
        """Have threads read."""
        return None


@pytest.fixture
def disk() -> UnsyncedDisk:
    """The disk of `rig`."""
    return UnsyncedDisk()


@pytest.fixture
async def rig(tmp_path: Path, disk: UnsyncedDisk) -> AsyncIterator[Rig]:
    """A rig whose pool holds eight chunks."""
    started = await Rig(tmp_path / "root", disk=disk, chunk_size_bytes=LARGE).start()
    started.runtime.buffers.bytes_max = 8 * LARGE
    yield started
    disk.may_sync.set()
    disk.may_read.set()
    await started.stop()


async def reclaim_all(rig: Rig) -> None:
    """Have somebody need all the memory there is."""
    pool = rig.runtime.buffers
    async with asyncio.timeout(20):
        await pool.acquire(pool.bytes_max)
    pool.release(pool.bytes_max)


async def test_what_is_written_is_kept_until_it_is_recorded(rig: Rig, disk: UnsyncedDisk) -> None:
    """Readers who come before the sync need no disk, and the sync frees the memory."""
    data = rig.put("a", 6 * LARGE)
    for _ in range(3):
        assert (await rig.read("a"))[0] == data
    assert not disk.reads
    assert rig.runtime.buffers.used_bytes == 6 * LARGE
    disk.may_sync.set()
    await rig.durable()
    assert rig.runtime.buffers.used_bytes == 0


async def test_readers_of_an_unsynced_chunk_share_one_reading(rig: Rig, disk: UnsyncedDisk) -> None:
    """Also when its memory went to somebody else: it is read once, for all who wait."""
    data = rig.put("a", 6 * LARGE)
    await rig.read("a")
    await reclaim_all(rig)
    assert rig.runtime.buffers.used_bytes == 0
    disk.may_read.clear()
    ranges = [asyncio.create_task(rig.read("a", 2 * LARGE, 3 * LARGE - 1)) for _ in range(50)]
    await until(lambda: disk.reads[2] > 0)
    assert rig.runtime.buffers.used_bytes == LARGE
    for reader in ranges[:20]:
        reader.cancel()
    disk.may_read.set()
    for got, _ in await asyncio.gather(*ranges[20:]):
        assert got == data[2 * LARGE : 3 * LARGE]
    assert disk.reads == {2: 1}
    assert rig.runtime.buffers.used_bytes == LARGE


async def test_a_reading_ends_with_those_who_wait_for_it(rig: Rig, disk: UnsyncedDisk) -> None:
    """And leaves no memory taken."""
    rig.put("a", 2 * LARGE)
    await rig.read("a")
    await reclaim_all(rig)
    disk.may_read.clear()
    reader = asyncio.create_task(rig.read("a", 0, 5))
    await until(lambda: disk.reads[0] > 0)
    reader.cancel()
    await asyncio.wait([reader])
    await until(lambda: rig.runtime.buffers.used_bytes == 0)


async def test_stalled_readers_do_not_starve_the_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many hold a chunk and take no more of it, its memory comes back."""
    monkeypatch.setattr(chunk_memory, "HOLD_SECONDS", 0.05)
    blobs = {f"blob-{number}": rig.put(f"blob-{number}", LARGE) for number in range(8)}
    stalled = []
    for name in blobs:
        with rig.manager.get_blob_cache(BlobInfo(name)) as cache:
            read = await cache.read(RangeRequest())
        pieces = read.pieces()
        stalled.append((name, read, pieces, bytes(await anext(pieces))))  # type: ignore[arg-type]
    data = rig.put("healthy", 20 * LARGE)
    async with asyncio.timeout(20):
        assert (await rig.read("healthy"))[0] == data
        await reclaim_all(rig)
    for name, read, pieces, got in stalled:
        async with read:
            async for piece in pieces:
                assert isinstance(piece, bytes)
                got += piece
        assert got == blobs[name]


async def test_what_is_offered_gives_way_to_what_is_needed() -> None:
    """The longest offered first; what is used again does not."""
    pool, taken = BufferPool(100, 2), []
    buffers = []
    for number in range(4):
        assert pool.try_acquire(25)
        buffer = ChunkBuffer(pool, bytes(25))
        buffer.keep(lambda number=number: taken.append(number))  # type: ignore[misc]
        buffer.release()
        buffers.append(buffer)
    buffers[0].retain()
    assert pool.try_acquire(30)
    assert taken == [1, 2]
    assert not pool.try_acquire(50)
    waiting = asyncio.create_task(pool.acquire(60))
    await asyncio.sleep(0)
    buffers[0].release()
    await waiting
    assert taken == [1, 2, 3, 0]
    assert pool.used_bytes == 90


async def test_a_damaged_unsynced_chunk_is_fetched_again(rig: Rig, disk: UnsyncedDisk) -> None:
    """Dirty pages may turn to zeros without an error: what is read anew is checked."""
    data = rig.put("a", 4 * LARGE)
    await rig.read("a")
    await reclaim_all(rig)
    (path,) = rig.directory.glob("v1/*/*.data")
    with path.open("r+b") as file:
        file.seek(2 * LARGE + 7)
        file.write(bytes(100))
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            assert await collect(read) == data
    assert rig.backend.bytes_sent == 5 * LARGE
