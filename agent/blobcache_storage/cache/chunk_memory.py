"""Bytes of chunks that are not synced yet: in memory at most once, however many read them.

A chunk's bytes are pinned until they are written to the file. From then on, until the chunk is
recorded (within a second), the file's pages may turn to zeros without an error, so readers are
still given memory: the buffer is kept while the pool has room, and read again, checked, for all who
wait when it has not. All of it is the pool's, and readers hold none of it for long (`Lease`).

Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from blobcache_storage.cache.pools import BufferPool
from blobcache_storage.errors import StorageError

HOLD_SECONDS = 2.0
"""A reader that takes nothing for so long keeps no chunk from the others."""


class ChunkBuffer:
    """A chunk's bytes in pool memory, with counted holders.

    The last one to let go frees it or, while it is kept, leaves it to the pool.
    """

    __slots__ = ("_holders", "_on_reclaimed", "_pool", "data")

    def __init__(self, pool: BufferPool, data: bytes | bytearray) -> None:
        """Take over bytes of a length that was acquired from the pool, with one holder."""
        self._pool = pool
        self._holders = 1
        self._on_reclaimed: Callable[[], None] | None = None
        self.data = data

    def retain(self) -> None:
        """Add a holder."""
        assert self._holders > 0 or self._on_reclaimed is not None, "a freed buffer was used"
        if not self._holders:
            self._pool.withdraw(self)
        self._holders += 1

    def release(self) -> None:
        """Drop a holder."""
        self._holders -= 1
        assert self._holders >= 0, "a buffer was released twice"
        if not self._holders:
            if self._on_reclaimed is not None:
                self._pool.offer(self, len(self.data))
            else:
                self._pool.release(len(self.data))

    def keep(self, on_reclaimed: Callable[[], None]) -> None:
        """Have it outlive its holders until `unkeep`, or until the pool needs its memory.

        Args:
            on_reclaimed: Called when the pool took it.
        """
        assert self._holders > 0, "a freed buffer was used"
        self._on_reclaimed = on_reclaimed

    def unkeep(self) -> None:
        """Let it go with its last holder."""
        self._on_reclaimed = None
        if not self._holders:
            self._pool.withdraw(self)
            self._pool.release(len(self.data))

    def reclaim(self) -> None:
        """Note that the pool took the memory."""
        on_reclaimed, self._on_reclaimed = self._on_reclaimed, None
        assert on_reclaimed is not None, "a buffer was reclaimed that was not offered"
        on_reclaimed()


class Lease:
    """A reader's hold on a buffer, from which it is given copies.

    Copies, for what is handed out cannot be taken back: so a reader that stalls holds one slice of
    its own, and the chunk goes back to the pool after HOLD_SECONDS.
    """

    def __init__(self, buffer: ChunkBuffer) -> None:
        """Take over a holder's part in a buffer; `end` gives it back."""
        self._buffer: ChunkBuffer | None = buffer
        self._timer: asyncio.TimerHandle | None = None

    def copy(self, start: int, end: int, *, is_last: bool) -> bytes | None:
        """Return bytes `[start, end)` of the chunk; None if the reader took too long.

        Args:
            is_last: Whether no more are wanted: the lease ends before the reader has them.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._buffer is None:
            return None
        piece = bytes(memoryview(self._buffer.data)[start:end])
        if is_last:
            self.end()
        else:
            self._timer = asyncio.get_running_loop().call_later(HOLD_SECONDS, self.end)
        return piece

    def end(self) -> None:
        """Give the buffer back; idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.release()


class _Load:
    """One reading of a chunk for all who wait for it."""

    def __init__(self) -> None:
        self.waiters: set[asyncio.Future[ChunkBuffer | None]] = set()
        self.task: asyncio.Task[None] | None = None


class ChunkMemory:
    """See the module; one per generation.

    Args:
        read: Returns a chunk's checked bytes in a buffer of the pool, or None if they are gone.
    """

    def __init__(self, read: Callable[[int], Awaitable[ChunkBuffer | None]]) -> None:
        self._read = read
        self.unwritten: dict[int, ChunkBuffer] = {}
        """The only copies there are."""
        self._kept: dict[int, ChunkBuffer] = {}
        self._loads: dict[int, _Load] = {}

    def add(self, index: int, buffer: ChunkBuffer) -> None:
        """Pin a chunk that arrived, until it is written."""
        self.unwritten[index] = buffer

    def note_written(self, index: int) -> bool:
        """Unpin a chunk, which is in the file now; whether it was pinned."""
        buffer = self.unwritten.pop(index, None)
        if buffer is None:
            return False
        self._keep(index, buffer)
        buffer.release()
        return True

    def forget(self, index: int) -> bool:
        """Let go of a chunk that is recorded, or no chunk any more; whether it was pinned.

        Readers who hold its buffer may go on: its bytes are right.
        """
        self._loads.pop(index, None)  # it serves those who wait for it, and is not kept
        kept = self._kept.pop(index, None)
        if kept is not None:
            kept.unkeep()
        pinned = self.unwritten.pop(index, None)
        if pinned is not None:
            pinned.release()
        return pinned is not None

    def get(self, index: int) -> ChunkBuffer | None:
        """Return a chunk's buffer if it is in memory now; retain it before anything else."""
        return self.unwritten.get(index) or self._kept.get(index)

    async def borrow(self, index: int) -> ChunkBuffer | None:
        """Return a chunk's buffer, for the caller to release; None if its bytes are gone.

        Raises:
            CacheBusy: There is no memory to read it into.
        """
        buffer = self.get(index)
        if buffer is not None:
            buffer.retain()
            return buffer
        loop = asyncio.get_running_loop()
        load = self._loads.get(index)
        if load is None:
            load = self._loads[index] = _Load()
            load.task = loop.create_task(self._load(index, load))
        waiter: asyncio.Future[ChunkBuffer | None] = loop.create_future()
        load.waiters.add(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                granted = waiter.result()
                if granted is not None:
                    granted.release()
            raise
        finally:
            load.waiters.discard(waiter)
            if not load.waiters and load.task is not None:
                if self._loads.get(index) is load:
                    del self._loads[index]
                load.task.cancel()

    async def _load(self, index: int, load: _Load) -> None:
        buffer, error = None, None
        try:
            buffer = await self._read(index)
        except StorageError as raised:
            error = raised
        is_current = self._loads.get(index) is load
        if is_current:
            del self._loads[index]
        if buffer is not None and is_current:
            self._keep(index, buffer)
        for waiter in load.waiters:
            if waiter.done():
                continue  # cancelled
            if error is not None:
                waiter.set_exception(error)
            else:
                if buffer is not None:
                    buffer.retain()
                waiter.set_result(buffer)
        load.task = None
        if buffer is not None:
            buffer.release()

    def _keep(self, index: int, buffer: ChunkBuffer) -> None:
        self._kept[index] = buffer
        buffer.keep(lambda: self._reclaimed(index))

    def _reclaimed(self, index: int) -> None:
        del self._kept[index]
