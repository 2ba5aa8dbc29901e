"""A circuit breaker: an origin that mostly fails is left alone for a moment, then probed."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from blobcache_storage.backend.windows import SlidingCount
from blobcache_storage.errors import CircuitOpen

WINDOW_SECONDS: Final = 10
REQUESTS_MIN: Final = 20
"""Fewer requests in the window say nothing."""
FAILING_FRACTION: Final = 0.5
OPEN_SECONDS_FIRST: Final = 1.0
OPEN_SECONDS_MAX: Final = 5.0
"""Doubles from the first to this with each probe that fails."""


class _State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Permit:
    """Leave to send one request; exactly one outcome is reported, later ones are ignored."""

    def __init__(self, breaker: Breaker, *, is_probe: bool) -> None:
        self._breaker = breaker
        self._is_probe = is_probe
        self._is_spent = False

    def _spend(self) -> bool:
        first, self._is_spent = not self._is_spent, True
        return first

    def succeeded(self) -> None:
        """The origin is well: it answered, be it with 404."""
        if self._spend():
            self._breaker.note_success(is_probe=self._is_probe)

    def failed(self) -> None:
        """The origin is unwell."""
        if self._spend():
            self._breaker.note_failure(is_probe=self._is_probe)

    def abandoned(self) -> None:
        """Nobody waited for the answer; it says nothing."""
        if self._spend():
            self._breaker.note_abandoned(is_probe=self._is_probe)


class Breaker:
    """The state of one (origin, credential)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests = SlidingCount(WINDOW_SECONDS, clock)
        self._failures = SlidingCount(WINDOW_SECONDS, clock)
        self._state = _State.CLOSED
        self._open_until = 0.0
        self._open_seconds = OPEN_SECONDS_FIRST

    @property
    def is_open(self) -> bool:
        """Whether a request would be refused now."""
        if self._state is _State.OPEN:
            return self._clock() < self._open_until
        return self._state is _State.PROBING

    def admit(self) -> Permit:
        """Return leave to send one request.

        Raises:
            CircuitOpen: The origin is being left alone, or the one probe is under way.
        """
        if self.is_open:
            wait = max(0.0, self._open_until - self._clock())
            raise CircuitOpen(
                "the origin failed most of its latest requests and is left alone for a moment",
                retry_after_seconds=max(wait, OPEN_SECONDS_FIRST),
            )
        is_probe = self._state is _State.OPEN
        if is_probe:
            self._state = _State.PROBING
        return Permit(self, is_probe=is_probe)

    def note_success(self, *, is_probe: bool) -> None:
        """Count an answer; that of the probe closes the breaker."""
        if is_probe:
            self._state = _State.CLOSED
            self._open_seconds = OPEN_SECONDS_FIRST
            self._requests.clear()
            self._failures.clear()
        self._requests.add()

    def note_failure(self, *, is_probe: bool) -> None:
        """Count a failure; it may open the breaker, and that of the probe does."""
        self._requests.add()
        self._failures.add()
        if is_probe:
            self._open_seconds = min(self._open_seconds * 2, OPEN_SECONDS_MAX)
            self._open()
        elif self._state is _State.CLOSED and self._mostly_fails():
            self._open()

    def note_abandoned(self, *, is_probe: bool) -> None:
        """Let another request be the probe."""
        if is_probe:
            self._state = _State.OPEN

    def _mostly_fails(self) -> bool:
        requests = self._requests.total()
        return requests >= REQUESTS_MIN and self._failures.total() >= requests * FAILING_FRACTION

    def _open(self) -> None:
        self._state = _State.OPEN
        self._open_until = self._clock() + self._open_seconds
