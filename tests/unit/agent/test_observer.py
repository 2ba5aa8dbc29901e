"""Answers are counted with labels of closed sets, and logged once."""

from __future__ import annotations

import logging

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
    return HIT._replace(**changes)


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
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, object],
    level: str,
) -> None:
    """Hits are for debugging, failures of ours are warnings."""
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr("blobcache_agent.observer.log", structlog.get_logger())
        observer.on_response(record(**changes))
    (line,) = lines
    assert line["log_level"] == level
    assert (line["namespace"], line["config"], line["blob_id"]) == ("demo", "models", "a/b")


def test_nothing_is_written_of_a_hit_by_default(
    observer: RequestObserver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hit is counted; its line is not even made where nobody wants it."""
    caplog.set_level(logging.INFO)
    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr("blobcache_agent.observer.log", structlog.get_logger())
        observer.on_response(HIT)
    assert lines == []


def test_durations(observer: RequestObserver, registry: CollectorRegistry) -> None:
    """A duration is counted in its bucket and all longer ones, bounds included."""
    for seconds in (0.0005, 0.001, 0.3, 1000.0):
        observer.on_response(record(duration_seconds=seconds))
    name = "blobcache_agent_request_seconds"
    buckets = {"0.001": 2, "0.1": 2, "0.5": 3, "300.0": 3, "+Inf": 4}
    for bound, count in buckets.items():
        assert registry.get_sample_value(f"{name}_bucket", {"le": bound}) == count
    assert registry.get_sample_value(f"{name}_count") == 4
    assert registry.get_sample_value(f"{name}_sum") == pytest.approx(1000.3015)
