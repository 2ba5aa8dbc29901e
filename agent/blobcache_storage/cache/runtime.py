"""What all cache managers of one process share: threads, memory, open files, the clock."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Protocol

from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.pools import BufferPool, WorkerPool

FLUSHER_THREADS_MAX = 8
FLUSHER_IDLE_SECONDS = 10.0
SYNCS_AT_ONCE_MAX = 2
READER_THREADS_MAX = 8
HASHING_THREADS_MAX = 2
BUFFER_BYTES = 64 * 1024 * 1024
BUFFER_CHUNKS_MIN = 8
BUFFER_WAITERS_MAX = 1024
OPEN_FILES_MAX = 256
OPEN_FILES_BUSY_MAX = 1024
"""Above so many open blobs (two descriptors each) nothing new is stored: a disk that syncs more
slowly than small blobs arrive must not use up the process's descriptors."""
OPEN_MAP_BYTES_MAX = 32 * 1024 * 1024


class Clock(Protocol):
    """Time, so that tests can set it."""

    def time(self) -> float:
        """Return unix seconds: for what is stored and shown."""

    def monotonic(self) -> float:
        """Return seconds that never go back: for every duration."""


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        """Return unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()


class Openable(Protocol):
    """An open blob version that can be closed and opened again."""

    @property
    def map_bytes(self) -> int:
        """Memory its map takes while it is open."""

    def close_if_idle(self) -> bool:
        """Close it unless it is in use; whether it is closed now."""


class OpenFiles:
    """Bounds on open files and loaded maps; the least recently used idle ones are closed.

    What is in use is never closed, so the bounds may be passed by what is being read.
    """

    def __init__(
        self, files_max: int, map_bytes_max: int, busy_max: int = OPEN_FILES_BUSY_MAX
    ) -> None:
        self._files_max = files_max
        self._busy_max = busy_max
        self._map_bytes_max = map_bytes_max
        self._map_bytes = 0
        self._open: OrderedDict[Openable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_exhausted(self) -> bool:
        """Whether so many are busy that no other blob should be opened."""
        if len(self._open) >= self._busy_max:
            self._shrink(keep=None)  # those that were busy may be idle by now
        return len(self._open) >= self._busy_max

    def touch(self, opened: Openable) -> None:
        """Note a use; closes others that are idle where a bound is passed."""
        if opened in self._open:
            self._open.move_to_end(opened)
            return
        self._open[opened] = opened.map_bytes
        self._map_bytes += opened.map_bytes
        if self._is_over:
            self._shrink(keep=opened)

    @property
    def _is_over(self) -> bool:
        return len(self._open) > self._files_max or self._map_bytes > self._map_bytes_max

    def _shrink(self, keep: Openable | None) -> None:
        for candidate in list(self._open):
            if not self._is_over:
                return
            # Closing calls `forget`.
            if candidate is not keep:
                candidate.close_if_idle()

    def forget(self, closed: Openable) -> None:
        """Note that it was closed."""
        self._map_bytes -= self._open.pop(closed, 0)


class StorageRuntime:
    """One per process and event loop; shared by every manager.

    Args:
        disk: The I/O layer; tests put faulty ones here.
        clock: Time.
        chunk_size_bytes_max: Largest chunk size in use; the pool holds at least 8 such chunks.
        buffer_bytes: Memory for chunks on their way.
        open_files_max: Blob versions kept open when idle.
        open_files_busy_max: Blob versions open at all; others are relayed meanwhile.
    """

    def __init__(
        self,
        *,
        disk: Disk | None = None,
        clock: Clock | None = None,
        chunk_size_bytes_max: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
        open_files_max: int = OPEN_FILES_MAX,
        open_files_busy_max: int = OPEN_FILES_BUSY_MAX,
    ) -> None:
        self.disk = disk or Disk()
        self.clock: Clock = clock or SystemClock()
        self.flusher = WorkerPool(
            "cache-flusher", FLUSHER_THREADS_MAX, idle_seconds=FLUSHER_IDLE_SECONDS
        )
        self.reader = WorkerPool("cache-reader", READER_THREADS_MAX)
        self.hashing = WorkerPool("cache-hashing", HASHING_THREADS_MAX)
        self.buffers = BufferPool(
            max(buffer_bytes, BUFFER_CHUNKS_MIN * chunk_size_bytes_max), BUFFER_WAITERS_MAX
        )
        self.sync_slots = asyncio.Semaphore(SYNCS_AT_ONCE_MAX)
        self.open_files = OpenFiles(open_files_max, OPEN_MAP_BYTES_MAX, open_files_busy_max)

    def ensure_buffers(self, chunk_size_bytes: int) -> None:
        """Let the pool hold at least 8 chunks of this size."""
        self.buffers.bytes_max = max(self.buffers.bytes_max, BUFFER_CHUNKS_MIN * chunk_size_bytes)

    async def close(self) -> None:
        """End the threads after what is queued; idempotent."""
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self.flusher.close()
        self.reader.close()
        self.hashing.close()
