"""What many wait for: one piece of work, or the next change of something."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SharedWork(Generic[T]):
    """Runs a coroutine once for all who wait; it is cancelled only when the last gives up."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._waiting = 0
        self._is_abandoned = False

    @property
    def is_abandoned(self) -> bool:
        """Whether it was cancelled: who comes now must not wait for it, but begin anew."""
        return self._is_abandoned

    async def settle(self) -> None:
        """Return when it has ended, however it did."""
        await asyncio.wait([self._task])

    async def wait(self) -> T:
        """Return its result, or raise its error."""
        self._waiting += 1
        try:
            # Not awaited directly: a waiter that is cancelled must not cancel it for the others.
            await asyncio.wait([self._task])
            return self._task.result()
        finally:
            self._waiting -= 1
            if not self._waiting and not self._task.done():
                self._is_abandoned = True
                self._task.cancel()


class Changes:
    """Counts changes, so that none is lost between looking and waiting for the next.

    Who waits takes `count`, then looks, then waits for what came since that count. A flag that is
    cleared before waiting would not do: who clears it may clear another's news.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def note(self) -> None:
        """Count a change and wake all who wait."""
        self.count += 1
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def since(self, count: int) -> asyncio.Future[None]:
        """Return what is done once there was a change after so many."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.count != count:
            waiter.set_result(None)
        else:
            self._waiters.add(waiter)
            waiter.add_done_callback(self._waiters.discard)
        return waiter
