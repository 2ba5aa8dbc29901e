"""Every bound of the data server, in one place."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES_MAX = 16 * 1024
"""Request line and headers together, with their line ends."""
HEADERS_MAX = 64
"""Header lines of a request."""
BLOB_ID_BYTES_MAX = 1024
"""UTF-8 bytes of a blob id after decoding."""
INPUT_BYTES_PER_RECEIVE = 16 * 1024
"""One read from a socket; with HEAD_BYTES_MAX it bounds what a connection holds unread."""
LINGER_BYTES_MAX = 256 * 1024
"""Discarded from a reader who goes on sending after the server has said its last word."""
SWEEPS_PER_TIMEOUT = 4
"""A time-out is noticed after at most a quarter more than its length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a deployment or a test may set differently.

    What all connections hold in this process is bounded by `connections_max` times the sum of
    HEAD_BYTES_MAX, INPUT_BYTES_PER_RECEIVE and `write_buffer_bytes`.
    """

    connections_max: int = 4096
    """Connections served at a time; one more gets 503 and is closed."""
    connections_refusing_max: int = 256
    """Surplus connections being told so at a time; more are told and closed in one go."""
    head_timeout_seconds: float = 10.0
    """From a connection's opening or a request's first byte to the end of the request's head."""
    idle_timeout_seconds: float = 75.0
    """Keep-alive without a request."""
    progress_timeout_seconds: float = 60.0
    """Without one byte acknowledged by the reader while there are bytes to send."""
    half_close_grace_seconds: float = 2.0
    """For the head of an answer to a reader who shut its side: most likely it is gone."""
    linger_seconds: float = 2.0
    """From the server's last word on a connection to its end."""
    write_buffer_bytes: int = 16 * 1024
    """What one connection holds of a body that its reader does not take yet."""
    file_threads: int = 8
    """Threads for file bytes that are not in the page cache."""

    def __post_init__(self) -> None:
        """Refuse limits that would stop all service."""
        assert self.connections_max >= 1
        assert self.file_threads >= 1
        assert self.write_buffer_bytes >= 1
        assert self.sweep_seconds > 0

    @property
    def sweep_seconds(self) -> float:
        """How often connections are looked at: once a second, more often for short time-outs."""
        shortest = min(
            self.head_timeout_seconds,
            self.idle_timeout_seconds,
            self.progress_timeout_seconds,
            self.half_close_grace_seconds,
            self.linger_seconds,
        )
        return min(1.0, shortest / SWEEPS_PER_TIMEOUT)
