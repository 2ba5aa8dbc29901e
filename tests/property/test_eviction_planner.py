"""What holds for every eviction plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from blobcache_storage.eviction import (
    Candidate,
    EvictionReason,
    PlannedEviction,
    plan_eviction,
)

NOW = 1_700_000_000.0


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    blobs: list[Candidate]
    options: dict[str, Any]

    def plan(self, blobs: list[Candidate] | None = None, **changes: Any) -> list[PlannedEviction]:
        """Plan, with some of the arguments changed."""
        return plan_eviction(self.blobs if blobs is None else blobs, **{**self.options, **changes})


candidates = st.builds(
    Candidate,
    config_uid=st.sampled_from(["u1", "u2"]),
    blob_id=st.sampled_from("abcdefgh"),
    version=st.sampled_from(["g1", "g2"]),
    node=st.sampled_from(["", "n1"]),
    bytes=st.integers(0, 100),
    last_read_time=st.integers(-200, 50).map(lambda age: NOW + age),
    in_use=st.booleans(),
    pinned=st.booleans(),
    wanted=st.booleans(),
    wanted_rank=st.none() | st.integers(0, 9),
    orphan=st.booleans(),
    complete=st.booleans(),
)


def _key(blob: Candidate) -> tuple[str, str, str, str]:
    return (blob.config_uid, blob.blob_id, blob.version, blob.node)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A scope whose use may exceed the sum of its blobs (maps, unlinked files)."""
    blobs = draw(st.lists(candidates, max_size=16, unique_by=_key))
    used = sum(blob.bytes for blob in blobs) + draw(st.integers(0, 50))
    return Case(
        blobs,
        {
            "used_bytes": used,
            "target_bytes": draw(st.integers(0, 900)),
            "now": NOW,
            "ttl_seconds": draw(st.none() | st.integers(0, 250)),
            "policy": draw(st.sampled_from(["LRU", "None"])),
            "recent_seconds": draw(st.integers(0, 100)),
            "protected_bytes": draw(st.integers(0, 600)),
        },
    )


def _carry_out(case: Case, plan: list[PlannedEviction]) -> tuple[list[Candidate], int]:
    gone = {_key(planned.candidate) for planned in plan}
    left = [blob for blob in case.blobs if _key(blob) not in gone]
    return left, case.options["used_bytes"] - sum(p.candidate.bytes for p in plan)


@given(cases())
def test_the_untouchable_are_never_planned(case: Case) -> None:
    """In use, or just read."""
    for planned in case.plan():
        blob = planned.candidate
        assert not blob.in_use
        assert abs(NOW - blob.last_read_time) >= case.options["recent_seconds"]


@given(cases())
def test_no_list_member_goes_while_the_whole_list_fits(case: Case) -> None:
    """With room for all of them, pinned and wanted blobs stay, expired or not."""
    listed = [b for b in case.blobs if (b.pinned or b.wanted) and not b.orphan]
    plan = case.plan(protected_bytes=sum(blob.bytes for blob in listed))
    assert not {_key(p.candidate) for p in plan} & {_key(blob) for blob in listed}


@given(cases())
def test_what_remains_of_the_list_fills_the_protected_room(case: Case) -> None:
    """A list member goes only if it does not fit beside those that stay."""
    plan = case.plan()
    left, _ = _carry_out(case, plan)
    stay = sum(b.bytes for b in left if (b.pinned or b.wanted) and not b.orphan)
    for planned in plan:
        blob = planned.candidate
        if (blob.pinned or blob.wanted) and not blob.orphan:
            assert blob.bytes + stay > case.options["protected_bytes"]


@given(cases())
def test_each_blob_at_most_once(case: Case) -> None:
    """And only blobs that exist."""
    keys = [_key(planned.candidate) for planned in case.plan()]
    assert len(keys) == len(set(keys))
    assert set(keys) <= {_key(blob) for blob in case.blobs}


@given(cases())
def test_never_more_than_needed_by_more_than_one_blob(case: Case) -> None:
    """Without its last eviction for room, the plan misses the target."""
    plan = case.plan()
    needed = [p for p in plan if p.reason is not EvictionReason.TTL_EXPIRED]
    if needed:
        _, used = _carry_out(case, plan)
        assert used + needed[-1].candidate.bytes > case.options["target_bytes"]


@given(cases())
def test_the_target_is_missed_only_when_nothing_more_may_go(case: Case) -> None:
    """With policy LRU, what then still has bytes is in use, just read, or protected."""
    plan = case.plan(policy="LRU", protected_bytes=0)
    left, used = _carry_out(case, plan)
    if used > case.options["target_bytes"]:
        for blob in left:
            recent = abs(NOW - blob.last_read_time) < case.options["recent_seconds"]
            assert blob.in_use or recent or blob.bytes == 0


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_blobs_does_not_matter(case: Case, shuffler: random.Random) -> None:
    """Agents and operator agree whatever order they list in."""
    shuffled = list(case.blobs)
    shuffler.shuffle(shuffled)
    assert case.plan(shuffled) == case.plan()


@given(cases())
def test_planning_again_after_the_plan_yields_nothing(case: Case) -> None:
    """No plan opens the way for another one."""
    left, used = _carry_out(case, case.plan())
    assert case.plan(left, used_bytes=used) == []


@given(cases(), st.integers(0, 300))
def test_a_lower_target_only_adds(case: Case, lower: int) -> None:
    """A tighter plan starts like the looser one."""
    plan = case.plan()
    target = case.options["target_bytes"] - lower
    assert case.plan(target_bytes=target)[: len(plan)] == plan


@given(cases())
def test_the_order_of_the_plan(case: Case) -> None:
    """Expired, then orphans, then by policy; within each the coldest first."""
    order = [EvictionReason.TTL_EXPIRED, EvictionReason.ORPHAN, EvictionReason.CAPACITY]
    ranks = [(order.index(p.reason), p.candidate.last_read_time) for p in case.plan()]
    assert ranks == sorted(ranks)


@given(cases())
def test_reasons_are_true(case: Case) -> None:
    """A TTL exists and has passed; an orphan is one; capacity is never the reason with None."""
    ttl = case.options["ttl_seconds"]
    for planned in case.plan():
        blob = planned.candidate
        if planned.reason is EvictionReason.TTL_EXPIRED:
            assert ttl is not None
            assert NOW - blob.last_read_time >= ttl
        elif planned.reason is EvictionReason.ORPHAN:
            assert blob.orphan
        else:
            assert case.options["policy"] == "LRU"
