"""Evictions the operator asks for: each victim is checked again by who owns it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from blobcache_agent.configs import Configs
from blobcache_agent.logs import get_logger
from blobcache_api.agent import (
    EvictionOutcome,
    EvictionRequest,
    EvictionResponse,
    EvictionResult,
    Victim,
)
from blobcache_storage.cache import base
from blobcache_storage.cache.root import CacheRoot

log = get_logger(__name__)


async def evict(request: EvictionRequest, configs: Configs, root: CacheRoot) -> EvictionResponse:
    """Evict victims of configurations in force and of orphans; results in the order asked."""
    managers = {running.uid: running.manager for running in configs if running.manager}
    by_uid: dict[str, list[int]] = defaultdict(list)
    for index, victim in enumerate(request.victims):
        by_uid[victim.config_uid].append(index)
    results: dict[int, EvictionResult] = {}
    for uid, indexes in by_uid.items():
        asked = [_to_engine(request.victims[index]) for index in indexes]
        found = await _evict_of(uid, asked, managers.get(uid), root)
        for index, result in zip(indexes, found, strict=True):
            results[index] = EvictionResult(
                config_uid=uid,
                blob_id=request.victims[index].blob_id,
                outcome=EvictionOutcome(result.outcome.value),
                bytes=result.bytes,
            )
    evicted = [item for item in results.values() if item.outcome is EvictionOutcome.EVICTED]
    log.info(
        "Evicted what the operator asked for",
        victims=len(results),
        evicted=len(evicted),
        bytes=sum(item.bytes for item in evicted),
    )
    return EvictionResponse(results=tuple(results[index] for index in range(len(request.victims))))


async def _evict_of(
    uid: str, asked: Sequence[base.Victim], manager: base.BlobCacheMgr | None, root: CacheRoot
) -> list[base.EvictionResult]:
    """Evict victims of one configuration, from its manager or from what it left behind.

    A configuration in force has orphans too, where its endpoint was changed.
    """
    if manager is None:
        return await root.evict_orphans(uid, asked)
    found = await manager.evict(asked)
    elsewhere = (base.EvictionOutcome.UNKNOWN, base.EvictionOutcome.CHANGED)
    missed = [index for index, result in enumerate(found) if result.outcome in elsewhere]
    orphaned = await root.evict_orphans(uid, [asked[index] for index in missed])
    for index, result in zip(missed, orphaned, strict=True):
        if result.outcome not in elsewhere:
            found[index] = result
    return found


def _to_engine(victim: Victim) -> base.Victim:
    return base.Victim(
        blob_id=victim.blob_id,
        version=victim.blob_version,
        last_read_before=victim.last_read_before,
        reason=victim.reason,
    )
