"""Quotas, eviction, orphans and the floor of free space."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, FakeClock, Rig, collect, make_config

from blobcache_storage.cache.base import CacheStatus, EvictionOutcome, Victim
from blobcache_storage.cache.disk import Disk, FreeSpace
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.config import S3Config
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import ConfigError
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend
from blobcache_storage.testing.recorder import RecordingDisk

BLOB = 10 * CHUNK
"""Takes 41 blocks: ten chunks and a map."""
ON_DISK = BLOB + 8192

StartRig = Callable[..., Awaitable[Rig]]


class LittleDisk(Disk):
    """A disk whose free space a test sets."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def free_space(self, fd: int) -> FreeSpace:
        """Return what the test says."""
        return FreeSpace(self.free_bytes, 1 << 40)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartRig]:
    """Start rigs with settings of their own."""
    started: list[Rig] = []

    async def begin(**settings: object) -> Rig:
        rig = Rig(tmp_path / "root", clock=FakeClock(), **settings)  # type: ignore[arg-type]
        started.append(await rig.start())
        return rig

    yield begin
    for rig in started:
        await rig.stop()


async def fill(rig: Rig, *names: str) -> None:
    """Read blobs one after the other, a second apart."""
    for name in names:
        rig.put(name, BLOB)
        await rig.read(name)
        await rig.durable()
        assert isinstance(rig.clock, FakeClock)
        rig.clock.advance(1)


def cached(rig: Rig) -> set[str]:
    """Return the ids of cached blobs."""
    return {usage.blob_id for usage in rig.manager.usage()}


async def test_over_capacity_the_coldest_go_down_to_the_low_watermark(start: StartRig) -> None:
    """The hard limit is kept without anybody's help, by the planner's order."""
    rig = await start(capacity_bytes_config=5 * ON_DISK)
    await fill(rig, *"abcde")
    assert cached(rig) == set("abcde")
    await rig.read("a")
    await fill(rig, "f")
    # Down to 80 % of 5 blobs, less nothing: b goes, and c for f to fit below the capacity.
    assert "a" in cached(rig)
    assert "b" not in cached(rig)
    assert "f" in cached(rig)
    assert rig.manager.stats().bytes <= 5 * ON_DISK
    assert rig.manager.stats().evicted_blobs >= 1


async def test_pinned_and_used_blobs_stay_and_reads_go_on(start: StartRig) -> None:
    """Where nothing may go, misses are answered without being stored."""
    rig = await start(capacity_bytes_config=2 * ON_DISK, pinned=frozenset("a"))
    await fill(rig, "a", "b")
    with rig.manager.get_blob_cache(BlobInfo("b")) as cache:
        async with await cache.read(RangeRequest()) as read:
            data = rig.put("c", BLOB)
            assert await rig.read("c") == (data, CacheStatus.MISS)
            assert len(await collect(read)) == BLOB
    assert cached(rig) == {"a", "b"}


async def test_policy_none_admits_nothing_more_when_full(start: StartRig) -> None:
    """What is there stays."""
    rig = await start(capacity_bytes_config=2 * ON_DISK, eviction_policy="None")
    await fill(rig, *"abc")
    assert cached(rig) == {"a", "b"}
    assert (await rig.read("c"))[1] is CacheStatus.MISS


async def test_unread_blobs_expire(start: StartRig) -> None:
    """What was not read for the TTL goes at the next check."""
    rig = await start(ttl_seconds=60)
    await fill(rig, "a")
    rig.clock.advance(50)  # type: ignore[union-attr]
    await fill(rig, "b")
    rig.clock.advance(30)  # type: ignore[union-attr]
    rig.manager.check_stat()
    await rig.settled()
    assert cached(rig) == {"b"}


async def test_the_node_capacity_is_shared(start: StartRig) -> None:
    """The root's capacity holds whatever the configuration's is."""
    rig = await start(capacity_bytes=3 * ON_DISK)
    await fill(rig, *"abcd")
    assert cached(rig) == set("bcd")
    assert rig.root.budget.used_bytes <= 3 * ON_DISK


async def test_below_the_floor_nothing_is_written_and_the_coldest_go(start: StartRig) -> None:
    """Free space that others need is given back."""
    disk = LittleDisk(100 * ON_DISK)
    rig = await start(disk=disk, min_free_bytes=10 * ON_DISK)
    await fill(rig, *"abc")
    disk.free_bytes = 9 * ON_DISK
    rig.manager.check_stat()
    await rig.settled()
    assert cached(rig) == {"b", "c"}
    disk.free_bytes = 0
    rig.clock.advance(60)  # type: ignore[union-attr]
    data = rig.put("d", BLOB)
    assert await rig.read("d") == (data, CacheStatus.MISS)


async def test_victims_are_spared_when_the_decision_is_stale(start: StartRig) -> None:
    """Unknown, replaced, pinned, read since: each is said and nothing is deleted."""
    rig = await start(pinned=frozenset("p"))
    await fill(rig, "a", "p")
    usage = {found.blob_id: found for found in rig.manager.usage()}
    late = usage["a"].last_read_time + 100
    victims = [
        Victim("zzz", "0", late),
        Victim("a", "0123", late),
        Victim("p", usage["p"].version, late),
        Victim("a", usage["a"].version, usage["a"].last_read_time),
    ]
    outcomes = [result.outcome for result in await rig.manager.evict(victims)]
    assert outcomes == [
        EvictionOutcome.UNKNOWN,
        EvictionOutcome.CHANGED,
        EvictionOutcome.PINNED,
        EvictionOutcome.IN_USE,
    ]
    assert cached(rig) == {"a", "p"}


async def test_orphans_are_adopted_again_or_deleted(start: StartRig, tmp_path: Path) -> None:
    """A configuration's bytes survive it for a day, and no tombstone."""
    rig = await start()
    await fill(rig, "a")
    used = rig.root.budget.used_bytes
    await rig.manager.destroy()
    (orphan,) = rig.root.orphans()
    assert (orphan.config_uid, orphan.blob_id, orphan.bytes) == ("uid-1", "a", used)
    rig.manager = FileCacheMgr(rig.config, rig.backend, rig.runtime, rig.root)
    assert rig.root.orphans() == []
    assert (await rig.read("a"))[1] is CacheStatus.HIT
    await rig.root.delete_config("uid-1")
    assert cached(rig) == {"a"}, "what is claimed goes only when it is let go"
    await rig.manager.destroy()
    assert rig.root.orphans() == []
    assert rig.root.budget.used_bytes == 0
    assert list((tmp_path / "root" / "v1").glob("*/*")) == []


async def test_orphans_go_after_a_day_and_over_restarts(start: StartRig) -> None:
    """The day is counted from when the configuration went, not from the last start."""
    rig = await start()
    await fill(rig, "a")
    await rig.restart()
    rig.config = replace(make_config(), uid="uid-2")
    await rig.restart()
    assert [orphan.config_uid for orphan in rig.root.orphans()] == ["uid-1"]
    rig.clock.advance(13 * 3600)  # type: ignore[union-attr]
    await rig.restart()
    assert len(rig.root.orphans()) == 1
    rig.clock.advance(12 * 3600)  # type: ignore[union-attr]
    rig.manager.check_stat()
    await rig.settled()
    assert rig.root.orphans() == []


async def test_orphans_are_the_first_to_go(start: StartRig) -> None:
    """However lately they were read."""
    rig = await start(capacity_bytes=3 * ON_DISK)
    await fill(rig, "a")
    rig.config = replace(make_config(), uid="uid-2")
    await rig.restart()
    await fill(rig, *"bcd")
    assert cached(rig) == set("bcd")
    assert rig.root.orphans() == []


async def test_evicting_orphans_by_name(start: StartRig) -> None:
    """The operator may decide on them like on any other."""
    rig = await start()
    await fill(rig, "a")
    await rig.manager.destroy()
    (orphan,) = rig.root.orphans()
    late = orphan.last_read_time + 1
    victims = [Victim("a", "x", late), Victim("b", "x", late), Victim("a", orphan.version, late)]
    outcomes = [r.outcome for r in await rig.root.evict_orphans("uid-1", victims)]
    assert outcomes == [
        EvictionOutcome.CHANGED,
        EvictionOutcome.UNKNOWN,
        EvictionOutcome.EVICTED,
    ]


async def test_another_origin_gets_another_folder(start: StartRig) -> None:
    """What an id means at one endpoint is never served as what it means at another."""
    rig = await start()
    await fill(rig, "a")
    backend = rig.config.get_backend_config()
    s3 = S3Config("https://elsewhere.example", "r", "b")
    rig.config = replace(rig.config, backend=replace(backend, type="s3", s3=s3, localfs=None))
    rig.backend = MemoryBackend()
    other = rig.put("a", BLOB, version=5)
    await rig.restart()
    assert await rig.read("a") == (other, CacheStatus.MISS_STORED)
    assert len(rig.root.orphans()) == 1


async def test_a_root_has_one_owner(start: StartRig, tmp_path: Path) -> None:
    """A second process, a link and a directory open to others are refused with the remedy."""
    rig = await start()
    with pytest.raises(ConfigError, match="used by another process"):
        await asyncio.to_thread(CacheRoot.open, str(tmp_path / "root"), rig.runtime)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir(0o700)
    with pytest.raises(ConfigError, match="cannot be used"):
        await asyncio.to_thread(CacheRoot.open, str(tmp_path / "link"), rig.runtime)
    (tmp_path / "elsewhere").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 0700"):
        await asyncio.to_thread(CacheRoot.open, str(tmp_path / "elsewhere"), rig.runtime)
    with pytest.raises(ConfigError, match="already has a cache manager"):
        FileCacheMgr(rig.config, rig.backend, rig.runtime, rig.root)


async def test_usage_is_the_same_after_restart_and_right(start: StartRig) -> None:
    """What is counted is what the index says, what the files take, and what maps say."""
    rig = await start()
    await fill(rig, "a", "b")
    await rig.read("a", 0, 5)
    used = rig.manager.stats().bytes
    assert used == 2 * ON_DISK
    await rig.restart()
    assert rig.manager.stats().bytes == used
    await rig.stop()
    await asyncio.to_thread((rig.directory / "v1" / "index.json").unlink)
    await rig.start()
    assert rig.manager.stats().bytes == used
    assert cached(rig) == {"a", "b"}


async def test_what_is_on_its_way_is_not_free(start: StartRig) -> None:
    """A fresh look at the disk does not forget what was promised and not written yet."""
    disk = LittleDisk(100 * ON_DISK)
    rig = await start(disk=disk, min_free_bytes=98 * ON_DISK)
    rig.put("a", BLOB)
    rig.put("b", 2 * BLOB)
    hold = asyncio.Event()
    rig.backend.fail_next(Fault(hold_body=hold))
    reading = asyncio.create_task(rig.read("a"))
    await until(lambda: rig.root.budget.unwritten_bytes == BLOB)
    rig.manager.check_stat()
    await rig.manager.table.settled()
    assert (await rig.read("b"))[1] is CacheStatus.MISS
    hold.set()
    assert (await reading)[1] is CacheStatus.MISS_STORED
    await rig.durable()
    assert rig.root.budget.unwritten_bytes == 0


@pytest.mark.parametrize("is_open", [True, False])
async def test_what_cannot_be_deleted_counts_until_it_is(start: StartRig, is_open: bool) -> None:
    """A disk that refuses to delete must not be taken for one that has room."""
    disk = RecordingDisk()
    rig = await start(disk=disk)
    await fill(rig, "a", "b")
    if not is_open:
        rig.manager.gc(None)
    used = rig.manager.stats().bytes
    disk.fail_kinds, disk.fail_at, disk.fail_until = frozenset({"unlink"}), 1, 1 << 30
    (usage,) = (found for found in rig.manager.usage() if found.blob_id == "a")
    await rig.manager.evict([Victim("a", usage.version, float("inf"))])
    assert cached(rig) == {"b"}
    assert rig.manager.stats().bytes == rig.root.budget.used_bytes == used
    assert len(list(rig.directory.glob("v1/*/*.data"))) == 2
    assert rig.manager.stats().degraded_reason == "DiskError"
    disk.fail_at = 0
    rig.manager.check_stat()
    await rig.settled()
    assert rig.manager.stats().bytes == rig.root.budget.used_bytes == ON_DISK
    assert len(list(rig.directory.glob("v1/*/*.data"))) == 1


async def test_a_version_that_cannot_be_deleted_counts_beside_its_successor(
    start: StartRig,
) -> None:
    """Also while somebody still reads it."""
    disk = RecordingDisk()
    rig = await start(disk=disk)
    await fill(rig, "a")
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        read = await cache.read(RangeRequest())
    disk.fail_kinds, disk.fail_at, disk.fail_until = frozenset({"unlink"}), 1, 1 << 30
    generation = rig.manager.table.current("a")
    assert generation is not None
    rig.manager.table.retire(generation)
    await rig.settled()
    assert len(await collect(read)) == BLOB
    await read.aclose()
    assert rig.manager.stats().bytes == ON_DISK
    disk.fail_at = 0
    rig.clock.advance(60)  # type: ignore[union-attr]
    await fill(rig, "a")
    assert rig.manager.stats().bytes == 2 * ON_DISK
    await rig.manager.destroy()
    await rig.root.look_after()
    assert rig.root.budget.used_bytes == ON_DISK
    assert len(list(rig.directory.glob("v1/*/*.data"))) == 1
