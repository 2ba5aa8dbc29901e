"""What is discarded is erased from the map, whatever else is written at that moment."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, FakeClock, Rig, collect

from blobcache_storage.cache.chunk_map import (
    HEADER_SIZE_BYTES,
    NO_WHOLE_RECORD,
    WHOLE_RECORD_OFFSET,
    decode_whole_record,
    slot_offset,
)
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.generation import Generation
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.recorder import RecordingDisk

Buffers = Sequence[bytes | bytearray | memoryview]


class HeldDisk(Disk):
    """A disk one of whose calls is held until something was erased, or 0.3 s have passed."""

    def __init__(self) -> None:
        self.is_due: Callable[[str, int, bytes], bool] = lambda *_: False
        self.holds = threading.Event()
        self.erased = threading.Event()

    def write(self, fd: int, buffers: Buffers, offset: int) -> int:
        """Write, after a while where it is due."""
        data = b"".join(buffers)
        self._hold_if_due(fd, offset, data)
        written = super().write(fd, buffers, offset)
        if offset >= HEADER_SIZE_BYTES and _name_of(fd).endswith(".map") and not any(data):
            self.erased.set()
        return written

    def sync_data(self, fd: int) -> None:
        """Sync, after a while where it is due."""
        self._hold_if_due(fd, -1, b"")
        super().sync_data(fd)

    def _hold_if_due(self, fd: int, offset: int, data: bytes) -> None:
        if not self.holds.is_set() and self.is_due(_name_of(fd), offset, data):
            self.holds.set()
            self.erased.wait(0.3)


def _name_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


async def started(path: Path, disk: Disk) -> AsyncIterator[Rig]:
    """A rig on a disk."""
    rig = await Rig(path / "root", disk=disk, clock=FakeClock()).start()
    yield rig
    await rig.stop()


def generation_of(rig: Rig, blob_id: str) -> Generation:
    """Return a blob's open generation."""
    generation = rig.manager.table.current(blob_id)
    assert generation is not None
    return generation


def map_bytes(rig: Rig) -> bytes:
    """Return the one map file there is."""
    (path,) = rig.directory.glob("v1/*/*.map")
    return path.read_bytes()


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[tuple[Rig, HeldDisk]]:
    """A rig on a disk that holds calls."""
    disk = HeldDisk()
    async for rig in started(tmp_path, disk):
        yield rig, disk


async def test_a_slot_of_a_sync_under_way_does_not_outlive_its_erasure(
    held: tuple[Rig, HeldDisk],
) -> None:
    """A chunk discarded while its data is synced has no slot when all is written."""
    rig, disk = held
    rig.put("a", 3 * CHUNK)
    disk.is_due = lambda name, offset, _: name.endswith(".data") and offset < 0
    await rig.read("a")
    await until(disk.holds.is_set)
    generation = generation_of(rig, "a")
    generation.discard(1)
    await rig.durable()
    slots = map_bytes(rig)[HEADER_SIZE_BYTES:]
    assert [any(slots[8 * i : 8 * i + 8]) for i in range(3)] == [True, False, True]


async def test_a_whole_record_under_way_does_not_outlive_its_erasure(
    held: tuple[Rig, HeldDisk],
) -> None:
    """Else a chunk that is fetched anew would count as hashed."""
    rig, disk = held
    data = rig.put("a", 3 * CHUNK)
    sha256 = rig.oracle.digest("a", 0, len(data))
    disk.is_due = lambda name, offset, data: (
        offset == WHOLE_RECORD_OFFSET and data != NO_WHOLE_RECORD
    )
    with rig.manager.get_blob_cache(BlobInfo("a", digest=sha256)) as cache:
        async with await cache.read(RangeRequest()) as read:
            assert await collect(read) == data
            await until(disk.holds.is_set)
            generation = generation_of(rig, "a")
            generation.discard(1)
            await rig.durable()
    assert decode_whole_record(generation.header.generation, map_bytes(rig)) is None


async def test_what_could_not_be_erased_is_erased_before_it_is_written_anew(
    tmp_path: Path,
) -> None:
    """A slot ahead of its data is what the order of writing is there to prevent."""
    disk = RecordingDisk()
    async for rig in started(tmp_path, disk):
        data = rig.put("a", 3 * CHUNK)
        await rig.read("a")
        await rig.durable()
        disk.fail_kinds, disk.fail_with = frozenset({"write"}), errno.EIO
        disk.calls, disk.fail_at = 0, 1
        generation_of(rig, "a").discard(1)
        await rig.durable()
        assert rig.manager.stats().degraded_reason == "DiskError"
        disk.fail_at = 0
        assert isinstance(rig.clock, FakeClock)
        rig.clock.advance(60)
        disk.operations.clear()
        assert (await rig.read("a"))[0] == data
        await rig.durable()
        writes = [(op.suffix, op.offset) for op in disk.operations if op.kind == "write"]
        erased = writes.index(("map", slot_offset(1)))
        assert erased < writes.index(("data", CHUNK))
        assert writes.index(("map", WHOLE_RECORD_OFFSET)) < erased


async def test_what_could_not_be_erased_is_erased_at_the_end(tmp_path: Path) -> None:
    """A manager that ends tries it again."""
    disk = RecordingDisk()
    async for rig in started(tmp_path, disk):
        rig.put("a", 3 * CHUNK)
        await rig.read("a")
        await rig.durable()
        disk.fail_kinds, disk.calls, disk.fail_at = frozenset({"write"}), 0, 1
        generation_of(rig, "a").discard(1)
        await rig.durable()
        disk.fail_at = 0
        await rig.manager.destroy()
        assert not any(map_bytes(rig)[slot_offset(1) : slot_offset(2)])


async def test_a_map_that_is_closed_is_not_synced(tmp_path: Path) -> None:
    """Its descriptor may be another file's by now."""
    disk = RecordingDisk()
    async for rig in started(tmp_path, disk):
        rig.put("a", 3 * CHUNK)
        await rig.read("a")
        await rig.durable()
        generation = generation_of(rig, "a")
        generation.writer._map_dirty = True
        assert generation.close_if_idle()
        disk.operations.clear()
        await generation.writer.finish()
        assert not disk.operations
        assert rig.manager.stats().degraded_reason == ""
