"""Engines with one defence taken out: a suite that does not catch these catches nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from blobcache_storage.cache import generation as generation_module
from blobcache_storage.cache.chunk_map import encode_slots, slot_offset
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.flush import Writer
from blobcache_storage.cache.generation import ChunkState, Generation


def record_before_sync() -> None:
    """Write a chunk's slot before its data is synced, as Nydus does."""

    def wrong_order(self: Writer, records: list[tuple[int, array[int]]]) -> None:
        generation, disk = self._generation, self._runtime.disk
        for first, slots in records:
            disk.write_all(generation.files.map_fd, [encode_slots(slots)], slot_offset(first))
        disk.sync_data(generation.files.data_fd)

    Writer._sync_blocking = wrong_order  # type: ignore[method-assign]


def sync_dropped() -> None:
    """Report every sync as done, without doing it."""
    Disk.sync_data = lambda self, fd: None  # type: ignore[method-assign]
    Disk.sync = lambda self, fd: None  # type: ignore[method-assign]


def verification_off() -> None:
    """Trust what a map says; never look at checksums of data again."""
    take_loaded = Generation.take_loaded

    def trusting(self: Generation, loaded: Any) -> None:
        take_loaded(self, loaded)
        self.states = bytearray(
            ChunkState.VERIFIED if state == ChunkState.DURABLE else state for state in self.states
        )

    Generation.take_loaded = trusting  # type: ignore[method-assign]
    generation_module.slot_crc = (  # type: ignore[assignment]
        lambda generation, index, slot: slot & 0xFFFFFFFF if slot else None
    )


MUTATIONS: dict[str, Callable[[], None]] = {
    "record-before-sync": record_before_sync,
    "sync-dropped": sync_dropped,
    "verification-off": verification_off,
}
"""Each changes this whole process, so call it in one of its own."""
