"""Retries, breaker, slots and byte rate, on a clock that moves only when told to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from blobcache_storage.backend import breaker as breaker_module
from blobcache_storage.backend.breaker import Breaker
from blobcache_storage.backend.manners import (
    NOT_FOUND_BLOBS_MAX,
    RETRIES_PER_WINDOW_MIN,
    ByteRate,
    ConnectionSlots,
    Manners,
    SlotsBusy,
)
from blobcache_storage.backend.windows import SlidingCount
from blobcache_storage.device import RequestSource
from blobcache_storage.errors import (
    BlobNotFound,
    CircuitOpen,
    OriginDenied,
    OriginServerError,
    OriginThrottled,
    OriginUnreachable,
    StorageError,
)

DEMAND, PREFETCH = RequestSource.ON_DEMAND, RequestSource.PREFETCH


class FakeTime:
    """A clock, and a sleep that moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        """Return the time."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let time pass, and others run."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def time() -> FakeTime:
    """Time that stands still."""
    return FakeTime()


def manners_of(time: FakeTime, retry_limit: int = 3) -> Manners:
    """Return manners on that time."""
    return Manners(
        retry_limit=retry_limit, clock=time.clock, sleep=time.sleep, rng=random.Random(5)
    )


def failing(error: StorageError) -> Callable[[], Awaitable[None]]:
    """Return a request that fails."""

    async def attempt() -> None:
        raise error

    return attempt


async def answered() -> str:
    """Answer."""
    return "answer"


async def test_backoff_grows_with_jitter(time: FakeTime) -> None:
    """Waits are random below a bound that doubles."""
    manners = manners_of(time, retry_limit=8)
    with pytest.raises(OriginServerError):
        await manners.run("blob", DEMAND, failing(OriginServerError("no")))
    assert len(time.slept) == 8
    bounds = [min(5.0, 0.1 * 2**n) for n in range(8)]
    assert all(0 <= wait <= bound for wait, bound in zip(time.slept, bounds, strict=True))
    assert len(set(time.slept)) == 8


async def test_a_short_retry_after_is_waited_for(time: FakeTime) -> None:
    """What the origin asks for is the least wait; more than the bound goes up at once."""
    manners = manners_of(time, retry_limit=1)
    with pytest.raises(OriginThrottled):
        await manners.run("b", DEMAND, failing(OriginThrottled("no", retry_after_seconds=2)))
    assert 2 <= time.slept[0] <= 2.1
    with pytest.raises(OriginThrottled):
        await manners.run("b", DEMAND, failing(OriginThrottled("no", retry_after_seconds=6)))
    assert len(time.slept) == 1


async def test_the_retry_budget_is_a_tenth_or_ten(time: FakeTime) -> None:
    """Failing requests are not multiplied: ten retries a minute, or a tenth of the requests."""
    manners = manners_of(time, retry_limit=100)
    with pytest.raises(OriginServerError):
        await manners.run("blob", DEMAND, failing(OriginServerError("no")))
    assert len(time.slept) == RETRIES_PER_WINDOW_MIN
    time.now += 61
    for _ in range(200):
        assert await manners.run("blob", DEMAND, answered) == "answer"
    before = len(time.slept)
    with pytest.raises(OriginServerError):
        await manners.run("blob", DEMAND, failing(OriginServerError("no")))
    assert len(time.slept) - before == 21


async def test_prefetch_is_retried_once(time: FakeTime) -> None:
    """A prefetch has time to come back later."""
    with pytest.raises(OriginUnreachable):
        await manners_of(time).run("blob", PREFETCH, failing(OriginUnreachable("no")))
    assert len(time.slept) == 1


def open_breaker(time: FakeTime) -> Breaker:
    """Return a breaker that has just opened."""
    breaker = Breaker(time.clock)
    for _ in range(10):
        breaker.admit().succeeded()
    for _ in range(10):
        assert not breaker.is_open
        breaker.admit().failed()
    assert breaker.is_open
    return breaker


def test_the_breaker_opens_at_half_of_twenty(time: FakeTime) -> None:
    """Nineteen failures say nothing; twenty requests with ten failures do."""
    breaker = Breaker(time.clock)
    for _ in range(19):
        breaker.admit().failed()
    assert not breaker.is_open
    with pytest.raises(CircuitOpen) as caught:
        open_breaker(time).admit()
    assert caught.value.retry_after_seconds is not None


def test_old_failures_are_forgotten(time: FakeTime) -> None:
    """Only the last ten seconds count."""
    breaker = Breaker(time.clock)
    for _ in range(19):
        breaker.admit().failed()
    time.now += 11
    breaker.admit().failed()
    assert not breaker.is_open


def test_one_probe_decides(time: FakeTime) -> None:
    """After the pause one request goes through; the others wait for its outcome."""
    breaker = open_breaker(time)
    time.now += breaker_module.OPEN_SECONDS_FIRST
    probe = breaker.admit()
    with pytest.raises(CircuitOpen):
        breaker.admit()
    probe.succeeded()
    for _ in range(30):
        breaker.admit().succeeded()


def test_a_failed_probe_opens_longer_to_a_bound(time: FakeTime) -> None:
    """The pause doubles and never exceeds five seconds."""
    breaker = open_breaker(time)
    pauses = []
    for _ in range(6):
        start = time.now
        while breaker.is_open:
            time.now += 0.25
        pauses.append(time.now - start)
        breaker.admit().failed()
    assert pauses == [1, 2, 4, 5, 5, 5]


def test_an_abandoned_probe_makes_room(time: FakeTime) -> None:
    """A probe nobody waited for leaves the next request to be it."""
    breaker = open_breaker(time)
    time.now += 5
    breaker.admit().abandoned()
    probe = breaker.admit()
    probe.succeeded()
    probe.failed()
    assert not breaker.is_open


async def test_an_open_breaker_sends_nothing(time: FakeTime) -> None:
    """Requests fail at once, and refusals of a healthy origin never open it."""
    manners = manners_of(time, retry_limit=0)
    for _ in range(40):
        with pytest.raises(OriginDenied):
            await manners.run("b", DEMAND, failing(OriginDenied("no")))
    for _ in range(40):
        with pytest.raises((OriginUnreachable, CircuitOpen)):
            await manners.run("b", DEMAND, failing(OriginUnreachable("no")))
    sent = []

    async def attempt() -> None:
        sent.append(1)

    with pytest.raises(CircuitOpen):
        await manners.run("b", DEMAND, attempt)
    assert sent == []


async def test_our_own_lack_of_connections_is_not_the_origins_fault(time: FakeTime) -> None:
    """Waiting in vain for a connection neither opens the breaker nor is repeated."""
    manners = manners_of(time)
    for _ in range(40):
        with pytest.raises(OriginThrottled):
            await manners.run("b", DEMAND, failing(SlotsBusy("all taken")))
    assert time.slept == []
    assert await manners.run("b", DEMAND, answered) == "answer"


async def test_not_found_is_remembered_briefly(time: FakeTime) -> None:
    """For five seconds a missing blob is missing without asking; new credentials end that."""
    manners = manners_of(time)
    with pytest.raises(BlobNotFound):
        await manners.run("b", DEMAND, failing(BlobNotFound("no")))
    with pytest.raises(BlobNotFound):
        await manners.run("b", DEMAND, answered)
    time.now += 5.01
    assert await manners.run("b", DEMAND, answered) == "answer"
    with pytest.raises(BlobNotFound):
        await manners.run("b", DEMAND, failing(BlobNotFound("no")))
    manners.reconfigure(retry_limit=1, bytes_per_second_limit=None)
    assert await manners.run("b", DEMAND, answered) == "answer"


async def test_the_memory_of_missing_blobs_is_bounded(time: FakeTime) -> None:
    """A scan over missing blobs costs no more than so many entries; the oldest go."""
    memory = manners_of(time).not_found
    for n in range(NOT_FOUND_BLOBS_MAX + 1):
        memory.remember(str(n))
    memory.check("0")
    with pytest.raises(BlobNotFound):
        memory.check("1")


def test_a_sliding_count_slides(time: FakeTime) -> None:
    """Counts leave with their second."""
    count = SlidingCount(10, time.clock)
    for _ in range(20):
        count.add()
        time.now += 1
    assert count.total() == 9
    count.clear()
    assert count.total() == 0


class TestSlots:
    """At most so many at once, readers first."""

    async def test_readers_come_first_and_prefetch_is_capped(self) -> None:
        """A freed slot goes to a reader; prefetch leaves room even when nobody reads."""
        slots = ConnectionSlots(limit=2, prefetch_limit=1)
        await slots.acquire(PREFETCH)
        order: list[str] = []

        async def take(name: str, source: RequestSource) -> None:
            await slots.acquire(source)
            order.append(name)

        prefetch = asyncio.create_task(take("prefetch", PREFETCH))
        await asyncio.sleep(0)
        await slots.acquire(DEMAND)
        reader = asyncio.create_task(take("reader", DEMAND))
        await asyncio.sleep(0)
        assert order == []
        slots.release(PREFETCH)
        await reader
        assert order == ["reader"]
        slots.release(DEMAND)
        await prefetch

    async def test_a_cancelled_wait_loses_no_slot(self) -> None:
        """Whoever gives up, before or as the slot comes, leaves it to the next."""
        slots = ConnectionSlots(limit=1)
        await slots.acquire(DEMAND)
        for release_first in (False, True):
            waiter = asyncio.create_task(slots.acquire(DEMAND))
            await asyncio.sleep(0)
            if release_first:
                slots.release(DEMAND)
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)
        await asyncio.wait_for(slots.acquire(DEMAND), 1)

    async def test_waiting_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reader is told that the origin is busy rather than left to wait for ever."""
        monkeypatch.setattr("blobcache_storage.backend.manners.SLOT_WAIT_SECONDS_MAX", 0.01)
        slots = ConnectionSlots(limit=1)
        await slots.acquire(DEMAND)
        with pytest.raises(OriginThrottled):
            await slots.acquire(DEMAND)
        slots.release(DEMAND)
        await slots.acquire(DEMAND)


class TestByteRate:
    """So many bytes a second, readers first."""

    async def test_no_limit_never_waits(self, time: FakeTime) -> None:
        """None is no limit."""
        rate = ByteRate(None, clock=time.clock, sleep=time.sleep)
        for _ in range(100):
            await rate.take(1 << 30, lambda: PREFETCH)
        assert time.slept == []

    @pytest.mark.parametrize("source", list(RequestSource))
    async def test_the_rate_is_kept(self, time: FakeTime, source: RequestSource) -> None:
        """Over a minute the rate is what was configured, give or take one burst."""
        rate = ByteRate(1_000_000, clock=time.clock, sleep=time.sleep)
        start, taken = time.now, 0
        while time.now - start < 60:
            await rate.take(50_000, lambda: source)
            taken += 50_000
        assert 59_000_000 <= taken <= 62_000_000

    async def test_prefetch_does_not_starve_readers(self, time: FakeTime) -> None:
        """With many prefetches and one reader, the reader gets nearly all it can take."""
        rate = ByteRate(1_000_000, clock=time.clock, sleep=time.sleep)
        taken = {DEMAND: 0, PREFETCH: 0}

        async def drink(source: RequestSource) -> None:
            while time.now < 1060:
                await rate.take(20_000, lambda: source)
                taken[source] += 20_000

        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(drink(PREFETCH))
            tasks.create_task(drink(DEMAND))
        assert taken[DEMAND] > 50_000_000

    async def test_a_new_limit_reaches_those_who_wait(self, time: FakeTime) -> None:
        """A raised limit does not wait for the old one's end."""
        rate = ByteRate(10, clock=time.clock, sleep=time.sleep)
        await rate.take(1_000_000, lambda: DEMAND)

        async def lift(seconds: float) -> None:
            await time.sleep(seconds)
            rate.reconfigure(None)

        rate._sleep = lift
        await rate.take(1, lambda: DEMAND)
        assert time.slept == [0.1]

    async def test_a_promoted_prefetch_is_a_reader(self, time: FakeTime) -> None:
        """The source is asked at each look."""
        rate = ByteRate(1_000_000, clock=time.clock, sleep=time.sleep)
        await rate.take(900_000, lambda: DEMAND)
        sources = iter([PREFETCH, DEMAND])
        await rate.take(1, lambda: next(sources))
        assert len(time.slept) == 1
