"""The number by which the operator learns that a report is worth reading.

It moves when something an object's status shows has changed in a way that matters: a state, what
is applied, cached bytes by 5 %, a step of warm-up. Never on traffic, so that a busy node and an
idle one cost the operator the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

BYTES_CHANGE_DIVISOR = 20
"""One part in so many: 5 %."""
WARM_STEP_PERCENT = 10
WATCH_SECONDS = 1.0
"""How often changes are looked for."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What of one configuration may move the number."""

    facts: Hashable
    """State, reason, digest: each difference counts."""
    bytes: int
    warm_percent: int


class Changes:
    """Counts changes that matter and wakes who waits for them.

    Args:
        observe: Returns the configurations' observations by uid, and what else counts.
    """

    def __init__(self, observe: Callable[[], tuple[Hashable, Mapping[str, Observation]]]) -> None:
        self._observe = observe
        # A number from an earlier process must not equal one of ours by chance.
        self.number = time.time_ns() // 1_000_000
        self._baseline: tuple[Hashable, dict[str, Observation]] = (None, {})
        self._moved = asyncio.Event()
        self._is_closed = False

    def look(self) -> None:
        """Compare with what was last counted, and move the number if it matters."""
        extra, now = self._observe()
        known_extra, known = self._baseline
        if extra == known_extra and not self._has_changed(known, now):
            return
        self._baseline = (extra, dict(now))
        self.number += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait(self, after: int | None, seconds: float) -> None:
        """Return at once unless `after` is the present number, else when it moved, or in time."""
        self.look()
        if after != self.number or self._is_closed:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    def close(self) -> None:
        """Let all who wait go, and nobody wait any more."""
        self._is_closed = True
        self._moved.set()

    @staticmethod
    def _has_changed(known: Mapping[str, Observation], now: Mapping[str, Observation]) -> bool:
        if known.keys() != now.keys():
            return True
        return any(_differs(known[uid], now[uid]) for uid in now)


def _differs(old: Observation, new: Observation) -> bool:
    """Whether a difference matters; small drifts add up, for the old one stays the baseline."""
    if old.facts != new.facts:
        return True
    if _warm_step(old.warm_percent) != _warm_step(new.warm_percent):
        return True
    return old.bytes != new.bytes and (
        abs(new.bytes - old.bytes) * BYTES_CHANGE_DIVISOR >= old.bytes
    )


def _warm_step(percent: int) -> int:
    return percent // WARM_STEP_PERCENT
