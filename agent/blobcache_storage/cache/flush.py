"""The order of writing: data, then its sync, then its record. Never another.

Per open blob version one `Writer`. Chunks are written as they come, many with one call; one sync
then serves all that were written before it began, and only after it succeeded are their slots
written to the map. A slot that a power cut loses costs a fetch; a slot without its data would cost
a wrong byte. The map itself is synced once nothing else is to do, at the latest with the next sync
of data.

A failed write or sync drops every chunk that is not recorded yet: after an error the kernel may
have thrown dirty pages away, whichever, and reads them as zeros from then on.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING

from blobcache_storage.cache.chunk_map import (
    NO_WHOLE_RECORD,
    WHOLE_RECORD_OFFSET,
    encode_slots,
    encode_whole_record,
    slot_offset,
)
from blobcache_storage.cache.runtime import StorageRuntime

if TYPE_CHECKING:
    from blobcache_storage.cache.generation import Generation

SYNC_AFTER_SECONDS = 0.5
"""A written chunk is synced at the latest so long after; with the sync itself within 1 s."""
SYNC_AFTER_BYTES = 64 * 1024 * 1024
WRITE_BATCH_BYTES = 8 * 1024 * 1024


def runs(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as runs `[first, end)`."""
    found: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


class Writer:
    """Writes, syncs and records the chunks of one generation; belongs to the event loop."""

    def __init__(
        self, generation: Generation, runtime: StorageRuntime, on_error: Callable[[OSError], None]
    ) -> None:
        self._generation = generation
        self._runtime = runtime
        self._on_error = on_error
        self._pending: dict[int, None] = {}
        self._unsynced: dict[int, None] = {}
        self._syncing: dict[int, None] = {}
        self._erase: dict[int, None] = {}
        self._whole: bytes | None = None
        self._oldest_unsynced = 0.0
        self._hurry = False
        self._map_dirty = False
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sync_task: asyncio.Task[None] | None = None
        self._error: OSError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether anything is written or waits to be."""
        return self._task is not None

    def add(self, index: int) -> None:
        """Write a chunk whose bytes are in the generation's memory."""
        self._pending[index] = None
        self._wake()

    def forget(self, index: int) -> None:
        """Erase a chunk's slot, and the record of the whole blob, before it is written anew."""
        for waiting in (self._pending, self._unsynced, self._syncing):
            waiting.pop(index, None)
        self._whole = None
        self._erase[index] = None
        self._wake()

    def record_whole(self, sha256: bytes) -> None:
        """Record that the whole blob matches its digest, after all its chunks."""
        self._whole = sha256
        self._wake()

    async def drain(self) -> None:
        """Return when everything handed in is recorded, or was dropped by a failure."""
        while self._task is not None:
            self._hurry = True
            self._kick.set()
            await asyncio.wait([self._task])

    async def finish(self) -> None:
        """Drain, and make the map durable too."""
        if self._erase:  # a failure came between
            self._wake()
        await self.drain()
        if self._map_dirty:  # a failure came between
            try:
                await self._sync_map()
            except OSError as error:
                self._on_error(error)

    def _wake(self) -> None:
        self._kick.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._error is None and self._has_work:
                self._start_sync_if_due()
                if self._erase and self._sync_task is not None:
                    # What it records must not land after what erases it.
                    await asyncio.wait([self._sync_task])
                elif self._pending or self._erase:
                    await self._write_some()
                else:
                    await self._wait()
        except OSError as error:
            self._error = error
        finally:
            # Whatever happens next must not meet a job that still uses the descriptors.
            if self._sync_task is not None:
                await asyncio.wait([self._sync_task])
            self._task = None
            self._hurry = False
        if self._error is not None:
            self._fail(self._error)

    @property
    def _has_work(self) -> bool:
        return bool(
            self._pending
            or self._erase
            or self._unsynced
            or self._sync_task is not None
            or self._whole is not None
            or self._map_dirty
        )

    async def _wait(self) -> None:
        """Wait for more work, for a sync to end, or until one is due."""
        self._kick.clear()
        timeout = None
        if self._sync_task is None and self._unsynced:
            timeout = max(0.0, self._oldest_unsynced + SYNC_AFTER_SECONDS - self._now())
        try:
            await asyncio.wait_for(self._kick.wait(), timeout)
        except TimeoutError:
            return  # a sync is due

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- data --------------------------------------------------------------------------------------

    async def _write_some(self) -> None:
        generation = self._generation
        size = generation.chunk_size_bytes
        batch = list(self._pending)[: max(1, WRITE_BATCH_BYTES // size)]
        erase = list(self._erase)
        unwritten = generation.memory.unwritten
        jobs = [
            (first * size, [unwritten[index].data for index in range(first, end)])
            for first, end in runs(batch)
        ]
        await self._runtime.flusher.run(lambda: self._write_blocking(erase, jobs))
        for index in erase:  # only now: what could not be erased is tried again before all else
            del self._erase[index]
        # What `forget` took out meanwhile is not pending any more and must stay so.
        written = [index for index in batch if self._pending.pop(index, 0) is None]
        generation.mark_written(written)
        if written and not self._unsynced:
            self._oldest_unsynced = self._now()
        self._unsynced.update(dict.fromkeys(written))

    def _write_blocking(
        self, erase: Sequence[int], jobs: list[tuple[int, list[bytes | bytearray]]]
    ) -> None:
        generation, disk = self._generation, self._runtime.disk
        generation.files.create()
        if erase:
            disk.write_all(generation.files.map_fd, [NO_WHOLE_RECORD], WHOLE_RECORD_OFFSET)
        for first, end in runs(erase):
            nothing = bytes(slot_offset(end) - slot_offset(first))
            disk.write_all(generation.files.map_fd, [nothing], slot_offset(first))
        for offset, buffers in jobs:
            disk.write_all(generation.files.data_fd, buffers, offset)

    # -- sync and record ---------------------------------------------------------------------------

    def _start_sync_if_due(self) -> None:
        if self._sync_task is not None or self._erase:
            return
        all_written = not (self._pending or self._unsynced)
        if self._whole is not None and all_written:
            self._begin(self._record_whole())
            return
        if self._map_dirty and all_written:
            self._begin(self._sync_map())
            return
        if not self._unsynced:
            return
        size = len(self._unsynced) * self._generation.chunk_size_bytes
        is_old = self._now() - self._oldest_unsynced >= SYNC_AFTER_SECONDS
        idle = self._hurry or self._whole is not None
        if is_old or size >= SYNC_AFTER_BYTES or (idle and not self._pending):
            self._begin(self._sync())

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except OSError as error:
                self._error = error
            finally:
                self._sync_task = None
                self._kick.set()

        self._sync_task = asyncio.get_running_loop().create_task(guarded())

    async def _sync(self) -> None:
        """Sync what is written now, then write its slots."""
        generation, is_map_due = self._generation, self._map_dirty
        self._syncing, self._unsynced = self._unsynced, {}
        # The slots as of now: what is discarded while the sync runs is erased after it (`_run`).
        records = [(first, generation.slots[first:end]) for first, end in runs(self._syncing)]
        async with self._runtime.sync_slots:
            await self._runtime.flusher.run(lambda: self._sync_blocking(records))
        self._map_dirty = True
        recorded, self._syncing = self._syncing, {}
        generation.mark_recorded(recorded)
        if is_map_due:
            await self._sync_map()

    def _sync_blocking(self, records: list[tuple[int, array[int]]]) -> None:
        generation, disk = self._generation, self._runtime.disk
        disk.sync_data(generation.files.data_fd)
        for first, slots in records:
            disk.write_all(generation.files.map_fd, [encode_slots(slots)], slot_offset(first))

    async def _sync_map(self) -> None:
        """Have what was written to the map survive a power cut."""
        self._map_dirty = False
        disk, map_fd = self._runtime.disk, self._generation.files.map_fd
        if map_fd < 0:
            return  # closed since a failure
        async with self._runtime.sync_slots:
            await self._runtime.flusher.run(lambda: disk.sync_data(map_fd))

    async def _record_whole(self) -> None:
        """Write the whole-blob record, after the slots it is about are durable."""
        generation, disk, sha256 = self._generation, self._runtime.disk, self._whole
        self._whole = None
        if sha256 is None or not generation.entry.complete:
            return
        record = encode_whole_record(generation.header.generation, sha256)

        def write() -> None:
            disk.sync_data(generation.files.map_fd)
            disk.write_all(generation.files.map_fd, [record], WHOLE_RECORD_OFFSET)

        await self._runtime.flusher.run(write)
        self._map_dirty = True

    def _fail(self, error: OSError) -> None:
        dropped = [*self._pending, *self._unsynced, *self._syncing]
        self._pending.clear()
        self._unsynced.clear()
        self._syncing.clear()
        self._whole = None
        self._error = None
        self._generation.drop(dropped)
        self._on_error(error)
