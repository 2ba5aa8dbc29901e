"""Answers are counted with labels of closed sets, and logged once."""

from __future__ import annotations

import pytest
import structlog
from prometheus_client import CollectorRegistry

from blobcache_agent.data.catalog import ResponseRecord
from blobcache_agent.observer import RequestObserver

HIT = ResponseRecord(
    method="GET",
    status=200,
    reason="",
    namespace="demo",
    name="models",
    blob_id="a/b",
    cache_status="hit",
    bytes_sent=10,
    duration_seconds=0.01,
    aborted=False,
)


def record(**changes: object) -> ResponseRecord:
    """Return a hit with some fields changed."""
    fields = {name: getattr(HIT, name) for name in HIT.__slots__}
    return ResponseRecord(**{**fields, **changes})


@pytest.fixture
def registry() -> CollectorRegistry:
    """A fresh registry."""
    return CollectorRegistry()


@pytest.fixture
def observer(registry: CollectorRegistry) -> RequestObserver:
    """An observer on it."""
    return RequestObserver(registry)


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({}, "hit"),
        ({"cache_status": "fwd=miss; stored"}, "miss_stored"),
        ({"cache_status": "fwd=partial; stored", "status": 206}, "partial_stored"),
        ({"cache_status": "fwd=miss"}, "miss"),
        ({"cache_status": "fwd=bypass"}, "bypass"),
        ({"cache_status": "", "status": 304}, "none"),
        ({"cache_status": "", "status": 404}, "error"),
        ({"cache_status": "hit", "status": 416}, "error"),
        ({"cache_status": "fwd=invented"}, "none"),
    ],
)
def test_results(
    observer: RequestObserver,
    registry: CollectorRegistry,
    changes: dict[str, object],
    result: str,
) -> None:
    """Each answer steps one result, and its bytes go with it."""
    observer.on_response(record(**changes))
    labels = {"result": result}
    assert registry.get_sample_value("blobcache_agent_requests_total", labels) == 1
    assert registry.get_sample_value("blobcache_agent_sent_bytes_total", labels) == 10


def test_reasons_are_a_closed_set(observer: RequestObserver, registry: CollectorRegistry) -> None:
    """A known reason has its own series from the start; another one is `Other`."""
    name = "blobcache_agent_request_errors_total"
    assert registry.get_sample_value(name, {"reason": "OriginTimeout"}) == 0
    observer.on_response(record(status=504, reason="OriginTimeout"))
    observer.on_response(record(status=500, reason="MadeUp\nBy=Somebody"))
    assert registry.get_sample_value(name, {"reason": "OriginTimeout"}) == 1
    assert registry.get_sample_value(name, {"reason": "Other"}) == 1
    observer.on_response(record(aborted=True))
    assert registry.get_sample_value("blobcache_agent_requests_aborted_total") == 1


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "debug"),
        ({"aborted": True}, "info"),
        ({"cache_status": "fwd=miss; stored"}, "info"),
        ({"status": 404, "cache_status": ""}, "info"),
        ({"status": 502, "cache_status": ""}, "warning"),
    ],
)
def test_one_line_per_answer(
    observer: RequestObserver,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    level: str,
) -> None:
    """Hits are for debugging, failures of ours are warnings."""
    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr("blobcache_agent.observer.log", structlog.get_logger())
        observer.on_response(record(**changes))
    (line,) = lines
    assert line["log_level"] == level
    assert (line["namespace"], line["config"], line["blob_id"]) == ("demo", "models", "a/b")
