"""What the operator's eviction decisions did, config by config, in this leadership."""

import datetime
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from blobcache_api.agent import EvictionOutcome, EvictionResponse
from blobcache_api.quantity import format_quantity
from blobcache_api.v1alpha1.config import PLAN_MAX, BlobCacheConfigStatus, PlannedEviction
from blobcache_operator.evictions import Decision
from blobcache_operator.rollup import ROOM_FOR_OTHERS, EvictionNews


@dataclass(slots=True)
class _Page:
    plan: dict[str, tuple[PlannedEviction, ...]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    last_time: datetime.datetime | None = None


class EvictionBook:
    """Keeps a bounded sample of plans, and counts of what agents confirmed."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}

    def open(self, uid: str, status: BlobCacheConfigStatus | None) -> None:
        """Begin with what was written before, the first time a config is seen."""
        if uid in self._pages:
            return
        page = self._pages[uid] = _Page()
        if status is not None and status.eviction is not None:
            page.reasons.update(status.eviction.reasons)
            # That one is not counted but what remains; see the roll-up.
            page.reasons.pop(ROOM_FOR_OTHERS, None)
            page.last_time = status.eviction.last_time

    def record(
        self,
        node: str,
        decisions: Sequence[Decision],
        response: EvictionResponse | None,
        now: datetime.datetime,
    ) -> dict[str, str]:
        """
        Take in a node's plan and the agent's answer.

        Returns:
            By config uid, a sentence for an Event where something was evicted.
        """
        by_config: dict[str, list[Decision]] = defaultdict(list)
        for decision in decisions:
            by_config[decision.candidate.config_uid].append(decision)
        for uid, own in by_config.items():
            page = self._pages.get(uid)
            if page is not None:
                # The latest node's plan is shown first. Replaced, not changed: passes read it in
                # a thread of their own.
                others = [item for item in page.plan.items() if item[0] != node]
                page.plan = dict([(node, _sample(node, own)), *others][:PLAN_MAX])
        return self._count(node, decisions, response, now)

    def news(self, uid: str) -> EvictionNews:
        """Return what a config's status should say."""
        page = self._pages.get(uid)
        if page is None:
            return EvictionNews()
        plan = [planned for sample in page.plan.values() for planned in sample]
        return EvictionNews(tuple(plan[:PLAN_MAX]), dict(page.reasons), page.last_time)

    def forget_all_but(self, uids: set[str]) -> None:
        """Close the pages of configs that are gone."""
        for uid in self._pages.keys() - uids:
            del self._pages[uid]

    def _count(
        self,
        node: str,
        decisions: Sequence[Decision],
        response: EvictionResponse | None,
        now: datetime.datetime,
    ) -> dict[str, str]:
        reasons = {
            (item.candidate.config_uid, item.candidate.blob_id): item.reason for item in decisions
        }
        freed: Counter[str] = Counter()
        for result in response.results if response else ():
            page = self._pages.get(result.config_uid)
            reason = reasons.get((result.config_uid, result.blob_id))
            if page is None or reason is None or result.outcome is not EvictionOutcome.EVICTED:
                continue
            page.reasons[reason] += 1
            page.last_time = now
            freed[result.config_uid] += result.bytes
        return {
            uid: f"Evicted {format_quantity(size)} on node '{node}'. See `status.eviction`."
            for uid, size in freed.items()
        }


def _sample(node: str, decisions: Sequence[Decision]) -> tuple[PlannedEviction, ...]:
    return tuple(
        PlannedEviction(
            node=node,
            blob=decision.candidate.blob_id,
            bytes=decision.candidate.bytes,
            reason=decision.reason,
        )
        for decision in decisions[:PLAN_MAX]
    )
