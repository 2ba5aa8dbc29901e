"""The eviction planner: what should go, decided by pure arithmetic.

Agents use it to keep hard limits, the operator to plan from reports; so it imports nothing but the
standard library and knows neither files nor objects. The rules, in order:

1. Untouchable: in use, read within `recent_seconds`, or protected. Protected are the pinned blobs
   and then the wanted ones, in list order, as far as they fit `protected_bytes` together.
2. `TTLExpired`: not read for `ttl_seconds`, however much room there is.
3. `Orphan`: bytes whose configuration is gone, while `target_bytes` is exceeded.
4. `Capacity`: least recently read first, while `target_bytes` is exceeded; not with policy `None`.

Nydus has nothing like it: its gc closes files and never deletes data.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

POLICY_LRU = "LRU"
POLICY_NONE = "None"


class EvictionReason(enum.StrEnum):
    """Why a blob goes; the value is what status, events and metrics say."""

    TTL_EXPIRED = "TTLExpired"
    ORPHAN = "Orphan"
    CAPACITY = "Capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One cached version of a blob on one node."""

    config_uid: str
    blob_id: str
    version: str
    """Opaque name of the cached version; the eviction names it back."""
    bytes: int
    """What deleting it frees on disk, >= 0."""
    last_read_time: float
    """Unix seconds."""
    node: str = ""
    """Where it lies; "" where there is only one node in question."""
    in_use: bool = False
    pinned: bool = False
    wanted: bool = False
    """On the prefetch list."""
    wanted_rank: int | None = None
    """Place in the prefetch (or pin) list, 0 first; None comes after every place."""
    orphan: bool = False
    """Its configuration is gone or points elsewhere; pinned and wanted mean nothing then."""
    complete: bool = True
    """Whether all chunks are there; of two equally old blobs the incomplete one goes first."""


@dataclass(frozen=True, slots=True)
class PlannedEviction:
    """A blob to evict, and why."""

    candidate: Candidate
    reason: EvictionReason


def plan_eviction(
    blobs: Sequence[Candidate],
    *,
    used_bytes: int,
    target_bytes: int,
    now: float,
    ttl_seconds: int | None,
    policy: str,
    recent_seconds: float,
    protected_bytes: int,
) -> list[PlannedEviction]:
    """Return what to evict, in the order in which to do so.

    The result does not depend on the order of `blobs`, and planning again after the plan was
    carried out yields nothing. The target may stay out of reach: then all that may go is listed.

    Args:
        blobs: Every cached blob of the scope (a configuration, or a node).
        used_bytes: What the scope uses now; may exceed the sum over `blobs`.
        target_bytes: Evict until at most this is used (the low watermark, in bytes). Callers
            who are below their high watermark pass `used_bytes` to get expired blobs only.
        now: Unix seconds.
        ttl_seconds: Blobs not read for so long go in any case; None = blobs do not expire.
        policy: `LRU`, or `None`: only orphans and expired blobs go.
        recent_seconds: Blobs read within so many seconds stay.
        protected_bytes: How much of pinned and wanted blobs is protected (the low watermark).

    Raises:
        ValueError: The policy is neither.
    """
    if policy not in (POLICY_LRU, POLICY_NONE):
        raise ValueError(f"the eviction policy must be 'LRU' or 'None', not '{policy}'")
    protected = _protected(blobs, protected_bytes)
    free_to_go = sorted(
        (
            blob
            for index, blob in enumerate(blobs)
            if index not in protected
            and not blob.in_use
            and not _is_recent(blob, now, recent_seconds)
        ),
        key=_coldest_first,
    )
    plan: list[PlannedEviction] = []
    staying: list[Candidate] = []
    for blob in free_to_go:
        if ttl_seconds is not None and now - blob.last_read_time >= ttl_seconds:
            plan.append(PlannedEviction(blob, EvictionReason.TTL_EXPIRED))
        else:
            staying.append(blob)
    excess = used_bytes - target_bytes - sum(planned.candidate.bytes for planned in plan)
    for planned in _by_need(staying, lru=policy == POLICY_LRU):
        if excess <= 0:
            break
        plan.append(planned)
        excess -= planned.candidate.bytes
    return plan


def _by_need(blobs: Sequence[Candidate], *, lru: bool) -> Iterable[PlannedEviction]:
    """Yield, coldest first, orphans and then what the policy gives; only what frees bytes."""
    for blob in blobs:
        if blob.orphan and blob.bytes > 0:
            yield PlannedEviction(blob, EvictionReason.ORPHAN)
    if lru:
        for blob in blobs:
            if not blob.orphan and blob.bytes > 0:
                yield PlannedEviction(blob, EvictionReason.CAPACITY)


def _protected(blobs: Sequence[Candidate], protected_bytes: int) -> set[int]:
    """Return the indexes of protected blobs.

    A blob that does not fit is passed over, not the end of the list: one huge entry must not
    expose all that follow, and evicting what was passed over must not change who is protected.
    """
    ranked = sorted(
        (
            index
            for index, blob in enumerate(blobs)
            if (blob.pinned or blob.wanted) and not blob.orphan
        ),
        key=lambda index: _list_order(blobs[index]),
    )
    protected: set[int] = set()
    room = protected_bytes
    for index in ranked:
        if blobs[index].bytes <= room:
            protected.add(index)
            room -= blobs[index].bytes
    return protected


def _is_recent(blob: Candidate, now: float, recent_seconds: float) -> bool:
    """Whether the blob was just read.

    A read far in the future is a clock that was set back: were it recent, the blob could not be
    evicted until the clock has caught up, and the disk might fill meanwhile.
    """
    return abs(now - blob.last_read_time) < recent_seconds


def _list_order(blob: Candidate) -> tuple[bool, bool, int, tuple[str, str, str, str]]:
    rank = blob.wanted_rank
    return (not blob.pinned, rank is None, rank if rank is not None else 0, _identity(blob))


def _coldest_first(blob: Candidate) -> tuple[float, bool, int, tuple[str, str, str, str]]:
    return (blob.last_read_time, blob.complete, -blob.bytes, _identity(blob))


def _identity(blob: Candidate) -> tuple[str, str, str, str]:
    """Break ties alike on every node and in every process."""
    return (blob.config_uid, blob.blob_id, blob.version, blob.node)
