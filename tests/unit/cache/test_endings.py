"""Readers who give up and managers that end, at every awkward moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, Rig, collect

from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.memory_backend import Fault


async def test_a_reader_cancelled_before_the_head_leaves_nothing(rig: Rig) -> None:
    """Nobody waits any more: the request ends, and the next reader starts afresh."""
    data = rig.put("a", 20 * CHUNK)
    hold = asyncio.Event()
    rig.backend.fail_next(Fault(hold_head=hold))
    reading = asyncio.create_task(rig.read("a"))
    await until(lambda: bool(rig.backend.fetches))
    reading.cancel()
    await asyncio.wait([reading])
    await until(lambda: rig.manager.gc(None))
    assert rig.backend.open_streams == 0
    assert await rig.read("a") == (data, CacheStatus.MISS_STORED)


async def test_the_first_of_many_may_give_up(rig: Rig) -> None:
    """The request that told the version was started by somebody who left."""
    data = rig.put("a", 20 * CHUNK)
    hold = asyncio.Event()
    rig.backend.fail_next(Fault(hold_head=hold))
    first = asyncio.create_task(rig.read("a"))
    await until(lambda: bool(rig.backend.fetches))
    others = [asyncio.create_task(rig.read("a")) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    hold.set()
    assert [await other for other in others] == [(data, CacheStatus.MISS_STORED)] * 5
    assert rig.backend.bytes_sent == len(data)


async def test_one_readers_bad_range_is_not_the_others(rig: Rig) -> None:
    """Who asks beyond the end of a cold blob fails alone."""
    data = rig.put("a", 20 * CHUNK)
    found = await asyncio.gather(
        rig.read("a", 100 * CHUNK), rig.read("a"), rig.read("a", 5), return_exceptions=True
    )
    assert type(found[0]).__name__ == "RangeNotSatisfiable"
    assert isinstance(found[1], tuple)
    assert isinstance(found[2], tuple)
    assert (found[1][0], found[2][0]) == (data, data[5:])
    assert rig.manager.stats().degraded_reason == ""


@pytest.mark.parametrize("moment", ["head", "body"])
async def test_a_manager_that_ends_under_a_reader(rig: Rig, moment: str) -> None:
    """It finishes writing and lets go of the folder; the reader is not served wrong bytes."""
    data = rig.put("a", 20 * CHUNK)
    hold = asyncio.Event()
    fault = Fault(hold_body=hold, hold_after_bytes=5 * CHUNK)
    rig.backend.fail_next(Fault(hold_head=hold) if moment == "head" else fault)
    reading = asyncio.create_task(rig.read("a"))
    await until(lambda: rig.backend.bytes_sent > 0 or (moment == "head" and rig.backend.fetches))
    await rig.manager.destroy()
    successor = FileCacheMgr(rig.config, rig.backend, rig.runtime, rig.root)
    hold.set()
    got, _ = await reading
    assert got == data
    rig.manager = successor
    assert (await rig.read("a"))[0] == data
    await rig.durable()
    assert (await rig.read("a"))[1] is CacheStatus.HIT


async def test_a_folder_with_somebody_elses_file_is_emptied(rig: Rig) -> None:
    """A tombstone deletes what is ours and does not stumble over what is not."""
    rig.put("a", 5 * CHUNK)
    await rig.read("a")
    await rig.durable()
    (folder,) = (path for path in rig.directory.glob("v1/*") if path.is_dir())
    (folder / "notes.txt").write_text("mine")
    await rig.manager.destroy()
    await rig.root.delete_config("uid-1")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert rig.root.budget.used_bytes == 0


async def test_a_slow_reader_holds_little(tmp_path: Path) -> None:
    """Fetches run ahead of a reader who does not read, but not without bound."""
    rig = await Rig(tmp_path / "root").start()
    size = 12 * 1024 * CHUNK
    data = rig.put("a", size)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            pieces = read.pieces()
            first = await anext(pieces)
            assert isinstance(first, bytes)
            await rig.durable()
            assert rig.backend.bytes_sent <= 3 * 32 * 1024 * 1024 + CHUNK
            assert rig.backend.bytes_sent < size
            rest = await collect_rest(pieces)
    assert first + rest == data
    await rig.stop()


async def collect_rest(pieces: object) -> bytes:
    """Return what is left of a read under way."""

    class Rest:
        def pieces(self) -> object:
            return pieces

    return await collect(Rest())  # type: ignore[arg-type]
