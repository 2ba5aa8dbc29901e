"""One piece of work that many wait for."""

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
