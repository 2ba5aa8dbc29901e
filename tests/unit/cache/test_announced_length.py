"""An origin may announce more than it sends, or than there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from tests.unit.cache.rig import CHUNK, Rig, collect
from typing_extensions import override

from blobcache_storage.backend.base import FetchStream
from blobcache_storage.cache import fill
from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.device import BlobInfo, BlobVersion, ByteRange, RangeRequest, Validator
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend

ANNOUNCED = 64 * 1024 * 1024 * 1024
SENT = 100 * CHUNK


class LyingStream(FetchStream):
    """A whole answer of 64 GiB, of which a little comes."""

    def __init__(self, version: BlobVersion) -> None:
        self.version = version
        self.span = ByteRange(0, ANNOUNCED)

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        for _ in range(SENT // CHUNK):
            yield bytes(CHUNK)
        await asyncio.Event().wait()

    @override
    async def aclose(self) -> None:
        """Nothing is open."""


class LyingBackend(MemoryBackend):
    """An origin that lies about one blob."""

    @override
    async def fetch(self, blob_id: str, request: RangeRequest, **others: object) -> FetchStream:
        if blob_id == "lie":
            return LyingStream(BlobVersion(ANNOUNCED, Validator.ETAG, '"x"', '"x"'))
        return await super().fetch(blob_id, request, **others)  # type: ignore[arg-type]


async def test_what_is_announced_takes_no_room_until_it_comes(tmp_path: Path) -> None:
    """Neither of the configuration's quota nor of the loop's time."""
    capacity = 1024 * 1024 * 1024
    rig = Rig(tmp_path / "root", backend=LyingBackend(), capacity_bytes_config=capacity)
    await rig.start()
    data = rig.put("honest", 20 * CHUNK)
    with rig.manager.get_blob_cache(BlobInfo("lie")) as cache:
        async with await cache.read(RangeRequest()) as read:
            pieces = read.pieces()
            for _ in range(SENT // CHUNK):
                await anext(pieces)  # type: ignore[arg-type]
            map_bytes = 8 * ANNOUNCED // CHUNK
            used = rig.manager.stats().bytes - map_bytes
            assert SENT <= used <= SENT + 2 * fill.CLAIM_BYTES
            assert (await rig.read("honest")) == (data, CacheStatus.MISS_STORED)
    await rig.stop()


async def test_a_whole_answer_skips_what_is_there(tmp_path: Path) -> None:
    """However far apart the missing chunks are, it brings all of them."""
    rig = await Rig(tmp_path / "root").start()
    data = rig.put("a", 6000 * CHUNK)
    await rig.read("a", 300 * CHUNK, 5500 * CHUNK)
    await rig.durable()
    rig.backend.fail_next(Fault(whole=True))
    sent = len(rig.backend.fetches)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest(first=0, last=1)) as read:
            generation = rig.manager.table.current("a")
            assert generation is not None
            await until(lambda: generation.is_complete)
            assert await collect(read) == data[:2]
    assert len(rig.backend.fetches) == sent + 1
    assert (await rig.read("a")) == (data, CacheStatus.HIT)
    await rig.stop()


async def test_a_whole_answer_without_room_is_stored_as_far_as_there_is(tmp_path: Path) -> None:
    """And its reader gets all of it."""
    rig = await Rig(tmp_path / "root", capacity_bytes_config=8 * 1024 * 1024).start()
    data = rig.put("a", 2000 * CHUNK)
    rig.backend.fail_next(Fault(whole=True))
    assert (await rig.read("a"))[0] == data
    assert rig.manager.stats().bytes <= 8 * 1024 * 1024
    await rig.stop()
