"""Digest-named blobs, and warming."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.cache.rig import CHUNK, FakeClock, Rig, make_config, take

from blobcache_storage.cache.base import CacheStatus, ManagerStats
from blobcache_storage.config import PrefetchConfig
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import DigestMismatch, OriginDenied, OriginUnreachable
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend

StartRig = Callable[..., Awaitable[Rig]]


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


def put_named(rig: Rig, size: int, *, wrong: bool = False) -> tuple[str, bytes]:
    """Store a blob under its digest, or under another's."""
    data = rig.oracle.blob("named", 0, size)
    digest = hashlib.sha256(b"another" if wrong else data).hexdigest()
    blob_id = f"sha256:{digest}"
    rig.backend.put(blob_id, data)
    return blob_id, data


async def whole(rig: Rig, blob_id: str) -> tuple[bytes, type[Exception] | None]:
    """Read all of a blob; returns what came, and the error that ended it."""
    with rig.manager.get_blob_cache(BlobInfo(blob_id)) as cache:
        async with await cache.read(RangeRequest()) as read:
            return await take(read)


async def test_a_right_digest_is_found_once_and_remembered(start: StartRig) -> None:
    """The record outlives a restart: a later whole hit is offered as a span."""
    rig = await start(backend=MemoryBackend(digest_ids=True))
    blob_id, data = put_named(rig, 50 * CHUNK + 3)
    assert await whole(rig, blob_id) == (data, None)
    await rig.durable()
    await rig.restart()
    assert await whole(rig, blob_id) == (data, None)
    generation = rig.manager.table.current(blob_id)
    assert generation is not None
    assert generation.whole_sha256 == hashlib.sha256(data).digest()
    assert rig.backend.bytes_sent == len(data)


@pytest.mark.parametrize("size", [5, CHUNK, 20 * CHUNK + 3])
async def test_a_wrong_digest_closes_short_and_quarantines(start: StartRig, size: int) -> None:
    """The last chunk is never given out, and the blob is refused for a while."""
    rig = await start(backend=MemoryBackend(digest_ids=True))
    blob_id, data = put_named(rig, size, wrong=True)
    got, error = await whole(rig, blob_id)
    assert error is DigestMismatch
    assert got == data[: (size - 1) // CHUNK * CHUNK]
    requests = rig.backend.requests
    with pytest.raises(DigestMismatch):
        await rig.read(blob_id)
    assert rig.backend.requests == requests
    await rig.settled()
    assert rig.manager.stats().bytes == 0
    assert rig.manager.stats().degraded_reason == "DigestMismatch"


@pytest.mark.parametrize("suspend", [False, True])
async def test_an_empty_blob_has_a_digest_too(start: StartRig, suspend: bool) -> None:
    """An origin that answers with nothing is found out before a head is sent."""
    rig = await start(backend=MemoryBackend(digest_ids=True), suspend=suspend)
    right, _ = put_named(rig, 0)
    for _ in range(2):
        assert await whole(rig, right) == (b"", None)
    wrong, _ = put_named(rig, 0, wrong=True)
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            await rig.read(wrong)
    assert rig.manager.stats().degraded_reason == "DigestMismatch"
    assert (await whole(rig, right))[1] is None


async def test_ranges_of_an_unverified_blob_are_served_as_sent(start: StartRig) -> None:
    """A part of a blob cannot be checked against the whole's digest."""
    rig = await start(backend=MemoryBackend(digest_ids=True))
    blob_id, data = put_named(rig, 20 * CHUNK, wrong=True)
    assert (await rig.read(blob_id, 0, CHUNK))[0] == data[: CHUNK + 1]


async def test_a_herd_on_a_digest_named_blob_hashes_and_fetches_once(start: StartRig) -> None:
    """Readers share the check as they share the fetch."""
    rig = await start(backend=MemoryBackend(digest_ids=True))
    blob_id, data = put_named(rig, 100 * CHUNK)
    found = await asyncio.gather(*(whole(rig, blob_id) for _ in range(50)))
    assert all(got == (data, None) for got in found)
    assert rig.backend.bytes_sent == len(data)


@pytest.mark.parametrize("wrong", [False, True])
async def test_a_relayed_blob_is_checked_too(start: StartRig, wrong: bool) -> None:
    """Suspended or full, the digest holds all the same."""
    rig = await start(backend=MemoryBackend(digest_ids=True), suspend=True)
    blob_id, data = put_named(rig, 20 * CHUNK, wrong=wrong)
    got, error = await whole(rig, blob_id)
    assert error is (DigestMismatch if wrong else None)
    assert got == data[: len(got)]
    assert (len(got) == len(data)) is not wrong


async def test_a_full_cache_checks_what_it_passes_on(start: StartRig) -> None:
    """No room for the end of a blob: its beginning is hashed again, and the whole is right."""
    rig = await start(backend=MemoryBackend(digest_ids=True), capacity_bytes_config=5 * 1024 * 1024)
    blob_id, data = put_named(rig, 600 * CHUNK)
    assert await whole(rig, blob_id) == (data, None)
    assert rig.manager.stats().bytes <= 5 * 1024 * 1024


async def test_validate_false_trusts_the_origin(start: StartRig) -> None:
    """Then digests are nobody's business."""
    rig = await start(backend=MemoryBackend(digest_ids=True), validate=False)
    blob_id, data = put_named(rig, 20 * CHUNK, wrong=True)
    assert await whole(rig, blob_id) == (data, None)


# -- warming ---------------------------------------------------------------------------------------


def listed(*blobs: BlobInfo, **settings: object) -> PrefetchConfig:
    """Return a prefetch list."""
    return replace(PrefetchConfig(enable=True, blobs=blobs), **settings)  # type: ignore[arg-type]


def progress(rig: Rig) -> tuple[int, int, int, int]:
    """Return what the figures say."""
    stats: ManagerStats = rig.manager.stats()
    return (
        stats.prefetch_blobs_ready,
        stats.prefetch_blobs,
        stats.prefetch_bytes_ready,
        stats.prefetch_bytes,
    )


async def test_listed_blobs_are_warmed_and_then_hits(start: StartRig) -> None:
    """Sizes need not be given; all ready means all bytes are durable."""
    backend = MemoryBackend()
    rig = await start(backend=backend)
    blobs = {
        name: rig.put(name, size * CHUNK + 1)
        for name, size in zip("abc", (3, 600, 20), strict=True)
    }
    await rig.restart(prefetch=listed(*(BlobInfo(name) for name in blobs)))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 3)
    total = sum(map(len, blobs.values()))
    assert progress(rig) == (3, 3, total, total)
    assert rig.manager.stats().prefetch_problem == ""
    sent = backend.bytes_sent
    assert sent == total
    await rig.restart(prefetch=listed(*(BlobInfo(name) for name in blobs)))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 3)
    for name, data in blobs.items():
        assert await rig.read(name) == (data, CacheStatus.HIT)
    assert backend.bytes_sent == sent


async def test_warming_resumes_what_a_former_process_began(start: StartRig) -> None:
    """Only what is missing is fetched."""
    rig = await start()
    data = rig.put("a", 40 * CHUNK)
    await rig.read("a", 0, 20 * CHUNK - 1)
    await rig.restart(prefetch=listed(BlobInfo("a", len(data))))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)
    assert rig.backend.bytes_sent == len(data)


async def test_warming_stops_at_the_high_watermark_and_evicts_nothing(start: StartRig) -> None:
    """The rest of the list is named, with figures; what is there stays."""
    rig = await start()
    for name in "xab":
        rig.put(name, 10 * CHUNK)
    await rig.read("x")
    capacity = 3 * (10 * CHUNK + 8192)
    blobs = [BlobInfo("a"), BlobInfo("b")]
    await rig.restart(prefetch=listed(*blobs), capacity_bytes=capacity)
    await until(lambda: bool(rig.manager.stats().prefetch_problem))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)
    problem = rig.manager.stats().prefetch_problem
    assert problem.startswith("PrefetchExceedsCapacity: needs ")
    assert {usage.blob_id for usage in rig.manager.usage()} == {"x", "a"}
    assert rig.manager.stats().evicted_blobs == 0


async def test_a_failing_origin_is_asked_again(start: StartRig) -> None:
    """Warming backs off and goes on."""
    rig = await start()
    rig.put("a", 10 * CHUNK)
    rig.backend.fail_next(*(OriginUnreachable("down") for _ in range(3)))
    await rig.restart(prefetch=listed(BlobInfo("a")))
    await until(lambda: rig.manager.stats().prefetch_problem.startswith("OriginUnreachable"))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)
    assert rig.manager.stats().prefetch_problem == ""


async def test_what_was_fetched_beside_a_failure_is_not_held(start: StartRig) -> None:
    """A fetch that nobody wants any more ends, though another of its blob failed first."""
    rig = await start()
    rig.put("a", 1000 * CHUNK)
    fail, hold = asyncio.Event(), asyncio.Event()
    denied = OriginDenied("no")
    first = Fault(hold_body=fail, hold_after_bytes=CHUNK, cut_after_bytes=CHUNK, cut_error=denied)
    rig.backend.fail_next(first, Fault(hold_body=hold))
    rig.manager.reconfigure(make_config(prefetch=listed(BlobInfo("a", 1000 * CHUNK))))
    await until(lambda: rig.backend.open_streams == 2)
    fail.set()
    await until(lambda: rig.manager.stats().prefetch_problem.startswith("OriginDenied"))
    rig.manager.reconfigure(make_config())
    await until(lambda: rig.backend.open_streams == 0)


async def test_a_listed_digest_is_checked(start: StartRig) -> None:
    """A warmed blob of the wrong digest is not kept and not counted as ready."""
    rig = await start()
    data = rig.put("a", 10 * CHUNK)
    wrong = "sha256:" + hashlib.sha256(b"another").hexdigest()
    right = "sha256:" + hashlib.sha256(data).hexdigest()
    await rig.restart(prefetch=listed(BlobInfo("a", len(data), wrong)))
    await until(lambda: rig.manager.stats().prefetch_problem.startswith("DigestMismatch"))
    assert progress(rig)[0] == 0
    await rig.settled()
    assert rig.manager.stats().bytes == 0
    await rig.restart(prefetch=listed(BlobInfo("a", len(data), right)))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)


async def test_demand_lifts_the_throttle(start: StartRig) -> None:
    """A reader does not wait for a slow warm-up of what it reads."""
    rig = await start()
    data = rig.put("a", 40 * CHUNK)
    slow = listed(BlobInfo("a", len(data)), bytes_per_second_limit=CHUNK)
    await rig.restart(prefetch=slow)
    await until(lambda: bool(rig.backend.fetches))
    async with asyncio.timeout(5):
        assert (await rig.read("a"))[0] == data
    assert rig.backend.bytes_sent == len(data)


async def test_warming_can_be_changed_and_ended(start: StartRig) -> None:
    """A new list takes over; an empty one frees the manager."""
    rig = await start()
    hold = asyncio.Event()
    for name in "ab":
        rig.put(name, 10 * CHUNK)
    rig.backend.fail_next(Fault(hold_head=hold))
    config = make_config(prefetch=listed(BlobInfo("a", 10 * CHUNK)))
    rig.manager.reconfigure(config)
    await until(lambda: bool(rig.backend.fetches))
    assert not rig.manager.gc(None)
    rig.manager.reconfigure(make_config(prefetch=listed(BlobInfo("b"))))
    await until(lambda: rig.manager.stats().prefetch_blobs_ready == 1)
    rig.manager.reconfigure(make_config())
    hold.set()
    await until(lambda: rig.manager.gc(None))
    assert rig.manager.stats().prefetch_blobs == 0
