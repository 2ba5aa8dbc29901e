"""Bytes of configurations that are gone: the first to go, kept a day in case they return."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blobcache_storage.cache.base import EvictionOutcome, EvictionResult, Victim
from blobcache_storage.cache.disk import cache_error
from blobcache_storage.cache.index import CatalogEntry
from blobcache_storage.cache.table import version_name

if TYPE_CHECKING:
    from blobcache_storage.cache.folder import Folder
    from blobcache_storage.cache.root import CacheRoot

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrphanBlob:
    """One cached blob that no configuration claims."""

    config_uid: str
    blob_id: str
    version: str
    bytes: int
    last_read_time: float


def list_orphans(root: CacheRoot) -> list[OrphanBlob]:
    """Return all orphans of a root."""
    return [
        OrphanBlob(
            folder.uid, entry.blob_id, version_name(entry), entry.bytes, entry.last_read_time
        )
        for folder in root.folders.values()
        if not folder.claimed
        for entry in folder.entries.values()
    ]


async def evict_victims(
    root: CacheRoot, uid: str, victims: Sequence[Victim]
) -> list[EvictionResult]:
    """Delete orphans of one configuration that somebody else decided on."""
    results = []
    for victim in victims:
        outcome, freed = EvictionOutcome.UNKNOWN, 0
        for folder in list(root.folders.values()):
            entry = folder.entries.get(victim.blob_id)
            if folder.uid != uid or folder.claimed or entry is None:
                continue
            if version_name(entry) != victim.version:
                outcome = EvictionOutcome.CHANGED
            elif entry.last_read_time >= victim.last_read_before:
                outcome = EvictionOutcome.IN_USE
            else:
                outcome, freed = EvictionOutcome.EVICTED, await _delete(folder, entry)
                break
        results.append(EvictionResult(victim.blob_id, outcome, freed))
    return results


async def evict_for(root: CacheRoot, length: int) -> None:
    """Delete orphans, coldest first, until `length` bytes have room."""
    orphans = [
        (entry.last_read_time, entry.blob_id, folder, entry)
        for folder in root.folders.values()
        if not folder.claimed
        for entry in folder.entries.values()
    ]
    for _, _, folder, entry in sorted(orphans, key=lambda orphan: orphan[:2]):
        if root.budget.has_room(length):
            return
        if not folder.claimed and folder.entries.get(entry.blob_id) is entry:
            await _delete(folder, entry)


async def delete_folder(root: CacheRoot, folder: Folder) -> None:
    """Delete all that an unclaimed folder holds, and the folder."""
    for entry in list(folder.entries.values()):
        if folder.claimed:
            return  # its configuration came back meanwhile
        await _delete(folder, entry)
    await delete_rest(folder)
    if folder.claimed or folder.entries or folder.undeleted:
        return
    # Out of the table first: an adoption from now on makes a new folder object, and its
    # `directory` the directory anew.
    root.folders.pop(folder.name, None)
    try:
        await root.runtime.flusher.run(folder.remove_directory)
    except OSError as error:
        # Somebody else's file is in it: what was ours is gone, and the folder may stay.
        _log.warning("Could not remove a folder", extra={"error": str(cache_error(error))})


async def delete_rest(folder: Folder) -> None:
    """Try again to delete what could not be deleted, and give back its bytes."""
    for stem in list(folder.undeleted):
        try:
            await folder.root.runtime.flusher.run(lambda stem=stem: folder.unlink(stem))  # type: ignore[misc]
        except OSError:
            continue  # told when it failed first
        folder.budget.give_back(folder.undeleted.pop(stem, 0))


async def _delete(folder: Folder, entry: CatalogEntry) -> int:
    """Delete one orphan: out of the table first, so that nobody adopts what is going."""
    del folder.entries[entry.blob_id]
    try:
        await folder.root.runtime.flusher.run(lambda: folder.unlink(entry.stem))
    except OSError as error:
        # It still takes its room; the next look at the root tries again.
        folder.entries.setdefault(entry.blob_id, entry)
        _log.warning("Could not delete an orphan", extra={"error": str(cache_error(error))})
        return 0
    freed, entry.bytes = entry.bytes, 0
    folder.budget.give_back(freed)
    return freed
