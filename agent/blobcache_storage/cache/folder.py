"""One configuration's folder in a cache root: its names, its directory, its entries."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
from typing import TYPE_CHECKING

from blobcache_storage.cache.budget import ConfigBudget
from blobcache_storage.cache.chunk_map import MapHeader, owner_key
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.index import CatalogEntry
from blobcache_storage.config import ConfigV2
from blobcache_storage.device import BlobVersion

if TYPE_CHECKING:
    from blobcache_storage.cache.root import CacheRoot

OWNER_NAME = "owner.json"
READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


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
        self.undeleted: dict[str, int] = {}
        """Stems of files that are no entry's and could not be deleted, with what they take: it
        counts as used, and they are tried again (`orphans.delete_rest`)."""
        self.doomed = False
        """Its configuration was deleted: it goes as soon as nobody claims it."""
        self._fd: int | None = None
        self._has_owner = False
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
        """Return the descriptor of the folder, which must exist (blocking).

        It writes nothing: on a full disk too blobs are read and deleted.
        """
        with self._opening:
            if self._fd is None:
                layout = self.root.layout_fd
                self._fd = self.root.disk.open(self.name, READ_DIRECTORY, dir_fd=layout)
            return self._fd

    def made_directory(self) -> int:
        """Return the descriptor of the folder, making it and its owner file (blocking)."""
        disk = self.root.disk
        with contextlib.suppress(FileNotFoundError):
            self.directory()
        with self._opening:
            if self._fd is None:
                layout = self.root.layout_fd
                disk.make_directory(self.name, dir_fd=layout)
                self._fd = disk.open(self.name, READ_DIRECTORY, dir_fd=layout)
            if not self._has_owner:
                self._write_owner(disk, self._fd)
                self._has_owner = True
            return self._fd

    def _write_owner(self, disk: Disk, fd: int) -> None:
        owner = json.dumps({"uid": self.uid, "id": self.config_id}).encode()
        replace_file(disk, fd, OWNER_NAME, owner)

    def unlink(self, stem: str) -> None:
        """Delete both files of an entry, the map first (blocking).

        The map first: data without a map is nothing, a map without its data would vouch for
        whatever gets that name.
        """
        try:
            directory, disk = self.directory(), self.root.disk
        except FileNotFoundError:
            return  # nothing of this configuration is on the disk
        disk.unlink(f"{stem}.map", dir_fd=directory)
        disk.unlink(f"{stem}.data", dir_fd=directory)

    def remove_directory(self) -> None:
        """Remove the folder, which holds no blob any more (blocking)."""
        self.close()
        disk, layout = self.root.disk, self.root.layout_fd
        fd = disk.open(self.name, READ_DIRECTORY, dir_fd=layout)
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


def replace_file(disk: Disk, dir_fd: int, name: str, data: bytes) -> None:
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
