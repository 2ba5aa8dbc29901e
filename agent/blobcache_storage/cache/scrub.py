"""The scrub: a slow second look at what was recorded, for disks that forget.

Once a day every recorded chunk is read and compared with its checksum, at a bounded rate, and what
a blob is counted with is set to what its files really take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.cache.table import BlobTable
from blobcache_storage.errors import CacheBusy

SCRUB_INTERVAL_SECONDS = 24 * 3600.0
SCRUB_BYTES_PER_SECOND = 8 * 1024 * 1024
SCRUB_STEP_BYTES = 1024 * 1024


class Scrubber:
    """Scrubs one manager's blobs; belongs to the event loop.

    Args:
        on_corrupt: Told of each generation in which a chunk was discarded.
        bytes_per_second: Bound of its reading; None = as fast as the disk.
    """

    def __init__(
        self,
        table: BlobTable,
        runtime: StorageRuntime,
        on_corrupt: Callable[[Generation], None],
        *,
        bytes_per_second: int | None = SCRUB_BYTES_PER_SECOND,
    ) -> None:
        self._table = table
        self._runtime = runtime
        self._on_corrupt = on_corrupt
        self._bytes_per_second = bytes_per_second
        self._due = runtime.clock.monotonic() + SCRUB_INTERVAL_SECONDS
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Begin a pass if one is due."""
        if self._runtime.clock.monotonic() < self._due:
            return
        if self._task is None or self._task.done():
            self._due = self._runtime.clock.monotonic() + SCRUB_INTERVAL_SECONDS
            self._task = asyncio.get_running_loop().create_task(self.scrub())

    async def stop(self) -> None:
        """End the pass under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def scrub(self) -> None:
        """Make one pass over all blobs."""
        for blob_id in list(self._table.folder.entries):
            try:
                generation = await self._table.get(blob_id)
            except CacheBusy:
                continue
            if generation is None:
                continue
            generation.readers += 1
            try:
                await self._scrub(generation)
            finally:
                generation.readers -= 1
                self._table.release(generation)
            # A pass must not push what readers use out of the open files.
            if generation.is_idle and not generation.retired:
                self._table.close_idle(blob_id)

    async def _scrub(self, generation: Generation) -> None:
        step = max(1, SCRUB_STEP_BYTES // generation.chunk_size_bytes)
        for first in range(0, generation.chunk_count, step):
            end = min(first + step, generation.chunk_count)
            if await generation.recheck(first, end):
                self._on_corrupt(generation)
            if self._bytes_per_second is not None:
                length = (end - first) * generation.chunk_size_bytes
                await asyncio.sleep(length / self._bytes_per_second)
        await generation.reconcile()
