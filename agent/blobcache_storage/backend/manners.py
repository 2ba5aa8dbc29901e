"""What keeps an origin at peace: retries, the breaker, the connection cap, the byte rate.

One `Manners` serves one backend, which has one origin and one credential. Everything takes its
clock, sleep and randomness from outside, so that tests decide what time it is.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from blobcache_storage.backend.breaker import Breaker
from blobcache_storage.backend.windows import SlidingCount
from blobcache_storage.device import RequestSource
from blobcache_storage.errors import (
    BackendError,
    BlobNotFound,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
    StorageError,
)

T = TypeVar("T")
Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]

RETRY_WINDOW_SECONDS: Final = 60
RETRY_FRACTION_MAX: Final = 0.1
RETRIES_PER_WINDOW_MIN: Final = 10
"""An origin that is asked seldom may still be asked again so often a minute."""
PREFETCH_RETRIES_MAX: Final = 1
BACKOFF_SECONDS_FIRST: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0
RETRY_AFTER_WAIT_SECONDS_MAX: Final = 5.0
"""A longer Retry-After is the reader's to wait for: the error goes up at once."""
NOT_FOUND_SECONDS: Final = 5.0
NOT_FOUND_BLOBS_MAX: Final = 1024
CONNECTIONS_MAX: Final = 64
PREFETCH_CONNECTIONS_MAX: Final = 32
"""Prefetch leaves half of the connections to readers."""
SLOT_WAIT_SECONDS_MAX: Final = 30.0
BURST_SECONDS: Final = 1.0
BURST_BYTES_MIN: Final = 64 * 1024
RATE_LOOK_SECONDS: Final = 0.1
PREFETCH_RESERVE_FRACTION: Final = 0.5
"""Prefetch leaves this part of a burst to readers, so their first bytes need no wait."""

FAILURES: Final = (OriginUnreachable, OriginTimeout, OriginServerError, OriginThrottled)
"""What the breaker counts: the origin itself is unwell. A 403 or 404 is a healthy answer."""


class SlotsBusy(OriginThrottled):
    """All connections are taken by ourselves: no fault of the origin, and no use repeating."""

    retryable = False


class ConnectionSlots:
    """At most so many requests at once, readers before prefetch.

    Args:
        limit: Requests under way, their bodies included.
        prefetch_limit: Of these at most so many may be prefetch.
    """

    def __init__(
        self, limit: int = CONNECTIONS_MAX, prefetch_limit: int = PREFETCH_CONNECTIONS_MAX
    ) -> None:
        self._limit = limit
        self._prefetch_limit = prefetch_limit
        self._taken = dict.fromkeys(RequestSource, 0)
        self._waiting: dict[RequestSource, deque[asyncio.Future[None]]] = {
            source: deque() for source in RequestSource
        }

    def _may_take(self, source: RequestSource) -> bool:
        if sum(self._taken.values()) >= self._limit:
            return False
        return (
            source is RequestSource.ON_DEMAND
            or self._taken[RequestSource.PREFETCH] < self._prefetch_limit
        )

    async def acquire(self, source: RequestSource) -> None:
        """Take a slot, which `release` must give back.

        Raises:
            SlotsBusy: None came free within `SLOT_WAIT_SECONDS_MAX`.
        """
        if self._may_take(source) and not self._waiting[source]:
            self._taken[source] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[source].append(turn)
        try:
            async with asyncio.timeout(SLOT_WAIT_SECONDS_MAX):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(source)
            elif turn in self._waiting[source]:
                self._waiting[source].remove(turn)
            if isinstance(error, TimeoutError):
                raise SlotsBusy(
                    f"all {self._limit} connections to the origin were busy",
                    retry_after_seconds=1.0,
                ) from None
            raise

    def release(self, source: RequestSource) -> None:
        """Give a slot back and hand it on."""
        self._taken[source] -= 1
        for waiting_source in (RequestSource.ON_DEMAND, RequestSource.PREFETCH):
            queue = self._waiting[waiting_source]
            while queue and self._may_take(waiting_source):
                turn = queue.popleft()
                if not turn.done():
                    self._taken[waiting_source] += 1
                    turn.set_result(None)


class ByteRate:
    """A token bucket of bytes a second; readers drink first.

    Bytes are charged after they arrived, so the bucket may go into debt by one piece; whoever
    comes next waits until it is paid.
    """

    def __init__(
        self,
        bytes_per_second: int | None,
        *,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._rate = bytes_per_second
        self._tokens = self._burst
        self._filled_at = clock()

    @property
    def _burst(self) -> float:
        return max(BURST_BYTES_MIN, (self._rate or 0) * BURST_SECONDS)

    def reconfigure(self, bytes_per_second: int | None) -> None:
        """Set the rate; None is unlimited. Those who wait notice at their next look."""
        self._refill()
        self._rate = bytes_per_second
        self._tokens = min(self._tokens, self._burst)

    def _refill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now

    def _shortage(self, source: Callable[[], RequestSource]) -> float:
        """Return the seconds until there is something to drink; 0 if there is."""
        assert self._rate is not None
        wanted = 0.0
        if source() is RequestSource.PREFETCH:
            # A reader waits only when the bucket is empty, so the reserve alone puts it first.
            wanted = self._burst * PREFETCH_RESERVE_FRACTION
        return 0.0 if self._tokens > wanted else (wanted - self._tokens) / self._rate + 1e-3

    async def take(self, count: int, source: Callable[[], RequestSource]) -> None:
        """Charge `count` bytes, waiting first while there is debt.

        Prefetch waits, too, while there is no more than the reserve it leaves to readers.

        Args:
            source: Asked at each look, for a reader may have joined a prefetch meanwhile.
        """
        while self._rate is not None:
            self._refill()
            wait = self._shortage(source)
            if wait <= 0:
                self._tokens -= count
                return
            # Short looks: a reader who joins, or a new limit, must not wait out an old one.
            await self._sleep(min(wait, RATE_LOOK_SECONDS))


class NotFoundMemory:
    """Blobs an origin said it has not, for at most `NOT_FOUND_SECONDS`."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def check(self, blob_id: str) -> None:
        """Check that a blob may be there.

        Raises:
            BlobNotFound: The origin lately said it is not.
        """
        until = self._until.get(blob_id)
        if until is None:
            return
        if until <= self._clock():
            del self._until[blob_id]
            return
        raise BlobNotFound(f"the origin has no blob '{blob_id}'", status=404)

    def remember(self, blob_id: str) -> None:
        """Note that the origin said 404."""
        self._until[blob_id] = self._clock() + NOT_FOUND_SECONDS
        self._until.move_to_end(blob_id)
        while len(self._until) > NOT_FOUND_BLOBS_MAX:
            self._until.popitem(last=False)

    def forget_all(self) -> None:
        """Forget everything: another credential may see other blobs."""
        self._until.clear()


@dataclass(slots=True)
class RetryBudget:
    """Retries within a minute: a tenth of the requests, or ten."""

    requests: SlidingCount
    retries: SlidingCount

    def take(self) -> bool:
        """Whether one more retry is within the budget; if so it is spent."""
        allowed = max(RETRIES_PER_WINDOW_MIN, self.requests.total() * RETRY_FRACTION_MAX)
        if self.retries.total() >= allowed:
            return False
        self.retries.add()
        return True


class Manners:
    """How one origin is asked.

    Args:
        retry_limit: Further tries of one request, at most.
        bytes_per_second_limit: Of bodies; None is unlimited.
    """

    def __init__(
        self,
        *,
        retry_limit: int,
        bytes_per_second_limit: int | None = None,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.retry_limit = retry_limit
        self.slots = ConnectionSlots()
        self.rate = ByteRate(bytes_per_second_limit, clock=clock, sleep=sleep)
        self.not_found = NotFoundMemory(clock)
        self.breaker = Breaker(clock)
        self.budget = RetryBudget(
            SlidingCount(RETRY_WINDOW_SECONDS, clock), SlidingCount(RETRY_WINDOW_SECONDS, clock)
        )
        self._sleep = sleep
        # Jitter keeps nodes apart; it is no secret.
        self._rng = rng or random.Random()  # noqa: S311

    def reconfigure(self, *, retry_limit: int, bytes_per_second_limit: int | None) -> None:
        """Take new limits; budget and breaker keep what they know of the origin."""
        self.retry_limit = retry_limit
        self.rate.reconfigure(bytes_per_second_limit)
        self.not_found.forget_all()

    async def run(
        self, blob_id: str, source: RequestSource, attempt: Callable[[], Awaitable[T]]
    ) -> T:
        """Run a request until it is answered, is no use repeating, or the budget is spent.

        Raises:
            CircuitOpen: The breaker is open; nothing was sent.
            StorageError: What the last attempt raised.
        """
        self.not_found.check(blob_id)
        self.budget.requests.add()
        limit = self.retry_limit
        if source is RequestSource.PREFETCH:
            limit = min(limit, PREFETCH_RETRIES_MAX)
        tries = 0
        while True:
            try:
                return await self._run_once(blob_id, attempt)
            except BackendError as error:
                wait = self._pause_before_retry(error, tries)
                if wait is None or tries >= limit or not self.budget.take():
                    raise
            tries += 1
            await self._sleep(wait)

    async def _run_once(self, blob_id: str, attempt: Callable[[], Awaitable[T]]) -> T:
        permit = self.breaker.admit()
        try:
            result = await attempt()
        except SlotsBusy:
            permit.abandoned()
            raise
        except FAILURES:
            permit.failed()
            raise
        except BlobNotFound:
            self.not_found.remember(blob_id)
            permit.succeeded()
            raise
        except StorageError:
            permit.succeeded()
            raise
        except BaseException:
            permit.abandoned()
            raise
        permit.succeeded()
        return result

    def _pause_before_retry(self, error: BackendError, tries: int) -> float | None:
        """Return how long to wait before the next try, or None if there shall be none."""
        if not error.retryable:
            return None
        cap = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_FIRST * 2**tries)
        wait = self._rng.uniform(0, cap)
        asked = error.retry_after_seconds
        if asked is None:
            return wait
        return None if asked > RETRY_AFTER_WAIT_SECONDS_MAX else asked + wait
