"""Reads through FileCacheMgr, end to end over a backend in memory."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.cache.rig import CHUNK, Rig, collect, take

from blobcache_storage.cache.base import CacheStatus, EvictionOutcome, Victim
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import (
    BlobChanged,
    BlobNotFound,
    OriginDenied,
    OriginTimeout,
    OriginUnreachable,
    RangeNotSatisfiable,
)
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.memory_backend import Fault


async def test_miss_then_hit_reads_the_same_bytes_once_from_the_origin(rig: Rig) -> None:
    """The second read asks the origin for nothing."""
    data = rig.put("a", 10 * CHUNK + 17)
    assert await rig.read("a") == (data, CacheStatus.MISS_STORED)
    assert await rig.read("a") == (data, CacheStatus.HIT)
    assert rig.backend.bytes_sent == len(data)
    stats = rig.manager.stats()
    assert (stats.hit_bytes, stats.miss_bytes) == (len(data), len(data))
    assert (stats.origin_bytes, stats.requests) == (len(data), 2)


async def test_a_range_fetches_only_the_chunks_it_touches(rig: Rig) -> None:
    """Sparse reads do not fetch the blob; a wider one is partial."""
    data = rig.put("a", 40 * CHUNK)
    got, status = await rig.read("a", 5 * CHUNK + 3, 6 * CHUNK + 9)
    assert (got, status) == (data[5 * CHUNK + 3 : 6 * CHUNK + 10], CacheStatus.MISS_STORED)
    assert rig.backend.bytes_sent == 2 * CHUNK
    got, status = await rig.read("a", 4 * CHUNK, 8 * CHUNK - 1)
    assert (got, status) == (data[4 * CHUNK : 8 * CHUNK], CacheStatus.PARTIAL_STORED)
    assert rig.backend.bytes_sent == 4 * CHUNK
    stats = rig.manager.stats()
    assert stats.hit_bytes == 2 * CHUNK
    assert stats.hit_bytes + stats.miss_bytes == 4 * CHUNK + CHUNK + 7


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
async def test_suffixes_and_ends(rig: Rig, size: int) -> None:
    """A suffix of an unknown blob is right for every size around chunk borders."""
    data = rig.put("a", size)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest(suffix_length=CHUNK // 2)) as read:
            assert await collect(read) == data[-CHUNK // 2 :]
        async with await cache.read(RangeRequest(suffix_length=10 * CHUNK)) as read:
            assert await collect(read) == data
    assert (await rig.read("a", size - 1))[0] == data[-1:]
    with pytest.raises(RangeNotSatisfiable):
        await rig.read("a", size)


async def test_an_empty_blob(rig: Rig) -> None:
    """Nothing is a blob too: whole reads succeed, ranges do not exist."""
    rig.put("a", 0)
    assert (await rig.read("a"))[0] == b""
    with pytest.raises(RangeNotSatisfiable):
        await rig.read("a", 0, 5)


async def test_two_hundred_readers_share_one_request(rig: Rig) -> None:
    """A herd on a cold blob costs the origin the blob once."""
    data = rig.put("a", 300 * CHUNK + 1)
    rig.backend.latency_seconds = 0.01
    found = await asyncio.gather(*(rig.read("a") for _ in range(200)))
    assert all(got == data for got, _ in found)
    assert rig.backend.bytes_sent == len(data)


async def test_readers_of_other_ranges_join(rig: Rig) -> None:
    """Overlapping ranges of a cold blob fetch each byte once."""
    data = rig.put("a", 64 * CHUNK)
    spans = [(i * CHUNK, (i + 40) * CHUNK - 1) for i in range(24)]
    found = await asyncio.gather(*(rig.read("a", first, last) for first, last in spans))
    for (first, last), (got, _) in zip(spans, found, strict=True):
        assert got == data[first : last + 1]
    assert rig.backend.bytes_sent <= len(data)


async def test_restart_keeps_the_cache(rig: Rig) -> None:
    """After a clean restart all is a hit and the origin is not asked."""
    data = rig.put("a", 30 * CHUNK + 5)
    await rig.read("a")
    await rig.restart()
    sent, requests = rig.backend.bytes_sent, rig.backend.requests
    assert await rig.read("a") == (data, CacheStatus.HIT)
    assert (rig.backend.bytes_sent, rig.backend.requests) == (sent, requests)


async def test_a_hit_is_one_file_span(rig: Rig) -> None:
    """Durable, verified chunks are offered as a span of the file."""
    data = rig.put("a", 5 * CHUNK)
    await rig.read("a")
    await rig.durable()
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest(first=3, last=4 * CHUNK)) as read:
            span = read.file_span()
            assert span is not None
            assert (span.offset, span.length) == (3, 4 * CHUNK - 2)
            assert await collect(read) == b""
    assert data


async def test_a_broken_body_is_resumed(rig: Rig) -> None:
    """A reset in mid-body costs a range from there on, not the bytes before."""
    data = rig.put("a", 20 * CHUNK)
    rig.backend.fail_next(Fault(cut_after_bytes=7 * CHUNK + 11))
    assert (await rig.read("a"))[0] == data
    assert rig.backend.bytes_sent == len(data)
    assert rig.backend.fetches[1].request.first == 7 * CHUNK + 11
    assert rig.backend.fetches[1].expect is not None


async def test_an_origin_that_fails_fails_the_read(rig: Rig) -> None:
    """Errors before the head are raised by `read`, and leave nothing behind."""
    rig.put("a", CHUNK)
    for error in (OriginDenied("no"), OriginTimeout("late"), BlobNotFound("gone")):
        rig.backend.fail_next(error)
        with pytest.raises(type(error)):
            await rig.read("a")
    assert rig.manager.stats().degraded_reason == "OriginTimeout", "404 is no failure"
    assert (await rig.read("a"))[1] is CacheStatus.MISS_STORED
    assert rig.manager.stats().degraded_reason == ""


async def test_a_body_that_never_ends_well_closes_short(rig: Rig) -> None:
    """What was yielded before the failure is right; then the error is raised."""
    data = rig.put("a", 20 * CHUNK)
    rig.backend.fail_next(
        Fault(cut_after_bytes=5 * CHUNK),
        *(Fault(cut_after_bytes=0) for _ in range(10)),
    )
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            assert await take(read) == (data[: 5 * CHUNK], OriginUnreachable)


async def test_what_the_backend_gave_up_is_not_asked_again(rig: Rig) -> None:
    """Its retries are the only ones of a head: retries of retries would multiply."""
    rig.put("a", 20 * CHUNK)
    await rig.read("a", 0, CHUNK)
    asked = rig.backend.requests
    rig.backend.fail_next(*(OriginTimeout("late") for _ in range(9)))
    with pytest.raises(OriginTimeout):
        await rig.read("a")
    assert rig.backend.requests == asked + 1


async def test_a_version_change_restarts_a_read_whose_head_was_not_sent(rig: Rig) -> None:
    """A range of a half-cached blob that changed is read anew, whole, in the new version."""
    rig.put("a", 20 * CHUNK)
    await rig.read("a", 0, CHUNK)
    new = rig.put("a", 20 * CHUNK, version=1)
    assert (await rig.read("a", 0, 10 * CHUNK))[0] == new[: 10 * CHUNK + 1]
    assert (await rig.read("a"))[0] == new


async def test_a_version_change_in_mid_read_never_mixes(rig: Rig) -> None:
    """A read whose head was sent closes short; the next one has the new version."""
    old = rig.put("a", 3000 * CHUNK)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            new = rig.put("a", 3000 * CHUNK, version=1)
            got, error = await take(read)
    assert error is BlobChanged
    assert got
    assert got == old[: len(got)]
    assert (await rig.read("a"))[0] == new


async def test_a_blob_in_use_is_not_evicted_and_reads_on(rig: Rig) -> None:
    """64 MiB are read right while the operator wants them gone."""
    data = rig.put("a", 64 * 1024 * 1024)
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            (usage,) = rig.manager.usage()
            victim = Victim("a", usage.version, last_read_before=usage.last_read_time + 1e9)
            (result,) = await rig.manager.evict([victim])
            assert result.outcome is EvictionOutcome.IN_USE
            assert await collect(read) == data
    await rig.durable()
    (usage,) = rig.manager.usage()
    (result,) = await rig.manager.evict([victim])
    assert result.outcome is EvictionOutcome.EVICTED
    assert result.bytes == usage.bytes
    assert rig.manager.usage() == []
    assert rig.manager.stats().bytes == 0
    assert rig.root.budget.used_bytes == 0


async def test_a_blob_without_validator_is_passed_through(rig: Rig) -> None:
    """Nothing tells its versions apart: it is never stored."""
    data = rig.oracle.blob("a", 0, 5 * CHUNK)
    rig.backend.put("a", data, None)
    for _ in range(2):
        assert await rig.read("a") == (data, CacheStatus.MISS)
    assert rig.manager.stats().bytes == 0


async def test_suspended_misses_bypass_and_hits_go_on(rig: Rig) -> None:
    """Suspending stores nothing more and takes nothing away."""
    data = rig.put("a", 5 * CHUNK)
    other = rig.put("b", 5 * CHUNK)
    await rig.read("a")
    await rig.restart(suspend=True)
    assert await rig.read("a") == (data, CacheStatus.HIT)
    for _ in range(2):
        assert await rig.read("b") == (other, CacheStatus.BYPASS)
    assert rig.manager.stats().blobs == 1


async def test_a_whole_answer_to_a_range_fills_the_blob(rig: Rig) -> None:
    """An origin without ranges is asked once, however many requests the blob would take."""
    data = rig.put("a", 2000 * CHUNK)
    rig.backend.fail_next(Fault(whole=True))
    assert (await rig.read("a"))[0] == data
    assert (len(rig.backend.fetches), rig.backend.bytes_sent) == (1, len(data))


async def test_a_stalled_request_gets_one_competitor(rig: Rig) -> None:
    """After 2 s without progress a second request is sent, and only one."""
    data = rig.put("a", 20 * CHUNK)
    hold = asyncio.Event()
    rig.backend.fail_next(Fault(hold_body=hold, hold_after_bytes=3 * CHUNK))
    assert (await rig.read("a"))[0] == data
    assert len(rig.backend.fetches) == 2
    assert rig.backend.bytes_sent == len(data)
    hold.set()


async def test_a_fetch_ends_when_nobody_waits(rig: Rig) -> None:
    """A reader that goes away takes its fetch along; what was complete stays."""
    rig.put("a", 20 * CHUNK)
    hold = asyncio.Event()
    rig.backend.fail_next(Fault(hold_body=hold, hold_after_bytes=3 * CHUNK))
    with rig.manager.get_blob_cache(BlobInfo("a")) as cache:
        async with await cache.read(RangeRequest()) as read:
            pieces = read.pieces()
            for _ in range(3):
                await anext(pieces)
            await pieces.aclose()  # type: ignore[attr-defined]
    await until(lambda: not rig.backend.open_streams)
    assert await rig.read("a", 0, 3 * CHUNK - 1) == (
        rig.oracle.read("a", 0, 0, 3 * CHUNK),
        CacheStatus.HIT,
    )
