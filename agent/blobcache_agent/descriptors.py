"""Who may have how many of the process's descriptors, so that they never run out.

A process without descriptors can neither accept a connection, its own probes' included, nor open
a cached blob. So readers and open blobs share what the administrator grants, and each is refused
politely at the end of its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from blobcache_storage.cache.runtime import OPEN_FILES_BUSY_MAX, OPEN_FILES_MAX

RESERVED = 256
"""For the process itself, health, the operator, and connections to origins."""
_READERS_DIVISOR = 3
"""A reader takes one for its connection and, at worst, one for a fetch of its own."""
_BUSY_FILES_DIVISOR = 8
"""A blob takes two: a quarter of all."""
_LEAST = 8


@dataclass(frozen=True, slots=True)
class Shares:
    """What each may have at a time."""

    readers: int
    """Connections served."""
    refusals: int
    """Connections being told that there is no room."""
    open_blobs: int
    """Blobs kept open while nobody reads them."""
    busy_blobs: int
    """Blobs open at all, in use or not."""

    @classmethod
    def of(cls, limit: int, *, connections_max: int, refusing_max: int) -> Shares:
        """Return the shares.

        Args:
            limit: Descriptors the process may have (RLIMIT_NOFILE).
            connections_max: Readers' connections that are wanted.
            refusing_max: Connections to be refused politely that are wanted.
        """
        readers = min(connections_max, max(_LEAST, (limit - RESERVED) // _READERS_DIVISOR))
        busy = min(OPEN_FILES_BUSY_MAX, max(_LEAST, limit // _BUSY_FILES_DIVISOR))
        return cls(
            readers=readers,
            refusals=min(refusing_max, max(1, readers // 4)),
            open_blobs=min(OPEN_FILES_MAX, busy // 2),
            busy_blobs=busy,
        )
