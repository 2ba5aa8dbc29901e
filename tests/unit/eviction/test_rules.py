"""The planner's rules, one example each."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest

from blobcache_storage import eviction
from blobcache_storage.eviction import Candidate, EvictionReason, PlannedEviction, plan_eviction

NOW = 1_000_000.0


def blob(name: str, size: int = 10, age: float = 1000.0, **flags: object) -> Candidate:
    """A blob of `size` bytes last read `age` seconds ago."""
    return Candidate(
        config_uid="u",
        blob_id=name,
        version="g1",
        bytes=size,
        last_read_time=NOW - age,
        **flags,  # type: ignore[arg-type]
    )


def plan(
    *blobs: Candidate,
    target: int,
    used: int | None = None,
    ttl: int | None = None,
    policy: str = "LRU",
    recent: float = 60.0,
    protected: int = 0,
) -> list[PlannedEviction]:
    """Plan with this file's defaults: all of `blobs` is what is used."""
    return plan_eviction(
        blobs,
        used_bytes=sum(b.bytes for b in blobs) if used is None else used,
        target_bytes=target,
        now=NOW,
        ttl_seconds=ttl,
        policy=policy,
        recent_seconds=recent,
        protected_bytes=protected,
    )


def names(planned: list[PlannedEviction]) -> list[tuple[str, str]]:
    """Ids and reasons."""
    return [(p.candidate.blob_id, p.reason.value) for p in planned]


def test_the_coldest_go_until_the_target_is_reached() -> None:
    """LRU, and no more than needed."""
    planned = plan(blob("warm", age=100), blob("cold", age=300), blob("cool", age=200), target=15)
    assert names(planned) == [("cold", "Capacity"), ("cool", "Capacity")]


def test_nothing_goes_at_the_target() -> None:
    """The target is inclusive."""
    assert plan(blob("a"), blob("b"), target=20) == []


def test_orphans_go_before_colder_blobs() -> None:
    """What nobody can read goes first, as far as needed."""
    planned = plan(
        blob("cold", age=900),
        blob("orphan", age=100, orphan=True),
        blob("orphan2", age=90, orphan=True),
        target=15,
    )
    assert names(planned) == [("orphan", "Orphan"), ("orphan2", "Orphan")]


def test_orphans_stay_while_there_is_room() -> None:
    """The same uid may return and adopt them."""
    assert plan(blob("orphan", orphan=True), target=10) == []


def test_expired_blobs_go_even_with_room_to_spare() -> None:
    """A TTL is a promise to forget, not a means against a full disk."""
    planned = plan(blob("old", age=500), blob("young", age=499), target=1000, ttl=500)
    assert names(planned) == [("old", "TTLExpired")]


def test_expired_bytes_count_towards_the_target() -> None:
    """Nothing else goes if the expired ones are enough."""
    planned = plan(blob("old", age=500), blob("orphan", age=400, orphan=True), target=10, ttl=450)
    assert names(planned) == [("old", "TTLExpired")]


def test_without_a_policy_only_orphans_and_expired_go() -> None:
    """Policy None means: full is full."""
    planned = plan(
        blob("cold", age=900), blob("orphan", age=100, orphan=True), target=0, policy="None"
    )
    assert names(planned) == [("orphan", "Orphan")]


@pytest.mark.parametrize("flag", ["orphan", "wanted", "complete"])
def test_in_use_blobs_stay_whatever_else_they_are(flag: str) -> None:
    """Their files would only be unlinked, not freed."""
    assert plan(blob("a", in_use=True, **{flag: True}), target=0, ttl=1) == []


def test_just_read_blobs_stay() -> None:
    """The bound is exclusive: read exactly `recent_seconds` ago may go."""
    planned = plan(blob("now", age=0), blob("edge", age=60), target=0)
    assert names(planned) == [("edge", "Capacity")]


def test_a_read_in_the_far_future_does_not_protect() -> None:
    """After the clock was set back the disk must not fill."""
    assert names(plan(blob("a", age=-86400), target=0)) == [("a", "Capacity")]


def test_pinned_come_before_wanted_in_the_protected_room() -> None:
    """Both are protected, in list order, as far as the room goes."""
    planned = plan(
        blob("w0", wanted=True, wanted_rank=0, age=500),
        blob("w1", wanted=True, wanted_rank=1, age=900),
        blob("p", pinned=True, age=800),
        target=0,
        protected=20,
    )
    assert names(planned) == [("w1", "Capacity")]


def test_a_blob_too_large_to_protect_exposes_only_itself() -> None:
    """Those behind it in the list still find their room."""
    planned = plan(
        blob("huge", size=100, wanted=True, wanted_rank=0),
        blob("small", size=10, wanted=True, wanted_rank=1),
        target=0,
        protected=50,
    )
    assert names(planned) == [("huge", "Capacity")]


def test_protection_also_holds_against_the_ttl() -> None:
    """Pinned is pinned."""
    assert plan(blob("p", pinned=True, age=9999), target=0, ttl=60, protected=10) == []


def test_pins_of_an_orphan_mean_nothing() -> None:
    """The configuration that pinned it is gone."""
    planned = plan(blob("p", pinned=True, orphan=True), target=0, protected=10)
    assert names(planned) == [("p", "Orphan")]


def test_of_two_equally_old_blobs_the_incomplete_goes_first() -> None:
    """It is the cheaper loss."""
    planned = plan(blob("a", complete=True), blob("b", complete=False), target=10)
    assert names(planned) == [("b", "Capacity")]


def test_empty_blobs_are_not_evicted_for_room() -> None:
    """They free nothing."""
    assert plan(blob("a", size=0), target=0, used=50) == []


def test_an_unknown_policy_is_refused() -> None:
    """A typing error must not become "evict nothing"."""
    with pytest.raises(ValueError, match="must be 'LRU' or 'None', not 'lru'"):
        plan(blob("a"), target=0, policy="lru")


def test_reasons_are_the_documented_words() -> None:
    """They appear in status and metrics."""
    assert {reason.value for reason in EvictionReason} == {"TTLExpired", "Orphan", "Capacity"}


def test_the_planner_imports_only_the_standard_library() -> None:
    """The operator imports it, and must not drag the engine in."""
    for statement in ast.walk(ast.parse(inspect.getsource(eviction))):
        if isinstance(statement, ast.ImportFrom):
            imported = [statement.module or ""]
        elif isinstance(statement, ast.Import):
            imported = [alias.name for alias in statement.names]
        else:
            continue
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in imported)
