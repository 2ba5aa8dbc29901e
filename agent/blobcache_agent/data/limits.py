"""Every bound of the data server, in one place."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES_MAX = 16 * 1024
"""Request line and headers together, with their line ends."""
HEADERS_MAX = 64
"""Header lines of a request."""
BLOB_ID_BYTES_MAX = 1024
"""UTF-8 bytes of a blob id after decoding."""
CONFIG_NAME_BYTES_MAX = 63
"""Bytes of a namespace and of a configuration's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a deployment or a test may set differently."""

    connections_max: int = 4096
    """Connections served at a time; one more gets 503 and is closed."""
    connections_refusing_max: int = 256
    """Surplus connections being told so at a time; beyond that they are just closed."""
    head_timeout_seconds: float = 10.0
    """From a request's first byte (or from the connection) to the end of its head."""
    idle_timeout_seconds: float = 75.0
    """Keep-alive without a request."""
    progress_timeout_seconds: float = 60.0
    """Without one byte taken by the reader while there are bytes to send."""
    write_buffer_bytes: int = 128 * 1024
    """High water of one connection's write buffer, in which it may stay; the low is a quarter."""
    write_buffer_total_bytes: int = 64 * 1024 * 1024
    """Of all connections together; above, the read buffers' pieces wait for room."""
    file_threads: int = 8
    """Threads for file bytes that are not in the page cache."""

    def __post_init__(self) -> None:
        """Refuse limits that would stop all service."""
        assert self.connections_max >= 1
        assert self.file_threads >= 1
        assert self.write_buffer_total_bytes >= self.write_buffer_bytes >= 4096
