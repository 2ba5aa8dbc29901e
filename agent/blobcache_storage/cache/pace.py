"""How long a request to an origin should be: measured latency and speed, and what follows."""

from __future__ import annotations

SEGMENT_BYTES_MIN = 4 * 1024 * 1024
SEGMENT_BYTES_MAX = 32 * 1024 * 1024
SEGMENT_ROUND_TRIPS = 4
"""A request carries what the origin sends in so many of its latencies, so that with a few at once
the line is never idle while a head is awaited."""
_WEIGHT = 0.2


class OriginPace:
    """Moving averages of one origin's latency and speed."""

    def __init__(self) -> None:
        self.latency_seconds = 0.0
        self.bytes_per_second = 0.0

    def observe_head(self, seconds: float) -> None:
        """Note how long an answer's head took."""
        self.latency_seconds += _WEIGHT * (seconds - self.latency_seconds)

    def observe_body(self, length: int, seconds: float) -> None:
        """Note how long a body took; short ones say nothing about speed."""
        if length >= SEGMENT_BYTES_MIN // 4 and seconds > 0:
            speed = length / seconds
            self.bytes_per_second += _WEIGHT * (speed - self.bytes_per_second)

    @property
    def segment_bytes(self) -> int:
        """Bytes that one request of a sequential reader should cover."""
        wanted = SEGMENT_ROUND_TRIPS * self.latency_seconds * self.bytes_per_second
        return int(min(max(wanted, SEGMENT_BYTES_MIN), SEGMENT_BYTES_MAX))
