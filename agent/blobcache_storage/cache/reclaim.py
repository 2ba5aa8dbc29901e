"""Making room: the hard limits an agent keeps by itself, with the operator's own planner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blobcache_storage.cache.base import EvictionOutcome, EvictionResult, Victim
from blobcache_storage.cache.fill import Counters
from blobcache_storage.cache.index import CatalogEntry
from blobcache_storage.cache.table import BlobTable, version_name
from blobcache_storage.eviction import POLICY_LRU, Candidate, plan_eviction

if TYPE_CHECKING:
    from blobcache_storage.cache.root import CacheRoot
    from blobcache_storage.config import CacheConfig

RECENT_SECONDS = 0.0
"""The hard limits hold at once: what is idle may go however lately it was read."""

FUTILE_SECONDS = 1.0
"""After nothing more could be evicted, room is not looked for again for so long."""


def watermark_bytes(capacity_bytes: int, percent: int) -> int:
    """Return a watermark in bytes."""
    return capacity_bytes * percent // 100


class Reclaimer:
    """Evicts blobs of one configuration; belongs to the event loop."""

    def __init__(
        self, root: CacheRoot, table: BlobTable, counters: Counters, cache: CacheConfig
    ) -> None:
        self._root = root
        self._table = table
        self._counters = counters
        self.cache = cache
        self._futile_until = 0.0
        self._working: asyncio.Task[None] | None = None

    def candidates(self) -> list[Candidate]:
        """Return every cached blob as the planner sees it."""
        table, cache = self._table, self.cache
        ranks = {blob.id: rank for rank, blob in enumerate(cache.prefetch.blobs)}
        return [
            Candidate(
                config_uid=table.folder.uid,
                blob_id=entry.blob_id,
                version=version_name(entry),
                bytes=entry.bytes,
                last_read_time=entry.last_read_time,
                in_use=table.is_in_use(entry),
                pinned=entry.blob_id in cache.pinned,
                wanted=entry.blob_id in ranks,
                wanted_rank=ranks.get(entry.blob_id),
                complete=entry.complete,
            )
            for entry in table.folder.entries.values()
        ]

    def protected_bytes(self) -> int:
        """Return how much of pinned and wanted blobs is protected: the low watermark."""
        capacity = self.cache.capacity_bytes or self._root.budget.capacity_bytes
        if capacity is None:
            return self._table.folder.budget.used_bytes
        return watermark_bytes(capacity, self.cache.low_watermark_percent)

    async def make_room(self, length: int) -> None:
        """Evict what has to go for `length` more bytes; callers see by reserving if it did.

        One at a time: those who come meanwhile wait for it and reserve then. It goes on when they
        give up, or what was half evicted would stay counted.
        """
        if self._root.runtime.clock.monotonic() < self._futile_until:
            return
        if self._working is None:
            self._working = self._table.spawn(self._make_room(length))
        working = self._working
        await asyncio.wait([working])
        working.result()

    async def _make_room(self, length: int) -> None:
        try:
            budget, capacity = self._table.folder.budget, self.cache.capacity_bytes
            if capacity is not None and not budget.fits(length):
                low = watermark_bytes(capacity, self.cache.low_watermark_percent)
                await self._evict_down_to(min(low, capacity - length))
            if not self._root.budget.has_room(length):
                await self._root.make_room(length)
            if not (budget.fits(length) and self._root.budget.has_room(length)):
                # All there is is in use or protected: do not plan anew for every reader.
                self._futile_until = self._root.runtime.clock.monotonic() + FUTILE_SECONDS
        finally:
            self._working = None

    async def evict_expired(self) -> None:
        """Evict what was not read for the configuration's TTL."""
        if self.cache.ttl_seconds is not None:
            await self._evict_down_to(self._table.folder.budget.used_bytes)

    async def _evict_down_to(self, target_bytes: int) -> None:
        plan = plan_eviction(
            self.candidates(),
            used_bytes=self._table.folder.budget.used_bytes,
            target_bytes=target_bytes,
            now=self._root.runtime.clock.time(),
            ttl_seconds=self.cache.ttl_seconds,
            policy=self.cache.eviction_policy,
            recent_seconds=RECENT_SECONDS,
            protected_bytes=self.protected_bytes(),
        )
        for planned in plan:
            await self.evict_candidate(planned.candidate)

    async def evict_candidate(self, candidate: Candidate) -> int:
        """Evict what the planner chose, unless it was read or replaced since; returns bytes."""
        entry = self._table.folder.entries.get(candidate.blob_id)
        if entry is None or version_name(entry) != candidate.version:
            return 0
        if self._table.is_in_use(entry) or entry.last_read_time > candidate.last_read_time:
            return 0
        return await self._evict(entry)

    async def _evict(self, entry: CatalogEntry) -> int:
        freed = await self._table.remove(entry)
        self._counters.evicted_blobs += freed > 0
        self._counters.evicted_bytes += freed
        return freed

    async def evict(self, victims: Sequence[Victim]) -> list[EvictionResult]:
        """Evict what somebody else decided on; see `BlobCacheMgr.evict`."""
        results = []
        for victim in victims:
            outcome, freed = await self._evict_victim(victim)
            results.append(EvictionResult(victim.blob_id, outcome, freed))
        return results

    async def _evict_victim(self, victim: Victim) -> tuple[EvictionOutcome, int]:
        entry = self._table.folder.entries.get(victim.blob_id)
        if entry is None:
            return EvictionOutcome.UNKNOWN, 0
        if version_name(entry) != victim.version:
            return EvictionOutcome.CHANGED, 0
        if victim.blob_id in self.cache.pinned:
            return EvictionOutcome.PINNED, 0
        if self._table.is_in_use(entry) or entry.last_read_time >= victim.last_read_before:
            return EvictionOutcome.IN_USE, 0
        return EvictionOutcome.EVICTED, await self._evict(entry)


async def make_room_in_root(root: CacheRoot, members: Sequence[Reclaimer], length: int) -> None:
    """Evict from all configurations of a root, coldest first, until `length` bytes have room.

    Orphans went before. Each configuration's pinned and wanted blobs are protected as its own
    low watermark says.
    """
    owners: dict[str, Reclaimer] = {}
    candidates: list[Candidate] = []
    for member in members:
        if member.cache.eviction_policy != POLICY_LRU:
            continue
        own = member.candidates()
        used = sum(candidate.bytes for candidate in own)
        plan = plan_eviction(
            own,
            used_bytes=used,
            target_bytes=0,
            now=root.runtime.clock.time(),
            ttl_seconds=None,
            policy=POLICY_LRU,
            recent_seconds=RECENT_SECONDS,
            protected_bytes=member.protected_bytes(),
        )
        for planned in plan:
            candidates.append(planned.candidate)
            owners[planned.candidate.config_uid] = member
    for candidate in sorted(candidates, key=lambda c: (c.last_read_time, c.blob_id)):
        if root.budget.has_room(length):
            return
        await owners[candidate.config_uid].evict_candidate(candidate)
