"""One version of one blob: its two files, and where each chunk stands.

A chunk goes `ABSENT -> FETCHING -> BUFFERED -> VERIFIED`, and one found on disk at start
`DURABLE -> VERIFIED`. Invariants, on which "never a wrong byte" rests:

* Only a VERIFIED chunk is served straight from the file: its data was synced by this process
  without an error, or its checksum was found right since the file was opened.
* A BUFFERED chunk lies in memory or in dirty pages, which can turn to zeros without an error: it
  is served only from bytes whose checksum was computed for that serve.
* A slot is written to the map only after the sync of its data succeeded (`flush`).
* The CRC of a chunk is that of bytes which came from the origin under this version; what does not
  have it is discarded and fetched again.

State belongs to the event loop; the functions named `*_blocking` run in threads and touch only
descriptors and what they are given.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from crc32c import crc32c

from blobcache_storage.cache.budget import on_disk
from blobcache_storage.cache.chunk_map import (
    MapHeader,
    seal_slot,
    slot_crc,
)
from blobcache_storage.cache.chunk_memory import ChunkBuffer, ChunkMemory
from blobcache_storage.cache.files import BlobFiles, FoundRecords
from blobcache_storage.cache.flush import Writer, runs
from blobcache_storage.cache.index import CatalogEntry
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.cache.shared import Changes
from blobcache_storage.device import ByteRange

if TYPE_CHECKING:
    from blobcache_storage.cache.folder import Folder

RESIDENT_READ_BYTES_MAX = 256 * 1024
"""Up to so many bytes are read in the loop if they are in the page cache: some 20 us."""


class ChunkState(enum.IntEnum):
    """Where a chunk stands; see the module."""

    ABSENT = 0
    FETCHING = 1
    BUFFERED = 2
    DURABLE = 3
    VERIFIED = 4


_ABSENT = int(ChunkState.ABSENT)
_FETCHING = int(ChunkState.FETCHING)
_BUFFERED = int(ChunkState.BUFFERED)
_DURABLE = int(ChunkState.DURABLE)
_VERIFIED = int(ChunkState.VERIFIED)


class ChunkSource(Protocol):
    """A fetch under way, as the generation sees it."""

    def cancel(self) -> None:
        """End it; its chunks are given up when this returns."""

    async def settle(self) -> None:
        """Return when its requests have ended."""


class Generation:
    """See the module. Made by the manager, one per version in use or idle but open.

    Args:
        on_disk_error: Told of a failed write or sync, after the chunks were dropped.
        on_closed: Told when the files were closed, which others' use of theirs may bring about.
    """

    def __init__(
        self,
        folder: Folder,
        entry: CatalogEntry,
        runtime: StorageRuntime,
        *,
        on_disk_error: Callable[[OSError], None],
        on_closed: Callable[[Generation], None],
    ) -> None:
        self.folder = folder
        self.entry = entry
        self.runtime = runtime
        self.header: MapHeader = folder.header_of(entry)
        self.version = entry.version
        self.chunk_size_bytes = entry.chunk_size_bytes
        self.chunk_count = self.header.chunk_count
        self.states = bytearray(self.chunk_count)
        self.slots: array[int] = array("Q", bytes(8 * self.chunk_count))
        self.memory = ChunkMemory(self._load_chunk)
        self.fetches: dict[int, ChunkSource] = {}
        self.readers = 0
        self.files = BlobFiles(folder, entry.stem, self.header, runtime.disk)
        self.retired = False
        """No longer what the blob's id means; closed and forgotten once its readers are gone."""
        self.files_stay = False
        """Its files could not be deleted: what they take stays counted when it is closed."""
        self.closed = False
        self._on_closed = on_closed
        self.whole_sha256: bytes | None = None
        self.changes = Changes()
        """Noted whenever a chunk arrives, is dropped or given up."""
        self.discards = 0
        """How often a chunk that was present ceased to be."""
        self.writer = Writer(self, runtime, on_disk_error)
        self.last_read_end: int | None = None
        self.read_ahead_bytes = 0

    # -- what is here ---------------------------------------------------------------------------

    def chunk_length(self, index: int) -> int:
        """Return a chunk's length in bytes."""
        return self.header.chunk_length(index)

    def chunks_of(self, span: ByteRange) -> tuple[int, int]:
        """Return first and end of the chunks that hold a span."""
        if span.length == 0:
            return 0, 0
        size = self.chunk_size_bytes
        return span.start // size, (span.end - 1) // size + 1

    def present_in(self, first: int, end: int) -> int:
        """Return how many chunks of `[first, end)` are present."""
        states = self.states
        missing = states.count(_ABSENT, first, end) + states.count(_FETCHING, first, end)
        return end - first - missing

    def is_present(self, index: int) -> bool:
        """Whether a chunk is in memory or in the file."""
        return self.states[index] >= _BUFFERED

    def first_absent(self, first: int) -> int:
        """Return the first absent chunk from `first` on, or the chunk count."""
        found = self.states.find(_ABSENT, first)
        return found if found >= 0 else self.chunk_count

    def first_taken(self, first: int, end: int) -> int:
        """Return the first chunk of `[first, end)` that is not absent, or `end`."""
        states = self.states
        while first < end and states[first] == _ABSENT:
            first += 1
        return first

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are present."""
        return self.present_in(0, self.chunk_count) == self.chunk_count

    @property
    def durable_bytes(self) -> int:
        """Bytes whose chunks are recorded in the map."""
        states = self.states
        count = states.count(_DURABLE) + states.count(_VERIFIED)
        bytes_ = count * self.chunk_size_bytes
        last = self.chunk_count - 1
        if last >= 0 and states[last] >= _DURABLE:
            bytes_ -= self.chunk_size_bytes - self.chunk_length(last)
        return bytes_

    def verified_end(self, index: int, end: int) -> int:
        """Return where the run of VERIFIED chunks from `index` ends, at most `end`."""
        states = self.states
        if states.count(_VERIFIED, index, end) == end - index:
            return end
        while index < end and states[index] == _VERIFIED:
            index += 1
        return index

    @property
    def map_bytes(self) -> int:
        """Memory that states and slots take."""
        return 9 * self.chunk_count

    # -- claiming and publishing -----------------------------------------------------------------

    def claim(self, first: int, end: int, source: ChunkSource) -> bool:
        """Reserve disk for absent chunks and give them to a fetch; False if there is no room."""
        length = self.disk_bytes(first, end)
        map_length = 0 if self.entry.bytes else on_disk(self.header.map_size_bytes)
        if not self.folder.budget.reserve(length + map_length):
            return False
        self.folder.budget.settle(map_length)
        self.entry.bytes += length + map_length
        for index in range(first, end):
            assert self.states[index] == _ABSENT, "a chunk was claimed twice"
            self.states[index] = _FETCHING
            self.fetches[index] = source
        return True

    def disk_bytes(self, first: int, end: int) -> int:
        """Return how much disk the chunks `[first, end)` take, at least one of them."""
        last = on_disk(self.chunk_length(end - 1))
        return (end - 1 - first) * on_disk(self.chunk_size_bytes) + last

    def unclaim(self, source: ChunkSource, indexes: Iterable[int]) -> None:
        """Give up claimed chunks that did not arrive."""
        for index in indexes:
            if self.fetches.get(index) is source:
                del self.fetches[index]
                self.folder.budget.settle(on_disk(self.chunk_length(index)))
                self._set_absent(index)
        self.changes.note()

    def _set_absent(self, index: int) -> None:
        self.states[index] = _ABSENT
        self.slots[index] = 0
        length = on_disk(self.chunk_length(index))
        self.entry.bytes -= length
        self.folder.budget.give_back(length)
        self.entry.complete = False

    def publish(self, source: ChunkSource, index: int, buffer: ChunkBuffer, crc: int) -> bool:
        """Take a chunk that arrived whole, its buffer included; False if it is not wanted."""
        if self.fetches.get(index) is not source:
            return False
        del self.fetches[index]
        self.states[index] = _BUFFERED
        self.slots[index] = seal_slot(self.header.generation, index, crc)
        self.memory.add(index, buffer)
        self.writer.add(index)
        self.changes.note()
        return True

    # -- called by the writer ----------------------------------------------------------------------

    def mark_written(self, indexes: Iterable[int]) -> None:
        """Note that chunks are in the file: their memory is no longer the only copy."""
        for index in indexes:
            if self.memory.note_written(index):
                self.folder.budget.settle(on_disk(self.chunk_length(index)))

    def mark_recorded(self, indexes: Iterable[int]) -> None:
        """Note that chunks are synced and in the map."""
        for index in indexes:
            if self.states[index] == _BUFFERED:
                self.states[index] = _VERIFIED
                self.memory.forget(index)
        self.entry.complete = (
            self.states.count(_VERIFIED) + self.states.count(_DURABLE) == self.chunk_count
        )

    def drop(self, indexes: Iterable[int]) -> None:
        """Forget chunks that could not be made durable, or whose bytes proved wrong."""
        for index in indexes:
            if self.memory.forget(index):
                self.folder.budget.settle(on_disk(self.chunk_length(index)))
            if self.states[index] >= _BUFFERED:
                self._set_absent(index)
                self.discards += 1
                self.whole_sha256 = None
        self.changes.note()

    # -- reading -----------------------------------------------------------------------------------

    def expected_crc(self, index: int) -> int | None:
        """Return the CRC a present chunk must have; None if its slot vouches for nothing."""
        return slot_crc(self.header.generation, index, self.slots[index])

    def discard(self, index: int) -> None:
        """Forget a chunk whose bytes are not what was recorded, on disk too."""
        if self.states[index] >= _BUFFERED and index not in self.memory.unwritten:
            self.writer.forget(index)
            self.drop([index])

    def distrust(self, first: int, end: int) -> None:
        """Have chunks verified anew before they are served: their file is not what it was."""
        for index in range(first, end):
            if self.states[index] == _VERIFIED:
                self.states[index] = _DURABLE

    async def check(self, first: int, end: int) -> int:
        """Verify recorded chunks `[first, end)` in a thread; bad ones are discarded.

        Returns:
            How many were bad.
        """
        return await self._check([i for i in range(first, end) if self.states[i] == _DURABLE])

    async def recheck(self, first: int, end: int) -> int:
        """Do the same with those that were verified before: what the scrub does."""
        return await self._check([i for i in range(first, end) if self.states[i] >= _DURABLE])

    async def _check(self, indexes: list[int]) -> int:
        wanted = [(index, self.expected_crc(index)) for index in indexes]
        good = await self.runtime.reader.run(lambda: self._check_blocking(wanted))
        bad = 0
        for (index, crc), is_good in zip(wanted, good, strict=True):
            if self.states[index] < _DURABLE or self.expected_crc(index) != crc:
                continue  # it changed meanwhile; whoever changed it knows better
            if is_good:
                self.states[index] = _VERIFIED
            else:
                bad += 1
                self.discard(index)
        return bad

    async def reconcile(self) -> None:
        """Count what the files really take, when nothing else changes it."""
        await self.writer.drain()
        if self.fetches or self.files.data_fd < 0 or self.retired:
            return
        counted = self.entry.bytes
        real = await self.runtime.reader.run(self.files.allocated_bytes)
        if self.entry.bytes != counted or self.fetches or self.writer.is_busy or self.retired:
            return  # it moved on meanwhile; the next pass will do
        if real > counted:
            self.folder.budget.take(real - counted)
        else:
            self.folder.budget.give_back(counted - real)
        self.entry.bytes = real

    def _check_blocking(self, wanted: list[tuple[int, int | None]]) -> list[bool]:
        return [
            crc is not None and self._read_blocking(index, crc) is not None for index, crc in wanted
        ]

    def _read_blocking(self, index: int, crc: int) -> bytes | None:
        """Return a chunk's bytes if they have that CRC."""
        return self.files.read(index * self.chunk_size_bytes, self.chunk_length(index), crc)

    async def _load_chunk(self, index: int) -> ChunkBuffer | None:
        """Read a present chunk into the pool, checked; None if it is gone or proved wrong."""
        crc, length = self.expected_crc(index), self.chunk_length(index)
        pool = self.runtime.buffers
        data: bytes | bytearray | None = None
        if crc is not None:
            await pool.acquire(length)
            try:
                data = self._read_resident(index, crc)
                if data is None:
                    wanted = index, crc
                    data = await self.runtime.reader.run(lambda: self._read_blocking(*wanted))
            finally:
                if data is None:
                    pool.release(length)
        if data is not None:
            return ChunkBuffer(pool, data)
        if self.expected_crc(index) == crc:
            self.discard(index)
        return None

    def _read_resident(self, index: int, crc: int) -> bytearray | None:
        """Return a chunk's bytes if they are few, in the page cache and right; never waits."""
        length = self.chunk_length(index)
        if length > RESIDENT_READ_BYTES_MAX:
            return None
        disk, offset = self.runtime.disk, index * self.chunk_size_bytes
        data = disk.read_resident(self.files.data_fd, length, offset)
        return data if data is not None and crc32c(data) == crc else None

    async def feed(self, first: int, end: int, take: Callable[[bytes | bytearray], None]) -> int:
        """Give present chunks, checked and in order, to a function in a hashing thread.

        Returns:
            How many were taken; the next one, if any, was wrong and is discarded.
        """
        wanted = []
        for index in range(first, end):
            buffer = self.memory.get(index)
            if buffer is not None:
                buffer.retain()
            wanted.append((index, self.expected_crc(index), buffer))

        def work() -> int:
            for done, (index, crc, buffer) in enumerate(wanted):
                data: bytes | bytearray | None = buffer.data if buffer is not None else None
                if data is None and crc is not None:
                    data = self._read_blocking(index, crc)
                if data is None:
                    return done
                take(data)
            return len(wanted)

        try:
            count = await self.runtime.hashing.run(work)
        finally:
            for _, _, buffer in wanted:
                if buffer is not None:
                    buffer.release()
        if count < len(wanted):
            index, crc, _ = wanted[count]
            if self.expected_crc(index) == crc:
                self.discard(index)
        return count

    # -- opening and closing -----------------------------------------------------------------------

    def take_loaded(self, loaded: FoundRecords) -> None:
        """Take what the opened map says, and count what is really there."""
        self.slots = loaded.slots
        self.states = bytearray(_DURABLE if slot else _ABSENT for slot in loaded.slots)
        self.entry.complete = self.present_in(0, self.chunk_count) == self.chunk_count
        self.whole_sha256 = loaded.whole_sha256 if self.entry.complete else None
        counted = on_disk(self.header.map_size_bytes)
        for first, end in runs(i for i, slot in enumerate(loaded.slots) if slot):
            counted += self.disk_bytes(first, end)
        if counted > self.entry.bytes:
            self.folder.budget.take(counted - self.entry.bytes)
        else:
            self.folder.budget.give_back(self.entry.bytes - counted)
        self.entry.bytes = counted

    @property
    def is_idle(self) -> bool:
        """Whether nobody reads, fetches or writes it."""
        return not (self.readers or self.fetches or self.memory.unwritten or self.writer.is_busy)

    def retire(self) -> None:
        """Note that its files are gone or going; their bytes count until it is closed."""
        self.retired = True
        if self.closed:
            self._uncount()

    def _uncount(self) -> None:
        if self.files_stay:
            self.folder.undeleted[self.entry.stem] = self.entry.bytes
        else:
            self.folder.budget.give_back(self.entry.bytes)
        self.entry.bytes = 0

    def close_if_idle(self) -> bool:
        """Close the files unless it is in use; whether they are closed now."""
        if not self.closed and self.is_idle:
            self._close()
        return self.closed

    def _close(self) -> None:
        self.closed = True
        self.runtime.open_files.forget(self)
        # The generation and its writer hold each other until the collector comes by, which does
        # not know how much memory hangs on them.
        self.slots = array("Q")
        self._on_closed(self)
        self.files.close()
        if self.retired:
            self._uncount()
