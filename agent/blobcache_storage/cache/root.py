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

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Self

from blobcache_storage.cache.base import EvictionResult, Victim
from blobcache_storage.cache.budget import ConfigBudget, RootBudget, on_disk
from blobcache_storage.cache.chunk_map import (
    HEADER_SIZE_BYTES,
    SLOT_SIZE_BYTES,
    MapHeader,
    decode_header,
    decode_slots,
    owner_key,
)
from blobcache_storage.cache.disk import Disk, FileFacts
from blobcache_storage.cache.index import (
    INDEX_BYTES_MAX,
    INDEX_NAME,
    CatalogEntry,
    IndexedFolder,
    decode_index,
    encode_index,
)
from blobcache_storage.cache.orphans import (
    OrphanBlob,
    delete_folder,
    evict_for,
    evict_victims,
    list_orphans,
)
from blobcache_storage.cache.reclaim import Reclaimer, make_room_in_root
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import ConfigV2
from blobcache_storage.device import BlobVersion
from blobcache_storage.errors import ConfigError

LAYOUT_NAME = "v1"
LOCK_NAME = "LOCK"
OWNER_NAME = "owner.json"
OWNER_BYTES_MAX = 4096
INDEX_INTERVAL_SECONDS = 60.0
ORPHAN_SECONDS_MAX = 24 * 3600.0
"""How long the bytes of a configuration that nobody claims are kept."""

_FOLDER = re.compile(r"[0-9a-f]{32}")
_BLOB_FILE = re.compile(r"([0-9a-f]{32}-[0-9a-f]{16})\.(data|map)")
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_FOREIGN_WRITE_BITS = 0o022


def folder_name(uid: str, origin: str) -> str:
    """Return the name of a configuration's folder."""
    return hashlib.sha256(f"{uid}\0{origin}".encode()).hexdigest()[:32]


def origin_of(config: ConfigV2) -> str:
    """Return what names a configuration's origin: all that decides which bytes an id means.

    A configuration whose endpoint or bucket changes gets another folder: the bytes of the former
    one must not be served under the new one's name, and become orphans.
    """
    backend = config.get_backend_config()
    parts = (
        backend.type,
        backend.s3,
        backend.oss,
        backend.registry,
        backend.http_proxy,
        backend.localfs,
        backend.insecure_skip_verify,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def owner_of(config: ConfigV2) -> str:
    """Return what names a configuration's folder: its uid, or its id where it has none."""
    return config.uid or config.id


class Folder:
    """One configuration's folder: its entries in memory, its directory on disk.

    `directory` and what uses it belong in worker threads, the rest in the event loop.
    """

    def __init__(self, root: CacheRoot, uid: str, name: str) -> None:
        self.root = root
        self.uid = uid
        self.name = name
        self.config_id = ""
        self.entries: dict[str, CatalogEntry] = {}
        """By blob id: at most one version of a blob is current."""
        self.budget = ConfigBudget(root.budget)
        self.orphaned_time: float | None = None
        self.claimed = False
        self.doomed = False
        """Its configuration was deleted: it goes as soon as nobody claims it."""
        self._fd: int | None = None
        self._opening = threading.Lock()

    def new_entry(
        self, blob_id: str, version: BlobVersion, chunk_size_bytes: int, *, now: float
    ) -> CatalogEntry:
        """Return an entry of a new generation; nothing is on disk yet, nothing is counted."""
        generation = secrets.randbits(64) or 1
        name = hashlib.sha256(f"{blob_id}\0{version.validator.value}\0{version.token}".encode())
        stem = f"{name.hexdigest()[:32]}-{generation:016x}"
        return CatalogEntry(
            stem, blob_id, version, chunk_size_bytes, generation, int(now * 1e9), 0, now, False
        )

    def header_of(self, entry: CatalogEntry) -> MapHeader:
        """Return the header that the entry's map must have."""
        return MapHeader(
            entry.blob_id,
            entry.version,
            entry.chunk_size_bytes,
            entry.generation,
            entry.created_ns,
            owner_key(self.uid),
        )

    def directory(self) -> int:
        """Return the folder's descriptor, making the folder at first use (blocking)."""
        disk = self.root.disk
        with self._opening:
            if self._fd is None:
                layout = self.root.layout_fd
                disk.make_directory(self.name, dir_fd=layout)
                fd = disk.open(self.name, _READ_DIRECTORY, dir_fd=layout)
                try:
                    self._write_owner(disk, fd)
                except OSError:
                    disk.close(fd)
                    raise
                self._fd = fd
            return self._fd

    def _write_owner(self, disk: Disk, fd: int) -> None:
        owner = json.dumps({"uid": self.uid, "id": self.config_id}).encode()
        _replace_file(disk, fd, OWNER_NAME, owner)

    def unlink(self, stem: str) -> None:
        """Delete both files of an entry, the map first (blocking).

        The map first: data without a map is nothing, a map without its data would vouch for
        whatever gets that name.
        """
        directory, disk = self.directory(), self.root.disk
        disk.unlink(f"{stem}.map", dir_fd=directory)
        disk.unlink(f"{stem}.data", dir_fd=directory)

    def remove_directory(self) -> None:
        """Remove the folder, which holds no blob any more (blocking)."""
        self.close()
        disk, layout = self.root.disk, self.root.layout_fd
        fd = disk.open(self.name, _READ_DIRECTORY, dir_fd=layout)
        try:
            disk.unlink(OWNER_NAME, dir_fd=fd)
        finally:
            disk.close(fd)
        disk.remove_directory(self.name, dir_fd=layout)

    def close(self) -> None:
        """Close the directory (blocking)."""
        with self._opening:
            if self._fd is not None:
                self.root.disk.close(self._fd)
                self._fd = None


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
            root._take_stock()
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
        self._root_fd = disk.open(path, _READ_DIRECTORY)
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
        self.layout_fd = disk.open(LAYOUT_NAME, _READ_DIRECTORY, dir_fd=self._root_fd)

    def _take_stock(self) -> None:
        disk, now = self.disk, self.runtime.clock.time()
        self.budget.observe_free(disk.free_space(self.layout_fd).free_bytes)
        indexed = self._read_index()
        for facts in disk.list(self.layout_fd):
            if facts.name.endswith(".tmp"):
                disk.unlink(facts.name, dir_fd=self.layout_fd)
            elif facts.is_directory and _FOLDER.fullmatch(facts.name):
                known = indexed.get(facts.name, IndexedFolder())
                self._take_stock_of(facts.name, known, now)

    def _read_index(self) -> dict[str, IndexedFolder]:
        data = _read_file(self.disk, self.layout_fd, INDEX_NAME, INDEX_BYTES_MAX)
        return decode_index(data) if data is not None else {}

    def _take_stock_of(self, name: str, known: IndexedFolder, now: float) -> None:
        """List one folder: pair its files, remove what has no partner."""
        disk = self.disk
        fd = disk.open(name, _READ_DIRECTORY, dir_fd=self.layout_fd)
        try:
            files = disk.list(fd)
            owner = _read_owner(disk, fd)
            folder = Folder(self, owner, name)
            folder.orphaned_time = known.orphaned_time or now
            pairs = _pair(disk, fd, files)
            remembered = {blob.stem: blob for blob in known.blobs}
            for stem, (data, map_facts) in pairs.items():
                entry = remembered.get(stem) or _read_entry(disk, fd, map_facts)
                if entry is None or not self._keep(folder, entry, fd):
                    _unlink_pair(disk, fd, stem)
                    continue
                # Delayed allocation may show fewer blocks; loading the map sets it right.
                entry.bytes = data.allocated_bytes + on_disk(map_facts.size_bytes)
        finally:
            disk.close(fd)
        folder.budget.adopt(sum(entry.bytes for entry in folder.entries.values()))
        self.folders[name] = folder

    def _keep(self, folder: Folder, entry: CatalogEntry, fd: int) -> bool:
        """Enter one version of a blob: of two left by a crash the younger stays."""
        rival = folder.entries.get(entry.blob_id)
        if rival is not None:
            if rival.created_ns >= entry.created_ns:
                return False
            _unlink_pair(self.disk, fd, rival.stem)
        folder.entries[entry.blob_id] = entry
        return True

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
        return lambda: _replace_file(self.disk, self.layout_fd, INDEX_NAME, encode_index(folders))

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


def _pair(disk: Disk, fd: int, files: list[FileFacts]) -> dict[str, tuple[FileFacts, FileFacts]]:
    """Return the data and map files that belong together; remove what has no partner."""
    found: dict[str, dict[str, FileFacts]] = {}
    for facts in files:
        match = _BLOB_FILE.fullmatch(facts.name)
        if facts.name.endswith(".tmp"):
            disk.unlink(facts.name, dir_fd=fd)
        elif match and facts.is_regular:
            found.setdefault(match[1], {})[match[2]] = facts
    pairs = {}
    for stem, parts in found.items():
        if len(parts) == 2:
            pairs[stem] = (parts["data"], parts["map"])
        else:
            _unlink_pair(disk, fd, stem)
    return pairs


def _unlink_pair(disk: Disk, fd: int, stem: str) -> None:
    disk.unlink(f"{stem}.map", dir_fd=fd)
    disk.unlink(f"{stem}.data", dir_fd=fd)


def _read_entry(disk: Disk, fd: int, facts: FileFacts) -> CatalogEntry | None:
    """Return the entry a map file speaks of, for want of an index; None if it is no map."""
    try:
        map_fd = disk.open(facts.name, os.O_RDONLY, dir_fd=fd)
    except OSError:
        return None
    try:
        page = disk.read(map_fd, HEADER_SIZE_BYTES, 0)
        header = decode_header(page)
        if header is None:
            return None
        body = disk.read(map_fd, header.chunk_count * SLOT_SIZE_BYTES, HEADER_SIZE_BYTES)
    except OSError:
        return None
    finally:
        disk.close(map_fd)
    absent = decode_slots(header, body).count(0)
    stem = facts.name.removesuffix(".map")
    return CatalogEntry(
        stem,
        header.blob_id,
        header.version,
        header.chunk_size_bytes,
        header.generation,
        header.created_ns,
        0,
        facts.mtime,
        absent == 0,
    )


def _read_owner(disk: Disk, fd: int) -> str:
    """Return the uid a folder belongs to; "" where its owner file is missing or torn."""
    data = _read_file(disk, fd, OWNER_NAME, OWNER_BYTES_MAX)
    if data is None:
        return ""
    try:
        return str(json.loads(data)["uid"])
    except (ValueError, KeyError, TypeError):
        return ""


def _read_file(disk: Disk, dir_fd: int, name: str, bytes_max: int) -> bytes | None:
    """Return a small file's bytes; None where there is none or it cannot be read."""
    try:
        fd = disk.open(name, os.O_RDONLY, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        return disk.read(fd, bytes_max, 0)
    except OSError:
        return None
    finally:
        disk.close(fd)


def _replace_file(disk: Disk, dir_fd: int, name: str, data: bytes) -> None:
    """Write a file beside the old one, sync it, and put it in its place."""
    temporary = f"{name}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    fd = disk.open(temporary, flags, dir_fd=dir_fd)
    try:
        disk.write_all(fd, [data], 0)
        disk.sync_data(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, name, dir_fd=dir_fd)
