"""The order of writing, faults of the disk, and files that are not what they should be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, FakeClock, Rig, collect

from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.cache.chunk_map import HEADER_SIZE_BYTES, SLOT_SIZE_BYTES
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.testing.recorder import RecordingDisk


@pytest.fixture
def disk() -> RecordingDisk:
    """The disk of `rig`."""
    return RecordingDisk()


@pytest.fixture
async def rig(tmp_path: Path, disk: RecordingDisk) -> AsyncIterator[Rig]:
    """A rig on a recording disk."""
    started = await Rig(tmp_path / "root", disk=disk, clock=FakeClock()).start()
    yield started
    disk.fail_at = 0
    await started.stop()


def files(rig: Rig, suffix: str) -> list[Path]:
    """Return the cached files of a kind."""
    return sorted(rig.directory.glob(f"v1/*/*.{suffix}"))


async def test_records_follow_the_sync_of_their_data(rig: Rig, disk: RecordingDisk) -> None:
    """No slot is written before a sync that began after its data was written."""
    for name in ("a", "b"):
        rig.put(name, 100 * CHUNK + 3)
    await asyncio.gather(*(rig.read(name, i * CHUNK) for name in "ab" for i in (60, 20, 0)))
    await rig.durable()
    written: dict[str, set[int]] = {}
    synced: dict[str, set[int]] = {}
    recorded: dict[str, set[int]] = {}
    for op in disk.operations:
        if op.kind == "write" and op.suffix == "data":
            chunks = range(op.offset // CHUNK, (op.offset + op.length - 1) // CHUNK + 1)
            written.setdefault(op.stem, set()).update(chunks)
        elif op.kind == "sync_data" and op.suffix == "data":
            synced[op.stem] = set(written[op.stem])
        elif op.kind == "write" and op.suffix == "map" and op.offset >= HEADER_SIZE_BYTES:
            first = (op.offset - HEADER_SIZE_BYTES) // SLOT_SIZE_BYTES
            slots = set(range(first, first + op.length // SLOT_SIZE_BYTES))
            assert slots <= synced[op.stem], "a slot went ahead of its data"
            recorded.setdefault(op.stem, set()).update(slots)
    assert [len(slots) for slots in recorded.values()] == [101, 101]


async def test_one_sync_serves_many_chunks(rig: Rig, disk: RecordingDisk) -> None:
    """A blob read in one go is synced a few times, not once per chunk."""
    rig.put("a", 500 * CHUNK)
    await rig.read("a")
    await rig.durable()
    syncs = [op for op in disk.operations if op.kind == "sync_data" and op.suffix == "data"]
    assert len(syncs) <= 3


async def test_a_map_is_synced_once_nothing_else_is_to_do(rig: Rig, disk: RecordingDisk) -> None:
    """What is recorded survives a power cut while the blob is still open."""
    rig.put("a", 10 * CHUNK)
    await rig.read("a")
    await rig.durable()
    of_map = [op for op in disk.operations if op.suffix == "map"]
    assert of_map[-1].kind == "sync_data"
    assert [op.kind for op in of_map].count("sync_data") <= 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("lasting", [False, True])
async def test_any_failing_call_costs_no_byte(
    rig: Rig, disk: RecordingDisk, code: int, lasting: bool
) -> None:
    """Whichever call fails, once or from then on, readers get the right bytes."""
    clock = rig.clock
    assert isinstance(clock, FakeClock)
    number = 0
    failures = 1
    while failures:
        number += 1
        blob_id = f"blob-{number}"
        data = rig.put(blob_id, 24 * CHUNK + 5)
        clock.advance(3600)
        disk.fail_with, disk.calls, disk.fail_at = code, 0, number
        disk.fail_until = 1 << 30 if lasting else 0
        assert (await rig.read(blob_id))[0] == data
        await rig.durable()
        failures = disk.calls >= number
        if failures:
            reason = "DiskError" if code == errno.EIO else "DiskFull"
            assert rig.manager.stats().degraded_reason == reason
        disk.fail_at = 0
        assert (await rig.read(blob_id))[0] == data
        await rig.durable()
        await rig.restart()
        assert (await rig.read(blob_id))[0] == data
        await rig.durable()
        assert rig.root.budget.used_bytes == rig.manager.stats().bytes
    assert number > 3


async def test_after_the_cool_down_it_stores_again(rig: Rig, disk: RecordingDisk) -> None:
    """A full disk stops storing for a while, not for ever."""
    data = rig.put("a", 5 * CHUNK)
    disk.fail_at, disk.fail_until, disk.fail_with = 1, 1 << 30, errno.ENOSPC
    await rig.read("a")
    await rig.durable()
    disk.fail_at = 0
    assert await rig.read("a") == (data, CacheStatus.MISS)
    await rig.settled()
    assert rig.manager.stats().bytes == 0
    assert isinstance(rig.clock, FakeClock)
    rig.clock.advance(60)
    assert await rig.read("a") == (data, CacheStatus.MISS_STORED)
    assert await rig.read("a") == (data, CacheStatus.HIT)


async def test_short_writes_are_completed(rig: Rig, disk: RecordingDisk) -> None:
    """A disk that takes a little at a time gets all of it."""
    disk.short_writes = 1000
    data = rig.put("a", 6 * CHUNK + 1)
    await rig.read("a")
    await rig.restart()
    assert await rig.read("a") == (data, CacheStatus.HIT)


async def test_an_unreadable_chunk_is_fetched_again(rig: Rig, disk: RecordingDisk) -> None:
    """A read error of the disk is a miss."""
    data = rig.put("a", 5 * CHUNK)
    await rig.read("a")
    await rig.restart()
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            disk.fail_kinds, disk.calls, disk.fail_at = frozenset({"read"}), 0, 2
            assert await collect(read) == data
    disk.fail_at = 0
    assert rig.backend.bytes_sent == 6 * CHUNK


def flip(path: Path, offset: int) -> None:
    """Turn the bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


async def test_a_flipped_bit_is_found_and_fetched_again(rig: Rig) -> None:
    """Only the chunk with the wrong byte is fetched again; later hits are right."""
    data = rig.put("a", 20 * CHUNK)
    await rig.read("a")
    await rig.stop()
    (path,) = files(rig, "data")
    flip(path, 7 * CHUNK + 100)
    await rig.start()
    assert (await rig.read("a"))[0] == data
    assert rig.backend.bytes_sent == 21 * CHUNK
    await rig.restart()
    assert await rig.read("a") == (data, CacheStatus.HIT)


Damage = Callable[[Path, Path], None]


def _truncate(length: int) -> Damage:
    return lambda data, map_: os.truncate(map_, length)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_truncate(0), id="empty map"),
        pytest.param(_truncate(100), id="torn header"),
        pytest.param(_truncate(HEADER_SIZE_BYTES + 20), id="few slots"),
        pytest.param(lambda data, map_: flip(map_, 3), id="magic"),
        pytest.param(lambda data, map_: flip(map_, 9), id="version"),
        pytest.param(lambda data, map_: flip(map_, 17), id="generation"),
        pytest.param(lambda data, map_: flip(map_, 70), id="blob id"),
        pytest.param(lambda data, map_: flip(map_, HEADER_SIZE_BYTES + 8), id="slot"),
        pytest.param(lambda data, map_: flip(map_, HEADER_SIZE_BYTES + 13), id="seal"),
        pytest.param(lambda data, map_: os.truncate(data, 3 * CHUNK + 7), id="short data"),
        pytest.param(lambda data, map_: os.truncate(data, 0), id="no data"),
        pytest.param(lambda data, map_: data.unlink(), id="data gone"),
        pytest.param(lambda data, map_: map_.unlink(), id="map gone"),
    ],
)
@pytest.mark.parametrize("with_index", [True, False])
async def test_damaged_files_are_never_believed(rig: Rig, damage: Damage, with_index: bool) -> None:
    """Whatever became of the files, reads are right and the cache works on."""
    data = rig.put("a", 20 * CHUNK + 1)
    await rig.read("a")
    await rig.stop()
    damage(files(rig, "data")[0], files(rig, "map")[0])
    if not with_index:
        (rig.directory / "v1" / "index.json").unlink()
    await rig.start()
    assert (await rig.read("a"))[0] == data
    await rig.restart()
    assert await rig.read("a") == (data, CacheStatus.HIT)


async def test_swapped_maps_are_never_believed(rig: Rig) -> None:
    """A map beside another blob's data vouches for nothing."""
    blobs = {name: rig.put(name, 10 * CHUNK) for name in "ab"}
    for name in blobs:
        await rig.read(name)
    await rig.stop()
    one, other = files(rig, "map")
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    await rig.start()
    for name, data in blobs.items():
        assert (await rig.read(name))[0] == data


async def test_a_kill_leaves_only_what_can_be_discarded(rig: Rig, tmp_path: Path) -> None:
    """A copy of the root taken at any moment of a fill is a cache of right bytes."""
    data = rig.put("a", 200 * CHUNK)
    copies = []
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            count = 0
            async for _ in read.pieces():
                count += 1
                if count % 60 == 0:
                    copy = tmp_path / f"copy-{count}"
                    await asyncio.to_thread(_copy_tree, rig.directory, copy)
                    copies.append(copy)
    for copy in copies:
        other = await Rig(copy, backend=rig.backend).start()
        assert (await other.read("a"))[0] == data
        await other.stop()
    assert copies


def _copy_tree(source: Path, target: Path) -> None:
    """Copy what is there; a file renamed or deleted meanwhile was so at the moment of the kill."""

    def copy(file: str, to: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(file, to)

    target.mkdir(mode=0o700)
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=copy)


async def test_a_span_that_fails_goes_on_from_the_origin(rig: Rig) -> None:
    """A verified chunk that cannot be read any more is fetched again, for this reader already."""
    data = rig.put("a", 20 * CHUNK)
    await rig.read("a")
    await rig.durable()
    (path,) = files(rig, "data")
    os.truncate(path, 5 * CHUNK + 7)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            span = read.file_span()
            assert span is not None
            sent = os.pread(span.fd, span.length, span.offset)
            assert read.span_failed(span, len(sent))
            assert sent + await collect(read) == data
            assert not read.span_failed(span, len(sent)), "it would go on for ever"
    stats = rig.manager.stats()
    assert stats.hit_bytes + stats.miss_bytes == 2 * len(data)
    await rig.durable()
    assert (await rig.read("a")) == (data, CacheStatus.HIT)
    assert path.read_bytes() == data


async def test_a_relay_takes_over_where_the_cache_ends(rig: Rig, disk: RecordingDisk) -> None:
    """Also where others have stored meanwhile what the relay was opened for."""
    data = rig.put("a", 20 * CHUNK)
    await rig.read("a", 0, 5 * CHUNK - 1)
    await rig.durable()
    rig.manager._cool_until = float("inf")
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            rig.manager._cool_until = 0.0
            await rig.read("a", 5 * CHUNK, 10 * CHUNK - 1)
            await rig.durable()
            assert await collect(read) == data


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("suffix", [".data", ".map"])
async def test_files_that_cannot_be_opened_now_are_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, code: int, suffix: str
) -> None:
    """A shortage is no damage: the blob is relayed, and a hit again once it is over."""
    data = rig.put("a", 3 * CHUNK)
    await rig.read("a")
    await rig.restart()
    opened = RecordingDisk.open

    def failing(self: RecordingDisk, name: str, *args: int, **kwargs: int) -> int:
        if name.endswith(suffix):
            raise OSError(code, os.strerror(code))
        return opened(self, name, *args, **kwargs)

    monkeypatch.setattr(RecordingDisk, "open", failing)
    assert await rig.read("a") == (data, CacheStatus.MISS)
    assert rig.manager.stats().degraded_reason == "DiskError"
    await rig.settled()
    assert len(files(rig, "data")) == len(files(rig, "map")) == 1
    monkeypatch.setattr(RecordingDisk, "open", opened)
    assert await rig.read("a") == (data, CacheStatus.HIT)
