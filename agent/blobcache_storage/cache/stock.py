"""Taking stock of a cache root at start: what is there, whose it is, and what has no use.

Blocking, before anything else uses the root. Opens nothing the index speaks for.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from blobcache_storage.cache.budget import on_disk
from blobcache_storage.cache.chunk_map import (
    HEADER_SIZE_BYTES,
    SLOT_SIZE_BYTES,
    decode_header,
    decode_slots,
)
from blobcache_storage.cache.disk import Disk, FileFacts
from blobcache_storage.cache.folder import OWNER_NAME, READ_DIRECTORY, Folder
from blobcache_storage.cache.index import (
    INDEX_BYTES_MAX,
    INDEX_NAME,
    CatalogEntry,
    IndexedFolder,
    decode_index,
)

if TYPE_CHECKING:
    from blobcache_storage.cache.root import CacheRoot

OWNER_BYTES_MAX = 4096

_FOLDER = re.compile(r"[0-9a-f]{32}")
_BLOB_FILE = re.compile(r"([0-9a-f]{32}-[0-9a-f]{16})\.(data|map)")


def take_stock(root: CacheRoot) -> None:
    """Fill `root.folders` from what is on disk."""
    disk, now = root.disk, root.runtime.clock.time()
    root.budget.observe_free(disk.free_space(root.layout_fd).free_bytes)
    data = _read_file(disk, root.layout_fd, INDEX_NAME, INDEX_BYTES_MAX)
    indexed = decode_index(data) if data is not None else {}
    for facts in disk.list(root.layout_fd):
        if facts.name.endswith(".tmp"):
            disk.unlink(facts.name, dir_fd=root.layout_fd)
        elif facts.is_directory and _FOLDER.fullmatch(facts.name):
            known = indexed.get(facts.name, IndexedFolder())
            root.folders[facts.name] = _take_stock_of(root, facts.name, known, now)


def _take_stock_of(root: CacheRoot, name: str, known: IndexedFolder, now: float) -> Folder:
    """List one folder: pair its files, remove what has no partner."""
    disk = root.disk
    fd = disk.open(name, READ_DIRECTORY, dir_fd=root.layout_fd)
    try:
        files = disk.list(fd)
        folder = Folder(root, _read_owner(disk, fd), name)
        folder.orphaned_time = known.orphaned_time or now
        remembered = {blob.stem: blob for blob in known.blobs}
        for stem, (data, map_facts) in _pair(disk, fd, files).items():
            entry = remembered.get(stem) or _read_entry(disk, fd, map_facts)
            if entry is None or not _keep(disk, folder, entry, fd):
                _unlink_pair(disk, fd, stem)
                continue
            # Delayed allocation may show fewer blocks; loading the map sets it right.
            entry.bytes = data.allocated_bytes + on_disk(map_facts.size_bytes)
    finally:
        disk.close(fd)
    folder.budget.adopt(sum(entry.bytes for entry in folder.entries.values()))
    return folder


def _keep(disk: Disk, folder: Folder, entry: CatalogEntry, fd: int) -> bool:
    """Enter one version of a blob: of two left by a crash the younger stays."""
    rival = folder.entries.get(entry.blob_id)
    if rival is not None:
        if rival.created_ns >= entry.created_ns:
            return False
        _unlink_pair(disk, fd, rival.stem)
    folder.entries[entry.blob_id] = entry
    return True


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
        # Not waiting for a writer, should it be a pipe.
        fd = disk.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        return disk.read(fd, bytes_max, 0)
    except OSError:
        return None
    finally:
        disk.close(fd)
