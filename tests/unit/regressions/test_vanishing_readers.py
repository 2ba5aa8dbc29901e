"""Readers that give up in the middle of the engine's work, and disks with no byte left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tests.unit.cache.rig import CHUNK, Rig, make_config, take
from typing_extensions import override

from blobcache_storage.cache.base import CacheStatus, EvictionOutcome, Victim
from blobcache_storage.cache.table import version_name
from blobcache_storage.config import PrefetchConfig
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import OriginTimeout, OriginUnreachable
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.faulty_disk import DiskCall, FaultyDisk, WatchedDisk
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend


class GatedDisk(WatchedDisk):
    """A disk on which the calls of one kind wait at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.arrived = threading.Event()
        self.holds: Callable[[DiskCall], bool] = lambda _: False

    @override
    def before(self, call: DiskCall, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        if self.holds(call):
            self.arrived.set()
            assert self.gate.wait(20)
        return -1


async def give_up_in(disk: GatedDisk, reading: Coroutine[Any, Any, object]) -> None:
    """Cancel a read while the disk holds it up, then let the disk go on."""
    task = asyncio.create_task(reading)
    assert await asyncio.to_thread(disk.arrived.wait, 20)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    disk.gate.set()


async def test_who_gives_up_while_a_blob_is_opened_leaks_no_descriptor(tmp_path: Path) -> None:
    """The thread that opens the files ends after the reader has gone."""
    disk = GatedDisk()
    rig = await Rig(tmp_path / "root", disk=disk).start()
    data = rig.put("a", 3 * CHUNK)
    await rig.read("a")
    await rig.restart()
    disk.holds = lambda call: call.operation == "open" and call.kind == "data"
    await give_up_in(disk, rig.read("a"))
    assert await rig.read("a") == (data, CacheStatus.HIT)
    names = list(disk.open_files.values())
    assert len(names) == len(set(names)), "opened twice"
    await rig.stop()
    assert not disk.open_files


async def test_who_gives_up_while_room_is_made_leaves_no_bytes_counted(tmp_path: Path) -> None:
    """An eviction ends whoever waits for it: else the room it made would be lost for good."""
    disk = GatedDisk()
    rig = await Rig(tmp_path / "root", disk=disk, capacity_bytes_config=20 * CHUNK).start()
    rig.put("a", 15 * CHUNK)
    data = rig.put("b", 15 * CHUNK)
    await rig.read("a")
    await rig.restart(capacity_bytes=20 * CHUNK)
    disk.holds = lambda call: call.operation == "unlink" and call.kind == "map"
    await give_up_in(disk, rig.read("b"))
    await rig.settled()
    counted = sum(entry.bytes for entry in rig.manager.table.folder.entries.values())
    assert rig.manager.table.folder.budget.used_bytes == counted
    assert await rig.read("b") == (data, CacheStatus.MISS_STORED)
    await rig.stop()


async def test_a_digest_read_fails_when_the_origin_dies_before_its_last_chunk(
    tmp_path: Path,
) -> None:
    """It ends with the origin's error, instead of asking again for as long as it lasts."""
    backend = MemoryBackend(digest_ids=True)
    rig = await Rig(tmp_path / "root", backend=backend).start()
    data = rig.oracle.blob("a", 0, 10 * CHUNK)
    name = f"sha256:{hashlib.sha256(data).hexdigest()}"
    backend.put(name, data)
    backend.fail_next(Fault(cut_after_bytes=9 * CHUNK + 100))
    with rig.manager.get_blob_cache(BlobInfo(name)) as cache:
        async with await cache.read(RangeRequest()) as read:
            backend.down = OriginUnreachable("the origin is down")
            got, error = await asyncio.wait_for(take(read), 20)
    assert (got, error) == (data[: 9 * CHUNK], OriginUnreachable)
    await rig.stop()


async def test_a_full_disk_serves_and_evicts_after_a_restart(tmp_path: Path) -> None:
    """Neither opening a blob nor deleting it needs to write a byte."""
    disk = FaultyDisk(errno.ENOSPC)
    rig = await Rig(tmp_path / "root", disk=disk).start()
    data = rig.put("a", 3 * CHUNK)
    await rig.read("a")
    await rig.durable()
    await rig.restart()
    disk.nth, disk.lasting = 1, True
    asked = rig.backend.requests
    assert await rig.read("a") == (data, CacheStatus.HIT)
    assert rig.backend.requests == asked
    entry = rig.manager.table.folder.entries["a"]
    (result,) = await rig.manager.evict([Victim("a", version_name(entry), float("inf"))])
    assert result.outcome is EvictionOutcome.EVICTED
    assert not list(rig.directory.rglob("*.data"))
    assert not disk.failed
    disk.heal()
    await until(lambda: not rig.manager.table.folder.budget.used_bytes)
    await rig.stop()


async def test_who_gives_up_while_room_is_made_leaves_no_connection(tmp_path: Path) -> None:
    """The answer that was opened already is closed."""
    disk = GatedDisk()
    rig = await Rig(tmp_path / "root", disk=disk, capacity_bytes_config=20 * CHUNK).start()
    rig.put("a", 15 * CHUNK)
    rig.put("b", 15 * CHUNK)
    await rig.read("a")
    await rig.durable()
    disk.holds = lambda call: call.operation == "unlink" and call.kind == "map"
    await give_up_in(disk, rig.read("b"))
    await until(lambda: not rig.backend.open_streams)
    await rig.stop()


async def test_who_comes_while_the_last_gives_up_is_served(rig: Rig) -> None:
    """A first request is ended with its last reader, and not with the next one."""
    data = rig.put("a", 3 * CHUNK)
    ended = asyncio.Event()
    fetch = rig.backend.fetch

    async def fetch_that_ends_slowly(*args: Any, **kwargs: Any) -> Any:
        try:
            return await fetch(*args, **kwargs)
        finally:
            await ended.wait()

    rig.backend.fail_next(Fault(latency_seconds=3600))
    rig.backend.fetch = fetch_that_ends_slowly  # type: ignore[method-assign]
    first = asyncio.create_task(rig.read("a"))
    await until(lambda: bool(rig.backend.fetches))
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(rig.read("a"))
    await asyncio.sleep(0)
    ended.set()
    assert (await second)[0] == data


async def test_warming_mends_a_chunk_that_rotted_on_the_disk(tmp_path: Path) -> None:
    """The digest check finds it; what it discards must be fetched, or warming never ends."""
    rig = await Rig(tmp_path / "root").start()
    data = rig.put("a", 10 * CHUNK)
    await rig.read("a")
    await rig.stop()
    (file,) = rig.directory.rglob("*.data")
    with file.open("r+b") as stream:
        stream.seek(5 * CHUNK)
        stream.write(bytes([data[5 * CHUNK] ^ 1]))
    blob = BlobInfo("a", len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    rig.config = make_config(prefetch=PrefetchConfig(enable=True, blobs=(blob,)))
    await rig.start()
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)
    assert await rig.read("a") == (data, CacheStatus.HIT)
    await rig.stop()


async def test_an_origin_that_drips_fails_after_the_usual_retries(rig: Rig) -> None:
    """A few bytes of a chunk before each time-out are no progress that a reader sees."""
    rig.put("a", 3 * CHUNK)
    late = OriginTimeout("the origin sent too little in its time")
    rig.backend.fail_next(*[Fault(cut_after_bytes=10, cut_error=late)] * 60)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            assert await take(read) == (b"", OriginTimeout)
    assert rig.backend.requests == 3  # the first, and two retries
