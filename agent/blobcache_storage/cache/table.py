"""The blobs of one configuration: what is on disk, and what of it is open.

Belongs to the event loop. At most one generation per blob id is current; retired ones live on
until their readers are gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from blobcache_storage.cache.disk import cache_error
from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.index import CatalogEntry
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.device import BlobVersion
from blobcache_storage.errors import CacheBusy

if TYPE_CHECKING:
    from blobcache_storage.cache.folder import Folder

_log = logging.getLogger(__name__)


def version_name(entry: CatalogEntry) -> str:
    """Return the opaque name eviction knows a cached version by."""
    return f"{entry.generation:016x}"


class BlobTable:
    """See the module.

    Args:
        on_disk_error: Told of every failure of the cache's disk.
    """

    def __init__(
        self, folder: Folder, runtime: StorageRuntime, on_disk_error: Callable[[OSError], None]
    ) -> None:
        self.folder = folder
        self._runtime = runtime
        self._on_disk_error = on_disk_error
        self._open: dict[str, Generation] = {}
        self._retired: set[Generation] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # -- finding -----------------------------------------------------------------------------------

    def current(self, blob_id: str) -> Generation | None:
        """Return the open generation of a blob, if it is open."""
        generation = self._open.get(blob_id)
        if generation is None or generation.closed:
            return None
        return generation

    def open_generations(self) -> list[Generation]:
        """Return all that are open, retired ones included."""
        return [*(g for g in self._open.values() if not g.closed), *self._retired]

    async def get(self, blob_id: str) -> Generation | None:
        """Return the current generation of a blob, opening its files if need be; None if none.

        What is not there, or is not what it should be, is discarded.

        Raises:
            CacheBusy: Its files cannot be opened now, or too many are open; they are kept.
        """
        while True:
            generation = self.current(blob_id)
            if generation is not None:
                return generation
            entry = self.folder.entries.get(blob_id)
            if entry is None or self._closing:
                return None
            loading = self._loading.get(blob_id)
            if loading is None:
                if self._runtime.open_files.is_exhausted:
                    raise CacheBusy("too many cached blobs are being read")
                loading = self._loading[blob_id] = self.spawn(self._load(entry))
            # Not cancelled with those who wait: a thread opens descriptors meanwhile.
            await asyncio.wait([loading])
            loading.result()
            is_kept = self.folder.entries.get(blob_id) is entry and not self._closing
            if is_kept and self.current(blob_id) is None:
                raise CacheBusy("the files of a cached blob cannot be opened now")

    async def _load(self, entry: CatalogEntry) -> None:
        generation = self._new(entry)
        try:
            loaded = await self._runtime.reader.run(generation.files.load)
        except OSError as error:
            self._on_disk_error(error)
            return
        finally:
            self._loading.pop(entry.blob_id, None)
        if self._closing or self.folder.entries.get(entry.blob_id) is not entry:
            # Evicted meanwhile (then the descriptors are of unlinked files), or too late.
            generation.files.close()
        elif loaded is None:
            del self.folder.entries[entry.blob_id]
            await self.remove_files(entry)
        else:
            generation.take_loaded(loaded)
            self._open[entry.blob_id] = generation
            self._runtime.open_files.touch(generation)

    def _new(self, entry: CatalogEntry) -> Generation:
        def on_disk_error(error: OSError) -> None:
            self._on_disk_error(error)
            self.release(generation)  # it may hold nothing any more

        generation = Generation(
            self.folder,
            entry,
            self._runtime,
            on_disk_error=on_disk_error,
            on_closed=self._forget,
        )
        return generation

    def _forget(self, generation: Generation) -> None:
        """Let go of a closed generation: its map's memory is what the bounds are about."""
        if self._open.get(generation.entry.blob_id) is generation:
            del self._open[generation.entry.blob_id]
        self._retired.discard(generation)

    def create(self, blob_id: str, version: BlobVersion, chunk_size_bytes: int) -> Generation:
        """Return a new generation, which is the blob's current one from now on."""
        assert blob_id not in self.folder.entries, "a blob has one current version"
        now = self._runtime.clock.time()
        entry = self.folder.new_entry(blob_id, version, chunk_size_bytes, now=now)
        generation = self._new(entry)
        self.folder.entries[blob_id] = entry
        self._open[blob_id] = generation
        self._runtime.open_files.touch(generation)
        return generation

    def is_in_use(self, entry: CatalogEntry) -> bool:
        """Whether a blob is being read, fetched or written."""
        generation = self.current(entry.blob_id)
        return entry.blob_id in self._loading or (generation is not None and not generation.is_idle)

    # -- letting go --------------------------------------------------------------------------------

    def touch(self, generation: Generation) -> None:
        """Note a read."""
        generation.entry.last_read_time = self._runtime.clock.time()
        self._runtime.open_files.touch(generation)

    def release(self, generation: Generation) -> None:
        """Note the end of a read: closes what is retired, forgets what holds nothing."""
        if generation.readers or generation.fetches:
            return
        if generation.retired or self._closing:
            generation.close_if_idle()
        elif not generation.present_in(0, generation.chunk_count) and generation.is_idle:
            self.retire(generation)

    def retire(self, generation: Generation) -> None:
        """Take a generation out: its readers go on, its files go."""
        if generation.retired:
            return
        entry = generation.entry
        if self.folder.entries.get(entry.blob_id) is entry:
            del self.folder.entries[entry.blob_id]
        if self._open.get(entry.blob_id) is generation:
            del self._open[entry.blob_id]
        generation.retire()
        self._retired.add(generation)
        self.spawn(self._finish_retiring(generation))

    async def _finish_retiring(self, generation: Generation) -> None:
        # The writer makes the files at its first write: unlinked before, they would come back.
        await generation.writer.drain()
        await self._unlink(generation.entry, generation)
        self.release(generation)
        generation.close_if_idle()

    async def remove(self, entry: CatalogEntry) -> int:
        """Delete an idle blob's files; returns the bytes that frees: 0 if they cannot be deleted.

        It is gone from the table before the disk is touched: a read that comes meanwhile starts
        a new generation with files of its own.
        """
        assert not self.is_in_use(entry), "a blob in use was evicted"
        freed = entry.bytes
        del self.folder.entries[entry.blob_id]
        generation = self._open.pop(entry.blob_id, None)
        if generation is None or generation.closed:
            return freed if await self.remove_files(entry) else 0
        generation.retire()
        self._retired.add(generation)
        is_gone = await self._unlink(entry, generation)
        generation.close_if_idle()
        return freed if is_gone else 0

    async def remove_files(self, entry: CatalogEntry) -> bool:
        """Delete the files of an entry that is not open, and give its bytes back; if it could."""
        is_gone = await self._unlink(entry)
        self.folder.budget.give_back(entry.bytes)
        entry.bytes = 0
        return is_gone

    async def _unlink(self, entry: CatalogEntry, generation: Generation | None = None) -> bool:
        """Delete an entry's files; where that fails what they take stays counted."""
        counted = entry.bytes
        try:
            await self._runtime.flusher.run(lambda: self.folder.unlink(entry.stem))
        except OSError as error:
            _log.warning("Could not delete a cached blob", extra={"error": str(cache_error(error))})
            if generation is not None and not generation.closed:
                generation.files_stay = True
            else:
                self.folder.budget.take(counted - entry.bytes)  # if it was closed meanwhile
                self.folder.undeleted[entry.stem] = counted
                entry.bytes = 0
            self._on_disk_error(error)
            return False
        return True

    def close_idle(self, blob_id: str | None) -> None:
        """Close what nobody uses: one blob, or all."""
        names = list(self._open) if blob_id is None else [blob_id]
        for name in names:
            generation = self._open.get(name)
            if generation is not None:
                generation.close_if_idle()
        for generation in list(self._retired):
            generation.close_if_idle()

    @property
    def is_open(self) -> bool:
        """Whether any blob is open or being opened."""
        return bool(self.open_generations() or self._loading)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work in the background, whoever waits for it; `close` does."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settled(self) -> None:
        """Return when no work is left in the background."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Make everything written durable and close all files; nothing may be read any more."""
        self._closing = True
        for generation in self.open_generations():
            for source in set(generation.fetches.values()):
                source.cancel()
                await source.settle()
        await self.settled()
        for generation in self.open_generations():
            await generation.writer.finish()
        self.close_idle(None)
        await self._runtime.flusher.run(self.folder.close)
