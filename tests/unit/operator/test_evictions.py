"""What should go from a node, by its report."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.makers import GIB, NOW, START, spec

from blobcache_api.agent import (
    Candidate,
    ConfigReport,
    DiskReport,
    EvictionOutcome,
    EvictionResponse,
    EvictionResult,
    ProtocolRange,
    Report,
)
from blobcache_api.v1alpha1.node import ConfigState
from blobcache_operator.eviction_book import EvictionBook
from blobcache_operator.evictions import decide, make_request

CLOCK = 1_000_000.0


def _blob(name: str, **changed: Any) -> Candidate:
    values: dict[str, Any] = {
        "config_uid": "u", "blob_id": name, "blob_version": "v", "bytes": GIB,
        "last_read_time": 1000.0,
    }  # fmt: skip
    return Candidate(**{**values, **changed})


def _report(*blobs: Candidate, used: int = 0, disk_used: int = 0) -> Report:
    config = ConfigReport(
        namespace="demo", name="a", uid="u", state=ConfigState.APPLIED, bytes=used
    )
    return Report(
        node="one", boot_id="b", agent_version="1", start_time=START, change=1,
        protocol=ProtocolRange(min=1, max=1), configs=(config,), candidates=blobs,
        disk=DiskReport(
            total_bytes=100 * GIB, available_bytes=0, used_bytes=disk_used,
            capacity_bytes=20 * GIB, min_free_bytes=0,
        ),
    )  # fmt: skip


def _decide(report: Report, **changed: Any) -> list[tuple[str, str]]:
    made = spec(**{"cache": {"capacity": "10Gi"}, **changed})
    return [
        (item.candidate.blob_id, item.reason) for item in decide(report, {"u": made}, now=CLOCK)
    ]


def _blobs(count: int, **changed: Any) -> list[Candidate]:
    return [_blob(f"b{n}", last_read_time=1000.0 + n, **changed) for n in range(count)]


def test_below_the_high_watermark_nothing_goes() -> None:
    """Nine of ten is not above ninety percent."""
    assert _decide(_report(*_blobs(9), used=9 * GIB)) == []


def test_above_it_the_coldest_go_down_to_the_low_one() -> None:
    """From ten to eight, least recently read first."""
    assert _decide(_report(*_blobs(10), used=10 * GIB)) == [("b0", "Capacity"), ("b1", "Capacity")]


@pytest.mark.parametrize(
    "spared", [{"pinned": True}, {"wanted": True}, {"in_use": True}, {"last_read_time": CLOCK - 5}]
)
def test_what_is_needed_stays(spared: dict[str, Any]) -> None:
    """Pinned, wanted, in use or just read: the next coldest go instead."""
    blobs = [_blob("needed", **{"last_read_time": 1.0, **spared}), *_blobs(9)]
    assert [name for name, _ in _decide(_report(*blobs, used=10 * GIB))] == ["b0", "b1"]


def test_policy_none_keeps_all_but_what_outlived_its_time() -> None:
    """A full cache stops admitting instead; time to live still counts."""
    report = _report(*_blobs(10), used=10 * GIB)
    assert _decide(report, eviction={"policy": "None"}) == []
    outlived = _decide(
        report, eviction={"policy": "None"}, cache={"capacity": "10Gi", "ttlSeconds": 60}
    )
    assert {reason for _, reason in outlived} == {"TTLExpired"}
    assert len(outlived) == 10


def test_time_to_live_counts_without_any_pressure() -> None:
    """A blob not read for so long goes even from an empty disk."""
    blobs = [_blob("old", last_read_time=CLOCK - 100), _blob("new", last_read_time=CLOCK - 61)]
    found = _decide(_report(*blobs, used=2 * GIB), cache={"capacity": "10Gi", "ttlSeconds": 90})
    assert found == [("old", "TTLExpired")]


def test_a_full_node_takes_orphans_before_anything_living() -> None:
    """However recently an orphan was read."""
    blobs = [_blob("own"), _blob("orphan", config_uid="gone", orphan=True, last_read_time=9000.0)]
    report = _report(*blobs, used=GIB, disk_used=18 * GIB + 1)
    assert _decide(report)[0] == ("orphan", "Orphan")


def test_a_full_node_spares_configs_that_evict_nothing() -> None:
    """Policy None holds for the node's watermark, too."""
    report = _report(_blob("own"), used=GIB, disk_used=20 * GIB)
    assert _decide(report, eviction={"policy": "None"}) == []


def test_planning_again_after_the_plan_yields_nothing() -> None:
    """A plan goes all the way down, so it does not trickle."""
    blobs = _blobs(10)
    gone = {name for name, _ in _decide(_report(*blobs, used=10 * GIB))}
    left = [blob for blob in blobs if blob.blob_id not in gone]
    assert _decide(_report(*left, used=len(left) * GIB)) == []


def test_a_blob_read_since_is_spared() -> None:
    """The request names the time up to which its judgement holds."""
    decisions = decide(
        _report(*_blobs(10), used=10 * GIB), {"u": spec(cache={"capacity": "10Gi"})}, now=CLOCK
    )
    victims = make_request(decisions).victims
    assert [victim.last_read_before for victim in victims] == [1001.0, 1002.0]


def test_the_book_counts_what_agents_confirm() -> None:
    """A plan is shown; only what was evicted counts, by reason."""
    book = EvictionBook()
    book.open("u", None)
    decisions = decide(
        _report(*_blobs(10), used=10 * GIB), {"u": spec(cache={"capacity": "10Gi"})}, now=CLOCK
    )
    outcomes = (EvictionOutcome.EVICTED, EvictionOutcome.IN_USE)
    response = EvictionResponse(
        results=tuple(
            EvictionResult(config_uid="u", blob_id=f"b{n}", outcome=outcome, bytes=GIB)
            for n, outcome in enumerate(outcomes)
        )
    )
    notes = book.record("one", decisions, response, NOW)
    news = book.news("u")
    assert news.reasons == {"Capacity": 1}
    assert [planned.blob for planned in news.plan] == ["b0", "b1"]
    assert news.last_time == NOW
    assert "1Gi" in notes["u"]


def test_an_answer_about_other_blobs_counts_nothing() -> None:
    """What was not asked for cannot be claimed."""
    book = EvictionBook()
    book.open("u", None)
    lie = EvictionResult(
        config_uid="u", blob_id="never", outcome=EvictionOutcome.EVICTED, bytes=GIB
    )
    assert book.record("one", (), EvictionResponse(results=(lie,)), NOW) == {}
    assert book.news("u").reasons == {}
