"""
Counters that do not go backwards, made of counters that restart with every agent.

Per config and node the last reading is kept. When an agent restarts, its old reading is carried
over. A node that no longer counts keeps its reading for a while: it may come back with counters
that went on, which must not be counted again. When a leadership begins, what its predecessor wrote
is the floor: the difference to what agents say now is carried, with the time it counts from.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from blobcache_api.v1alpha1.common import INT64_MAX
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_operator.snapshot import AgentFacts, ConfigFigures

FIELDS = (
    "requests",
    "hit_bytes",
    "miss_bytes",
    "origin_bytes",
    "origin_errors",
    "evicted_blobs",
    "evicted_bytes",
)

Figures = tuple[int, ...]
_ZERO: Figures = (0,) * len(FIELDS)
# Nodes come and go for as long as a leadership lasts; of those that went, so many are remembered.
DEPARTED_MAX = 256


@dataclass(frozen=True, slots=True)
class Totals:
    """One config's counters over its nodes; in the order of `FIELDS`."""

    since: datetime.datetime
    figures: Figures

    def __getitem__(self, name: str) -> int:
        return self.figures[FIELDS.index(name)]


@dataclass(slots=True)
class _Account:
    carried: Figures = _ZERO
    since: datetime.datetime | None = None
    readings: dict[str, tuple[str, Figures]] = field(default_factory=dict)
    floor: Figures | None = None


class TrafficLedger:
    """Keeps the accounts of one leadership."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def update(
        self,
        uid: str,
        selected: tuple[str, ...],
        agents: Mapping[str, AgentFacts],
        status: BlobCacheConfigStatus | None,
        now: datetime.datetime,
    ) -> Totals:
        """
        Take in the latest reports and return a config's totals.

        Args:
            uid: The config's.
            selected: Its nodes.
            agents: What they say.
            status: What is written; used the first time only.
            now: For a config nobody ever counted.
        """
        account = self._accounts.get(uid)
        if account is None:
            account = self._accounts[uid] = _open_account(status)
        for node in selected:
            report = agents[node].report
            figures = report.configs.get(uid) if report else None
            if report is not None and figures is not None:
                _read(account, node, report.incarnation, _figures(figures))
                start = report.start_time
                account.since = min(account.since or start, start)
        _settle_departed(account, set(selected))
        current = account.carried
        for _, reading in account.readings.values():
            current = _add(current, reading)
        is_complete = all(agents[node].is_asked for node in selected)
        if account.floor is not None:
            missing = tuple(
                max(0, floor - value) for floor, value in zip(account.floor, current, strict=True)
            )
            current = _add(current, missing)
            if is_complete:
                # From now on the difference is history: new readings count on top of it.
                account.carried = _add(account.carried, missing)
                account.floor = None
        return Totals(account.since or now, current)

    def forget_all_but(self, uids: set[str]) -> None:
        """Close the accounts of configs that are gone."""
        for uid in self._accounts.keys() - uids:
            del self._accounts[uid]


def _open_account(status: BlobCacheConfigStatus | None) -> _Account:
    if status is None or status.traffic is None:
        return _Account()
    traffic, eviction = status.traffic, status.eviction
    floor = (
        traffic.requests,
        traffic.hit_bytes,
        traffic.miss_bytes,
        traffic.origin_bytes,
        traffic.origin_errors,
        eviction.evicted_blobs if eviction else 0,
        eviction.evicted_bytes if eviction else 0,
    )
    return _Account(since=traffic.since, floor=floor)


def _read(account: _Account, node: str, incarnation: str, figures: Figures) -> None:
    before = account.readings.get(node)
    if before is not None:
        last_incarnation, last = before
        fell = any(new < old for new, old in zip(figures, last, strict=True))
        if last_incarnation != incarnation or fell:
            account.carried = _add(account.carried, last)
        del account.readings[node]  # the latest reading goes last
    account.readings[node] = (incarnation, figures)


def _settle_departed(account: _Account, selected: set[str]) -> None:
    """Carry over the readings of the nodes that have been gone for longest."""
    departed = [node for node in account.readings if node not in selected]
    for node in departed[: max(0, len(departed) - DEPARTED_MAX)]:
        _, last = account.readings.pop(node)
        account.carried = _add(account.carried, last)


def _figures(config: ConfigFigures) -> Figures:
    return tuple(getattr(config, name) for name in FIELDS)


def _add(left: Figures, right: Figures) -> Figures:
    # An agent may claim anything; what cannot be written shall not stop what can.
    return tuple(min(a + b, INT64_MAX) for a, b in zip(left, right, strict=True))
