"""The cache root: one directory, owned by one process, laid out as follows (docs/format.md).

::

    root/                       0700, ours; opened once, everything else relative to it
      LOCK                      held with flock while a process uses the root
      v1/                       the layout's version
        index.json              advisory, see `index`
        <hash of config uid>/   one folder per configuration
          owner.json            {"uid", "id"}: who the folder belongs to
          <hash of blob id and version>-<generation>.data
          <…>.map

Opening is blocking and belongs in a thread, before managers exist; from then on names and figures
are kept in memory and belong to the event loop, and only file operations run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Self

from blobcache_storage.cache.base import EvictionResult, Victim
from blobcache_storage.cache.budget import RootBudget
from blobcache_storage.cache.disk import cache_error
from blobcache_storage.cache.folder import (
    READ_DIRECTORY,
    Folder,
    folder_name,
    origin_of,
    owner_of,
    replace_file,
)
from blobcache_storage.cache.index import (
    INDEX_NAME,
    CatalogEntry,
    IndexedFolder,
    encode_index,
)
from blobcache_storage.cache.orphans import (
    OrphanBlob,
    delete_folder,
    delete_rest,
    evict_for,
    evict_victims,
    list_orphans,
)
from blobcache_storage.cache.reclaim import Reclaimer, make_room_in_root
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.cache.stock import take_stock
from blobcache_storage.config import ConfigV2
from blobcache_storage.errors import ConfigError

LAYOUT_NAME = "v1"
LOCK_NAME = "LOCK"
INDEX_INTERVAL_SECONDS = 60.0
ORPHAN_SECONDS_MAX = 24 * 3600.0
"""How long the bytes of a configuration that nobody claims are kept."""

_FOREIGN_WRITE_BITS = 0o022
_log = logging.getLogger(__name__)


class CacheRoot:
    """One directory of cached blobs; see the module. Construct with `open`."""

    def __init__(self, runtime: StorageRuntime, budget: RootBudget) -> None:
        self.runtime = runtime
        self.disk = runtime.disk
        self.budget = budget
        self.folders: dict[str, Folder] = {}
        self.members: dict[str, Reclaimer] = {}
        """By folder name: who evicts for each claimed folder."""
        self._looking_after = False
        self._upkeep: asyncio.Task[None] | None = None
        self._index_saved = runtime.clock.monotonic()
        self._root_fd = -1
        self._lock_fd = -1
        self.layout_fd = -1

    @classmethod
    def open(
        cls,
        path: str,
        runtime: StorageRuntime,
        *,
        capacity_bytes: int | None = None,
        min_free_bytes: int = 0,
    ) -> Self:
        """Open or make a root and take stock of it. Blocking: call it in a thread.

        Args:
            path: Made with mode 0700 if it is missing; its parent must exist.
            capacity_bytes: Bound of what all configurations use together; None = the disk's.
            min_free_bytes: Free space of the file system that is left alone.

        Raises:
            ConfigError: The directory is a link, not ours, writable by others, or in use.
        """
        root = cls(runtime, RootBudget(capacity_bytes, min_free_bytes))
        try:
            root._claim(path)
            take_stock(root)
        except OSError as error:
            root.close()
            raise ConfigError(f"the cache root '{path}' cannot be used: {error}") from error
        except ConfigError:
            root.close()
            raise
        return root

    def _claim(self, path: str) -> None:
        disk = self.disk
        with contextlib.suppress(FileExistsError):  # whether it may be used is checked below
            os.mkdir(path, 0o700)
        self._root_fd = disk.open(path, READ_DIRECTORY)
        facts = disk.facts(self._root_fd)
        if facts.st_uid != os.geteuid():
            raise ConfigError(
                f"the cache root '{path}' must belong to user {os.geteuid()}, not {facts.st_uid}"
            )
        if facts.st_mode & _FOREIGN_WRITE_BITS:
            raise ConfigError(f"the cache root '{path}' must not be writable by others: chmod 0700")
        self._lock_fd = disk.open(LOCK_NAME, os.O_RDWR | os.O_CREAT, dir_fd=self._root_fd)
        if not disk.lock(self._lock_fd):
            raise ConfigError(f"the cache root '{path}' is used by another process")
        disk.make_directory(LAYOUT_NAME, dir_fd=self._root_fd)
        self.layout_fd = disk.open(LAYOUT_NAME, READ_DIRECTORY, dir_fd=self._root_fd)

    def adopt(self, config: ConfigV2) -> Folder:
        """Return the folder of a configuration, which is its manager's from now on.

        Raises:
            ConfigError: A manager has it already.
        """
        uid = owner_of(config)
        name = folder_name(uid, origin_of(config))
        folder = self.folders.get(name)
        if folder is None:
            folder = self.folders[name] = Folder(self, uid, name)
        if folder.claimed:
            raise ConfigError(f"the configuration '{config.id}' already has a cache manager")
        # A crash may have left the owner file unwritten; the name proves the owner.
        folder.uid, folder.config_id = uid, config.id
        folder.claimed, folder.orphaned_time, folder.doomed = True, None, False
        return folder

    def orphans(self) -> list[OrphanBlob]:
        """Return every cached blob that no configuration claims."""
        return list_orphans(self)

    async def evict_orphans(self, uid: str, victims: Sequence[Victim]) -> list[EvictionResult]:
        """Delete orphans of one configuration, if they are still what was decided on."""
        return await evict_victims(self, uid, victims)

    async def delete_config(self, uid: str) -> None:
        """Delete all bytes of a configuration that was deleted (its tombstone); idempotent.

        What a manager still claims goes as soon as it lets go.
        """
        for folder in [folder for folder in self.folders.values() if folder.uid == uid]:
            if folder.claimed:
                folder.doomed = True
            else:
                await delete_folder(self, folder)

    async def make_room(self, length: int) -> None:
        """Evict for `length` more bytes: orphans, then the coldest of all configurations."""
        self.budget.observe_free(await self.runtime.flusher.run(self.observe_free))
        await evict_for(self, length)
        if not self.budget.has_room(length):
            await make_room_in_root(self, list(self.members.values()), length)
            self.budget.observe_free(await self.runtime.flusher.run(self.observe_free))

    def check_stat(self) -> None:
        """Look after itself in the background: for roots that no manager looks after."""
        if self._upkeep is None or self._upkeep.done():
            self._upkeep = asyncio.get_running_loop().create_task(self._try_to_look_after())

    async def _try_to_look_after(self) -> None:
        try:
            await self.look_after()
        except OSError as error:
            _log.warning("Could not look after the root", extra={"error": str(cache_error(error))})

    async def settled(self) -> None:
        """Return when no work is left in the background."""
        if self._upkeep is not None:
            await asyncio.wait([self._upkeep])

    async def look_after(self) -> None:
        """Keep the floor of free space, delete old orphans, rewrite the index when due.

        Managers call it every few seconds; what is not due costs nothing.
        """
        if self._looking_after:
            return
        self._looking_after = True
        try:
            await self._look_after()
        finally:
            self._looking_after = False

    async def _look_after(self) -> None:
        runtime = self.runtime
        self.budget.observe_free(await runtime.flusher.run(self.observe_free))
        if self.budget.excess_bytes:
            await self.make_room(0)
        now = runtime.clock.time()
        for folder in list(self.folders.values()):
            await delete_rest(folder)
            since = folder.orphaned_time
            is_old = since is not None and now - since >= ORPHAN_SECONDS_MAX
            if not folder.claimed and (is_old or folder.doomed):
                await delete_folder(self, folder)
        if runtime.clock.monotonic() - self._index_saved >= INDEX_INTERVAL_SECONDS:
            await self.write_index()

    async def write_index(self) -> None:
        """Rewrite the advisory index."""
        self._index_saved = self.runtime.clock.monotonic()
        await self.runtime.flusher.run(self.save_index())

    def release(self, folder: Folder) -> None:
        """Give a folder back; its blobs are orphans until its configuration returns."""
        folder.claimed = False
        folder.orphaned_time = self.runtime.clock.time()
        self.members.pop(folder.name, None)

    def save_index(self) -> Callable[[], None]:
        """Return a blocking function that writes the index as of now."""
        folders = {
            name: IndexedFolder(folder.orphaned_time, [_copy(e) for e in folder.entries.values()])
            for name, folder in self.folders.items()
        }
        return lambda: replace_file(self.disk, self.layout_fd, INDEX_NAME, encode_index(folders))

    def observe_free(self) -> int:
        """Return the file system's free space (blocking); give it to `budget.observe_free`."""
        return self.disk.free_space(self.layout_fd).free_bytes

    def close(self) -> None:
        """Close all descriptors, which frees the root for others (blocking); idempotent."""
        for folder in self.folders.values():
            folder.close()
        for fd in (self.layout_fd, self._lock_fd, self._root_fd):
            if fd >= 0:
                self.disk.close(fd)
        self.layout_fd = self._lock_fd = self._root_fd = -1


def _copy(entry: CatalogEntry) -> CatalogEntry:
    """Copy an entry, which the loop may change while a thread encodes it."""
    return CatalogEntry(
        entry.stem,
        entry.blob_id,
        entry.version,
        entry.chunk_size_bytes,
        entry.generation,
        entry.created_ns,
        entry.bytes,
        entry.last_read_time,
        entry.complete,
    )
