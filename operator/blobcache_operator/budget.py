"""
When a status is worth a write, and how many writes the cluster gets.

Pure but for the bucket's clock, which is passed in.
"""

import enum
from collections.abc import Iterable

from blobcache_api.v1alpha1.common import Condition
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_api.v1alpha1.node import BlobCacheNodeStatus

WRITES_PER_SECOND = 5.0
WRITES_BURST = 5.0
CONFIG_COUNTERS_SECONDS = 300.0
NODE_COUNTERS_SECONDS = 600.0
BYTES_STEP_PERCENT = 5
WARM_STEP_PERCENT = 10


class Urgency(enum.IntEnum):
    """Why a status should be written; lower goes first."""

    CONDITIONS = 0
    STATES = 1
    FIGURES = 2
    COUNTERS = 3
    NOTHING = 4


class WriteBucket:
    """
    A token bucket for all status writes of the cluster.

    Args:
        rate: Writes per second in the long run.
        burst: Writes at once after a quiet time.
    """

    def __init__(self, rate: float = WRITES_PER_SECOND, burst: float = WRITES_BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._time: float | None = None

    def take(self, now: float, *, spare: float = 0.0) -> float:
        """
        Take one token; return 0, or the seconds until there is one (then none was taken).

        Args:
            now: Seconds of a clock that does not jump.
            spare: Tokens that must be left for those who matter more.
        """
        if self._time is not None:
            elapsed = max(0.0, now - self._time)
            self._tokens = min(self._burst, self._tokens + elapsed * self._rate)
        self._time = now
        if self._tokens >= 1.0 + spare:
            self._tokens -= 1.0
            return 0.0
        return (1.0 + spare - self._tokens) / self._rate


def config_urgency(
    written: BlobCacheConfigStatus | None, wanted: BlobCacheConfigStatus, *, age_seconds: float
) -> Urgency:
    """Return how much the difference between two statuses of a config matters."""
    if written == wanted:
        return Urgency.NOTHING
    if (
        written is None
        or written.observed_generation != wanted.observed_generation
        or _spoken(written.conditions) != _spoken(wanted.conditions)
    ):
        return Urgency.CONDITIONS
    if written.nodes != wanted.nodes or (written.prefetch is None) != (wanted.prefetch is None):
        return Urgency.STATES
    percents = [
        status.prefetch.percent if status.prefetch else None for status in (written, wanted)
    ]
    if _warm_step(percents[0]) != _warm_step(percents[1]):
        return Urgency.FIGURES
    usage = [status.usage.bytes if status.usage else 0 for status in (written, wanted)]
    if _differs_by_step(*usage):
        return Urgency.FIGURES
    if written.eviction and wanted.eviction and written.eviction.plan != wanted.eviction.plan:
        return Urgency.FIGURES
    return Urgency.COUNTERS if age_seconds >= CONFIG_COUNTERS_SECONDS else Urgency.NOTHING


def node_urgency(
    written: BlobCacheNodeStatus | None, wanted: BlobCacheNodeStatus, *, age_seconds: float
) -> Urgency:
    """Return how much the difference between two statuses of a node matters."""
    if written == wanted:
        return Urgency.NOTHING
    if written is None or _spoken(written.conditions) != _spoken(wanted.conditions):
        return Urgency.CONDITIONS
    if (written.agent_version, written.start_time) != (wanted.agent_version, wanted.start_time):
        return Urgency.STATES
    before = {config.uid: config for config in written.configs}
    after = {config.uid: config for config in wanted.configs}
    if before.keys() != after.keys():
        return Urgency.STATES
    urgency = Urgency.NOTHING
    for uid, config in after.items():
        old = before[uid]
        if (old.applied_digest, old.state, old.reason) != (
            config.applied_digest,
            config.state,
            config.reason,
        ):
            return Urgency.STATES
        if _differs_by_step(old.bytes, config.bytes) or (
            _warm_step(old.warm_percent) != _warm_step(config.warm_percent)
        ):
            urgency = Urgency.FIGURES
    if urgency is Urgency.NOTHING and age_seconds >= NODE_COUNTERS_SECONDS:
        return Urgency.COUNTERS
    return urgency


def _spoken(conditions: Iterable[Condition]) -> list[tuple[object, ...]]:
    """Return what of conditions a reader waits for; messages are written so as not to flicker."""
    return sorted(
        (item.type, item.status, item.reason, item.message, item.observed_generation)
        for item in conditions
    )


def _warm_step(percent: int | None) -> int | None:
    return None if percent is None else percent // WARM_STEP_PERCENT


def _differs_by_step(before: int, after: int) -> bool:
    largest = max(before, after)
    return abs(before - after) * 100 >= largest * BYTES_STEP_PERCENT if largest else False
