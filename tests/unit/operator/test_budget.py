"""When a status is written, and how often."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.operator.makers import NOW, START

from blobcache_api.v1alpha1.common import Condition, ConditionStatus
from blobcache_api.v1alpha1.config import (
    BlobCacheConfigStatus,
    NodesStatus,
    PrefetchStatus,
    TrafficStatus,
    UsageStatus,
)
from blobcache_api.v1alpha1.node import BlobCacheNodeStatus, ConfigState, NodeConfigStatus
from blobcache_operator.budget import Urgency, WriteBucket, config_urgency, node_urgency


def _status(**changed: Any) -> BlobCacheConfigStatus:
    values: dict[str, Any] = {
        "ready": "True", "message": "fine", "nodes_ready": 1, "bytes": 1000, "percent": 42,
        "requests": 0, "generation": 1,
    }  # fmt: skip
    values |= changed
    condition = Condition(
        type="Ready",
        status=ConditionStatus(values["ready"]),
        observed_generation=values["generation"],
        last_transition_time=NOW,
        reason="Because",
        message=values["message"],
    )
    return BlobCacheConfigStatus(
        observed_generation=values["generation"],
        conditions=(condition,),
        nodes=NodesStatus(
            selected=2, available=2, ready=values["nodes_ready"], failed=0, summary="x"
        ),
        usage=UsageStatus(bytes=values["bytes"], blobs=1, cached="x"),
        traffic=TrafficStatus(
            since=START, requests=values["requests"], hit_bytes=0, miss_bytes=0,
            origin_bytes=0, origin_errors=0,
        ),
        prefetch=PrefetchStatus(
            blobs=1, blobs_ready=0, bytes=100, bytes_ready=1, percent=values["percent"]
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "age", "urgency"),
    [
        ({}, 10_000, Urgency.NOTHING),
        ({"ready": "False"}, 0, Urgency.CONDITIONS),
        ({"message": "other"}, 0, Urgency.CONDITIONS),
        ({"generation": 2}, 0, Urgency.CONDITIONS),
        ({"nodes_ready": 2}, 0, Urgency.STATES),
        ({"percent": 49}, 0, Urgency.NOTHING),
        ({"percent": 50}, 0, Urgency.FIGURES),
        ({"percent": 100}, 0, Urgency.FIGURES),
        ({"bytes": 1049}, 0, Urgency.NOTHING),
        ({"bytes": 1053}, 0, Urgency.FIGURES),
        ({"bytes": 0}, 0, Urgency.FIGURES),
        ({"requests": 10**9}, 299, Urgency.NOTHING),
        ({"requests": 1}, 300, Urgency.COUNTERS),
    ],
)
def test_a_configs_changes_have_their_urgency(
    changed: dict[str, Any], age: float, urgency: Urgency
) -> None:
    """Conditions first, steps next, counters only when they are old."""
    assert config_urgency(_status(), _status(**changed), age_seconds=age) is urgency


def test_a_first_status_is_urgent() -> None:
    """Nothing written yet is the most urgent of all."""
    assert config_urgency(None, _status(), age_seconds=0) is Urgency.CONDITIONS


def _node(**changed: Any) -> BlobCacheNodeStatus:
    values: dict[str, Any] = {
        "namespace": "demo", "name": "a", "uid": "u", "state": ConfigState.APPLIED,
        "applied_digest": "a" * 64, "bytes": 1000, "warm_percent": 10,
    }  # fmt: skip
    return BlobCacheNodeStatus(
        agent_version="1", configs=(NodeConfigStatus(**{**values, **changed}),)
    )


@pytest.mark.parametrize(
    ("changed", "age", "urgency"),
    [
        ({}, 10_000, Urgency.NOTHING),
        ({"applied_digest": "b" * 64}, 0, Urgency.STATES),
        ({"state": ConfigState.FAILED}, 0, Urgency.STATES),
        ({"uid": "v"}, 0, Urgency.STATES),
        ({"bytes": 2000}, 0, Urgency.FIGURES),
        ({"warm_percent": 20}, 0, Urgency.FIGURES),
        ({"hit_bytes": 10**12}, 599, Urgency.NOTHING),
        ({"hit_bytes": 1}, 600, Urgency.COUNTERS),
    ],
)
def test_a_nodes_changes_have_their_urgency(
    changed: dict[str, Any], age: float, urgency: Urgency
) -> None:
    """Digests, states and config sets at once, bytes by steps, counters when old."""
    assert node_urgency(_node(), _node(**changed), age_seconds=age) is urgency


@given(gaps=st.lists(st.floats(0, 2), min_size=1, max_size=60))
def test_the_bucket_never_gives_more_than_its_rate(gaps: list[float]) -> None:
    """Over any time at most burst plus rate times time; a delay it names is enough."""
    bucket, now = WriteBucket(rate=5, burst=5), 0.0
    for taken, gap in enumerate(gaps, start=1):
        now += gap
        delay = bucket.take(now)
        if delay > 0:
            now += delay + 1e-6
            assert bucket.take(now) == 0
        assert taken <= 5 + 5 * now + 1


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    """Time never counts negatively."""
    bucket = WriteBucket(rate=1, burst=1)
    assert bucket.take(100.0) == 0
    assert bucket.take(50.0) == pytest.approx(1.0)
