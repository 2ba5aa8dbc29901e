"""Counting over the last so many seconds in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class SlidingCount:
    """How often something happened within a window, to the second.

    Args:
        window_seconds: Whole seconds; one counter is kept for each.
    """

    def __init__(self, window_seconds: int, clock: Callable[[], float]) -> None:
        self._window_seconds = window_seconds
        self._clock = clock
        self._counts: deque[tuple[int, int]] = deque()
        self._total = 0

    def _expire(self) -> int:
        second = int(self._clock())
        while self._counts and self._counts[0][0] <= second - self._window_seconds:
            self._total -= self._counts.popleft()[1]
        return second

    def add(self) -> None:
        """Count one more."""
        second = self._expire()
        last = self._counts[-1] if self._counts else (None, 0)
        if last[0] == second:
            self._counts[-1] = (second, last[1] + 1)
        else:
            self._counts.append((second, 1))
        self._total += 1

    def total(self) -> int:
        """Return the count within the window."""
        self._expire()
        return self._total

    def clear(self) -> None:
        """Forget everything."""
        self._counts.clear()
        self._total = 0
