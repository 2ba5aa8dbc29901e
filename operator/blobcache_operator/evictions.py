"""
Eviction decisions from one agent's report: which of its coldest blobs should go, and why.

Pure, built on the planner the agents use for their hard limits. The operator decides earlier than
they must: above a high watermark, down to the low one, and what has outlived its time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blobcache_api.agent import VICTIMS_MAX, Candidate, EvictionRequest, Report, Victim
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec, EvictionPolicy
from blobcache_storage import eviction as planner

# A reader of many ranges is between two of them no longer than this.
RECENT_SECONDS = 15.0
NODE_HIGH_WATERMARK_PERCENT = 90
NODE_LOW_WATERMARK_PERCENT = 80


@dataclass(frozen=True, slots=True)
class Decision:
    """One blob to evict."""

    candidate: Candidate
    reason: str


def decide(
    report: Report, specs: Mapping[str, BlobCacheConfigSpec], *, now: float
) -> tuple[Decision, ...]:
    """
    Return what should go from a node, at most as many as one request takes.

    Args:
        report: The agent's, with its candidates.
        specs: The specs of the configs the node should run, by uid.
        now: Unix seconds.
    """
    usage = {config.uid: config.bytes for config in report.configs}
    chosen: dict[tuple[str, str, str], Decision] = {}
    for uid, spec in sorted(specs.items()):
        own = [item for item in report.candidates if item.config_uid == uid and not item.orphan]
        _add(chosen, own, _plan_config(own, spec, usage.get(uid, 0), now))
    everything = [
        item
        for item in report.candidates
        if item.orphan or _is_evictable(specs.get(item.config_uid))
    ]
    _add(chosen, everything, _plan_node(everything, report, chosen, now))
    return tuple(chosen.values())[:VICTIMS_MAX]


def is_pressed(report: Report, specs: Mapping[str, BlobCacheConfigSpec]) -> bool:
    """Whether the node or one of its configs is above its high watermark, evictable or not."""
    for config in report.configs:
        spec = specs.get(config.uid)
        if spec is not None and _is_above_high(spec, config.bytes):
            return True
    return _is_node_above_high(report, report.disk.used_bytes)


def make_request(decisions: Sequence[Decision]) -> EvictionRequest:
    """Return the request: a blob that was read since it was judged is spared."""
    return EvictionRequest(
        victims=tuple(
            Victim(
                config_uid=decision.candidate.config_uid,
                blob_id=decision.candidate.blob_id,
                blob_version=decision.candidate.blob_version,
                # Read times have fractions and may be rounded on the way; a second of slack only
                # ever spares a blob that was read within it.
                last_read_before=decision.candidate.last_read_time + 1.0,
                reason=decision.reason,
            )
            for decision in decisions
        )
    )


def _is_evictable(spec: BlobCacheConfigSpec | None) -> bool:
    return spec is not None and spec.eviction.policy is EvictionPolicy.LRU


def _plan_config(
    blobs: Sequence[Candidate], spec: BlobCacheConfigSpec, used_bytes: int, now: float
) -> list[planner.PlannedEviction]:
    target = used_bytes  # below the high watermark only what has outlived its time goes
    protected = used_bytes
    if spec.cache.capacity is not None:
        protected = spec.cache.capacity * spec.eviction.low_watermark_percent // 100
        if _is_above_high(spec, used_bytes):
            target = protected
    return planner.plan_eviction(
        [_planner_candidate(blob, spec) for blob in blobs],
        used_bytes=used_bytes,
        target_bytes=target,
        now=now,
        ttl_seconds=spec.cache.ttl_seconds,
        policy=spec.eviction.policy.value,
        recent_seconds=RECENT_SECONDS,
        protected_bytes=protected,
    )


def _plan_node(
    blobs: Sequence[Candidate],
    report: Report,
    chosen: Mapping[tuple[str, str, str], Decision],
    now: float,
) -> list[planner.PlannedEviction]:
    freed = sum(decision.candidate.bytes for decision in chosen.values())
    used = max(report.disk.used_bytes - freed, 0)
    if not _is_node_above_high(report, used):
        return []
    target = _node_capacity(report) * NODE_LOW_WATERMARK_PERCENT // 100
    left = [blob for blob in blobs if _identity(blob) not in chosen]
    return planner.plan_eviction(
        [_planner_candidate(blob, None) for blob in left],
        used_bytes=used,
        target_bytes=target,
        now=now,
        ttl_seconds=None,
        policy=planner.POLICY_LRU,
        recent_seconds=RECENT_SECONDS,
        protected_bytes=target,
    )


def _is_above_high(spec: BlobCacheConfigSpec, used_bytes: int) -> bool:
    capacity = spec.cache.capacity
    high = spec.eviction.high_watermark_percent
    return capacity is not None and used_bytes * 100 > capacity * high


def _is_node_above_high(report: Report, used_bytes: int) -> bool:
    return used_bytes * 100 > _node_capacity(report) * NODE_HIGH_WATERMARK_PERCENT


def _node_capacity(report: Report) -> int:
    disk = report.disk
    return disk.capacity_bytes or max(disk.total_bytes - disk.min_free_bytes, 0)


def _planner_candidate(blob: Candidate, spec: BlobCacheConfigSpec | None) -> planner.Candidate:
    return planner.Candidate(
        config_uid=blob.config_uid,
        blob_id=blob.blob_id,
        version=blob.blob_version,
        bytes=blob.bytes,
        last_read_time=blob.last_read_time,
        in_use=blob.in_use,
        pinned=blob.pinned,
        wanted=blob.wanted,
        wanted_rank=_rank(blob, spec),
        orphan=blob.orphan,
    )


def _rank(blob: Candidate, spec: BlobCacheConfigSpec | None) -> int | None:
    """Return the blob's place in its list, for protection goes in list order."""
    if spec is None or not (blob.pinned or blob.wanted):
        return None
    listed = spec.eviction.pinned if blob.pinned else ()
    if not blob.pinned and spec.prefetch is not None:
        listed = tuple(item.id for item in spec.prefetch.blobs)
    return listed.index(blob.blob_id) if blob.blob_id in listed else None


def _add(
    chosen: dict[tuple[str, str, str], Decision],
    blobs: Sequence[Candidate],
    planned: Sequence[planner.PlannedEviction],
) -> None:
    by_identity = {_identity(blob): blob for blob in blobs}
    for item in planned:
        identity = (item.candidate.config_uid, item.candidate.blob_id, item.candidate.version)
        chosen.setdefault(identity, Decision(by_identity[identity], item.reason.value))


def _identity(blob: Candidate) -> tuple[str, str, str]:
    return (blob.config_uid, blob.blob_id, blob.blob_version)
