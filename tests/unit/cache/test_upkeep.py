"""Threads, memory, open files and the scrub."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cache.rig import CHUNK, Rig

from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.cache.pools import BufferPool, Throttle, WorkerPool
from blobcache_storage.cache.runtime import OpenFiles
from blobcache_storage.cache.scrub import Scrubber
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import CacheBusy
from blobcache_storage.testing.cache_suite import until


async def test_idle_threads_end_and_come_back() -> None:
    """A pool has no thread while it has no work, and never more than its bound."""
    pool = WorkerPool("some-pool", 3, idle_seconds=0.02)
    for _ in range(3):
        barrier = threading.Barrier(3)
        names = await asyncio.gather(*(pool.run(partial(_meet, barrier)) for _ in range(3)))
        assert set(names) == {"some-pool"}
        assert pool.thread_count == 3
        await until(lambda: pool.thread_count == 0)
    results = await asyncio.gather(*(pool.run(lambda n=n: n) for n in range(100)))
    assert results == list(range(100))
    assert pool.thread_count <= 3
    await asyncio.to_thread(pool.close)
    await asyncio.to_thread(pool.close)


def _meet(barrier: threading.Barrier) -> str:
    barrier.wait(10)
    return threading.current_thread().name


async def test_a_pool_raises_what_its_work_raises() -> None:
    """In the caller, not in the thread."""
    pool = WorkerPool("failing", 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    await asyncio.to_thread(pool.close)


async def test_memory_is_granted_in_turn_then_refused() -> None:
    """First come, first served; the queue has an end; who gives up takes nothing."""
    pool = BufferPool(100, 2)
    await pool.acquire(100)
    first = asyncio.create_task(pool.acquire(60))
    second = asyncio.create_task(pool.acquire(40))
    await asyncio.sleep(0)
    with pytest.raises(CacheBusy):
        await pool.acquire(1)
    first.cancel()
    await asyncio.wait([first])
    pool.release(100)
    await second
    assert pool.used_bytes == 40
    pool.release(40)
    await pool.acquire(1000)
    assert pool.used_bytes == 1000, "what is larger than the pool passes alone"
    pool.release(1000)


async def test_memory_granted_to_who_gave_up_is_returned() -> None:
    """A cancellation may come between the grant and its receiver."""
    pool = BufferPool(10, 2)
    await pool.acquire(10)
    waiting = asyncio.create_task(pool.acquire(10))
    await asyncio.sleep(0)
    pool.release(10)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert pool.used_bytes == 0


async def test_a_lifted_throttle_waits_no_more() -> None:
    """Whoever waits is let go at once."""
    throttle, lifted = Throttle(1), asyncio.Event()
    await throttle.spend(3600, lifted)
    waiting = asyncio.create_task(throttle.spend(1, lifted))
    await asyncio.sleep(0)
    lifted.set()
    async with asyncio.timeout(5):
        await waiting


async def test_idle_blobs_are_closed_beyond_the_bound(tmp_path: Path) -> None:
    """And opened again when they are read."""
    rig = Rig(tmp_path / "root", open_files_max=3)
    await rig.start()
    blobs = {f"blob-{number}": rig.put(f"blob-{number}", 3 * CHUNK) for number in range(10)}
    for _ in range(2):
        for name, data in blobs.items():
            assert (await rig.read(name))[0] == data
            await rig.durable()
            assert len(rig.runtime.open_files) <= 3
            assert len(rig.manager.table.open_generations()) <= 3
    for name, data in blobs.items():
        assert await rig.read(name) == (data, CacheStatus.HIT)
    await rig.stop()


async def test_the_scrub_finds_what_the_disk_forgot(rig: Rig) -> None:
    """Even in a chunk that was verified before; the next read fetches it again."""
    data = rig.put("a", 20 * CHUNK)
    rig.put("b", 5 * CHUNK)
    await rig.read("a")
    await rig.read("b")
    await rig.durable()
    path = max(rig.directory.glob("v1/*/*.data"), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(9 * CHUNK + 1)
        file.write(b"wrong")
    found: list[str] = []
    scrubber = Scrubber(
        rig.manager.table,
        rig.runtime,
        lambda generation: found.append(generation.entry.blob_id),
        bytes_per_second=None,
    )
    await scrubber.scrub()
    assert found == ["a"]
    assert (await rig.read("a"))[0] == data
    assert rig.backend.bytes_sent == 26 * CHUNK
    await scrubber.scrub()
    assert found == ["a"]
    assert rig.manager.stats().bytes == rig.root.budget.used_bytes


async def test_requests_that_follow_one_another_read_ahead(rig: Rig) -> None:
    """A sequential reader of small ranges needs few requests; a sparse one gets what it asked."""
    data = rig.put("a", 512 * CHUNK)
    with rig.manager.get_blob_cache(BlobInfo("a")):
        for index in range(512):
            got, _ = await rig.read("a", index * CHUNK, (index + 1) * CHUNK - 1)
            assert got == data[index * CHUNK : (index + 1) * CHUNK]
    assert len(rig.backend.fetches) < 50
    assert rig.backend.bytes_sent == len(data)
    rig.put("b", 512 * CHUNK)
    sent = rig.backend.bytes_sent
    for index in range(500, 0, -37):
        await rig.read("b", index * CHUNK, index * CHUNK + 5)
    assert rig.backend.bytes_sent - sent == len(range(500, 0, -37)) * CHUNK


async def test_a_read_closed_in_mid_piece_returns_its_memory(rig: Rig) -> None:
    """The pool does not depend on the garbage collector."""
    rig.put("a", 100 * CHUNK)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        read = await cache.read(RangeRequest())
        pieces = read.pieces()
        await anext(pieces)
        await read.aclose()
    await rig.durable()
    await until(lambda: rig.runtime.buffers.used_bytes == 0)


class _Opened:
    """An open blob that is busy or idle."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self.is_busy = True
        self.map_bytes = 10

    def close_if_idle(self) -> bool:
        """Close unless busy."""
        if not self.is_busy:
            self._files.forget(self)
        return not self.is_busy


def test_who_was_busy_and_is_idle_makes_room() -> None:
    """Where as many are open as may be, those that became idle are closed when another comes."""
    files = OpenFiles(2, 1000, busy_max=4)
    opened = [_Opened(files) for _ in range(4)]
    for one in opened:
        files.touch(one)
    assert files.is_exhausted
    assert len(files) == 4
    for one in opened:
        one.is_busy = False
    assert not files.is_exhausted
    assert len(files) == 2


class LateQueue(queue.SimpleQueue[Any]):
    """A queue that says once that it is empty just when somebody puts something in."""

    def __init__(self) -> None:
        self.is_late = True

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take an item, but not at first."""
        if self.is_late and timeout is not None:
            self.is_late = False
            while self.empty():
                time.sleep(0.001)
            raise queue.Empty
        return super().get(block, timeout)


async def test_a_thread_that_takes_a_job_on_its_way_out_is_counted() -> None:
    """Else there would be more than the bound, and ending would not wait for it."""
    pool = WorkerPool("leaving", 1, idle_seconds=10)
    pool._jobs = LateQueue()
    assert await pool.run(lambda: pool.thread_count) == 1
    await asyncio.to_thread(pool.close)
