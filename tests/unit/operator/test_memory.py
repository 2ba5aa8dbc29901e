"""What one leadership remembers: deletions, losses, counters."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.operator.makers import NOW, START, agent, config, figures

from blobcache_api.v1alpha1.config import BlobCacheConfigStatus, TrafficStatus
from blobcache_operator.deletions import UIDS_MAX, Deletions
from blobcache_operator.guard import DropGuard, Loss
from blobcache_operator.snapshot import AgentFacts
from blobcache_operator.traffic import TrafficLedger


def test_absence_from_one_list_deletes_nothing() -> None:
    """Two LISTs so far apart must agree."""
    deletions = Deletions(60)
    deletions.observe_list({"a"}, (), 0)
    deletions.observe_list((), (), 10)
    assert deletions.confirmed(10) == deletions.confirmed(69) == frozenset()
    assert deletions.confirmed(70) == {"a"}


def test_a_watchs_word_and_one_list_suffice() -> None:
    """Two witnesses of different kinds agree at once; a word alone is not enough."""
    deletions = Deletions(60)
    deletions.observe_list({"a"}, (), 0)
    deletions.witness("a")
    assert deletions.confirmed(1) == frozenset()
    deletions.observe_list((), (), 2)
    assert deletions.confirmed(2) == {"a"}


def test_a_uid_that_is_listed_again_is_alive() -> None:
    """Whatever was said before."""
    deletions = Deletions(60)
    deletions.observe_list({"a"}, (), 0)
    deletions.witness("a")
    deletions.observe_list((), (), 10)
    deletions.observe_list({"a"}, (), 20)
    deletions.observe_list((), (), 30)
    assert deletions.confirmed(80) == frozenset()
    assert deletions.confirmed(90) == {"a"}


def test_what_only_nodes_know_is_found() -> None:
    """A config that went while nobody led is confirmed like any other."""
    deletions = Deletions(60)
    deletions.observe_list((), {"stray"}, 0)
    assert deletions.confirmed(60) == {"stray"}


def test_memory_of_deletions_is_bounded() -> None:
    """By number and by time."""
    deletions = Deletions(0)
    deletions.observe_list((), {str(number) for number in range(UIDS_MAX + 10)}, 0)
    assert len(deletions.confirmed(0)) == UIDS_MAX
    deletions.observe_list((), (), 27 * 3600)
    assert deletions.confirmed(27 * 3600) == frozenset()
    for number in range(UIDS_MAX + 10):
        deletions.witness(str(number))
    assert not deletions.is_witnessed("0")


@pytest.mark.parametrize(
    ("known", "unexplained", "suspicious"),
    [(0, 0, False), (1, 1, True), (2, 1, False), (3, 2, True), (10, 5, False), (10, 6, True)],
)
def test_more_than_half_is_suspicious(known: int, unexplained: int, suspicious: bool) -> None:
    """Exactly half is not."""
    assert Loss(known, unexplained).is_suspicious is suspicious


def test_a_suspicious_loss_must_last() -> None:
    """It starts anew when a LIST in between disagrees."""
    guard = DropGuard(60)
    assert not guard.permits("one", Loss(1, 1), 0)
    assert guard.permits("one", Loss(1, 0), 30)
    assert not guard.permits("one", Loss(1, 1), 61)
    assert guard.permits("one", Loss(1, 1), 121)


def _reading(requests: int, incarnation: str = "first", start: Any = START) -> AgentFacts:
    return agent(
        "one", figures(config("a"), requests=requests), incarnation=incarnation, start_time=start
    )


def _update(ledger: TrafficLedger, facts: AgentFacts, status: Any = None) -> int:
    uid = config("a").uid
    return ledger.update(uid, ("one",), {"one": facts}, status, NOW)["requests"]


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=30))
def test_totals_are_what_was_counted_through_all_restarts(steps: list[tuple[bool, int]]) -> None:
    """Each step adds to the running agent or restarts it; the total is the sum of all lives."""
    ledger, life, count, expected = TrafficLedger(), 0, 0, 0
    for restarts, more in steps:
        if restarts:
            life, count = life + 1, 0
        count += more
        expected += more
        assert _update(ledger, _reading(count, f"life {life}")) == expected


def test_a_counter_that_falls_counts_as_a_restart() -> None:
    """Even if the agent claims to be the same."""
    ledger = TrafficLedger()
    assert _update(ledger, _reading(10)) == 10
    assert _update(ledger, _reading(3)) == 13


def test_a_node_that_leaves_leaves_its_counts() -> None:
    """The total does not fall when a selector loses a node; what it counts after that is added."""
    ledger, uid = TrafficLedger(), config("a").uid
    assert _update(ledger, _reading(10)) == 10
    totals = ledger.update(uid, (), {}, None, NOW)
    assert totals["requests"] == 10
    assert _update(ledger, _reading(12)) == 12
    assert ledger.update(uid, (), {}, None, NOW)["requests"] == 12
    assert _update(ledger, _reading(5)) == 17


def _written(requests: int) -> BlobCacheConfigStatus:
    since = START - datetime.timedelta(days=30)
    traffic = TrafficStatus(
        since=since, requests=requests, hit_bytes=0, miss_bytes=0, origin_bytes=0, origin_errors=0
    )
    return BlobCacheConfigStatus(traffic=traffic)


@pytest.mark.parametrize(("written", "reading", "total"), [(100, 30, 100), (100, 130, 130)])
def test_a_new_leader_takes_over_what_was_written(written: int, reading: int, total: int) -> None:
    """Never less than before; what the agents have counted meanwhile is in."""
    ledger = TrafficLedger()
    assert _update(ledger, _reading(reading), _written(written)) == total
    assert _update(ledger, _reading(reading + 5), _written(written)) == total + 5


def test_before_the_agents_were_asked_the_written_total_stands() -> None:
    """A new leader does not show zeros first."""
    ledger = TrafficLedger()
    assert _update(ledger, AgentFacts("one"), _written(100)) == 100
    assert _update(ledger, _reading(40), _written(100)) == 100


def test_the_total_says_since_when() -> None:
    """The oldest of what is counted."""
    uid = config("a").uid
    fresh = TrafficLedger().update(uid, ("one",), {"one": _reading(1)}, None, NOW)
    assert fresh.since == START
    taken = TrafficLedger().update(uid, ("one",), {"one": _reading(1)}, _written(9), NOW)
    assert taken.since == START - datetime.timedelta(days=30)
