"""What is counted and logged about each answer to a reader: one counter step, one line."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from blobcache_agent.data.catalog import ResponseRecord
from blobcache_agent.logs import get_logger
from blobcache_storage import errors
from blobcache_storage.cache.base import CacheStatus

RESULT_HIT = "hit"
RESULTS = {
    CacheStatus.HIT.value: RESULT_HIT,
    CacheStatus.MISS_STORED.value: "miss_stored",
    CacheStatus.MISS.value: "miss",
    CacheStatus.PARTIAL_STORED.value: "partial_stored",
    CacheStatus.BYPASS.value: "bypass",
}
"""Cache-Status to the label `result`."""
RESULT_NONE = "none"
"""Answered without the cache: a precondition, a method that is not served."""
RESULT_ERROR = "error"

REASON_OTHER = "Other"
"""Stands for reasons that are not in the closed set, so that the label stays bounded."""
_OWN_REASONS = (
    "BadRequest",
    "BodyNotAllowed",
    "DigestInvalid",
    "Forbidden",
    "HeadTooLarge",
    "InsecureTLSRefused",
    "InternalError",
    "LocalFSRefused",
    "ManifestNotFound",
    "MethodNotAllowed",
    "MirrorMisbound",
    "NameInvalid",
    "NoStateApplied",
    "NotApplied",
    "NotFound",
    "PreconditionFailed",
    "ReaderGone",
    "ReaderKeysPending",
    "RequestTimeout",
    "SecretKeysUnfit",
    "ShuttingDown",
    "SlowReader",
    "TagInvalid",
    "TooManyConnections",
    "Unauthenticated",
    "UnknownConfig",
    "UnknownHost",
    "VersionNotSupported",
)
SECONDS_BOUNDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)
"""Upper bounds of the buckets of durations."""
_SERVER_ERROR = 500
_CLIENT_ERROR = 400

log = get_logger(__name__)
_levels = logging.getLogger(__name__)
"""Knows, at less cost than `log`, whether a line would be written."""


def _engine_reasons(base: type[errors.StorageError]) -> set[str]:
    return {base.reason}.union(*(_engine_reasons(kind) for kind in base.__subclasses__()))


class RequestObserver(Collector):
    """Counts and logs answers of the data API.

    Counting is adding to integers, which belong to the event loop; they become metrics when the
    registry is scraped, which must be in the same thread.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        names = (*RESULTS.values(), RESULT_NONE, RESULT_ERROR)
        reasons = _engine_reasons(errors.StorageError) | {*_OWN_REASONS, REASON_OTHER}
        self._requests = dict.fromkeys(names, 0)
        self._sent_bytes = dict.fromkeys(names, 0)
        self._failures = dict.fromkeys(sorted(reasons), 0)
        self._aborted = 0
        self._seconds_sum = 0.0
        self._seconds_counts = [0] * (len(SECONDS_BOUNDS) + 1)
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the families, so that the registry refuses others of these names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield what was counted."""
        requests = CounterMetricFamily(
            "blobcache_agent_requests",
            "Answers to readers, by how the cache took part.",
            labels=["result"],
        )
        sent = CounterMetricFamily(
            "blobcache_agent_sent_bytes",
            "Bytes of bodies sent to readers, by how the cache took part.",
            labels=["result"],
        )
        for result, count in self._requests.items():
            requests.add_metric([result], count)
            sent.add_metric([result], self._sent_bytes[result])
        failures = CounterMetricFamily(
            "blobcache_agent_request_errors",
            "Answers to readers that failed or were cut short, by reason.",
            labels=["reason"],
        )
        for reason, count in self._failures.items():
            failures.add_metric([reason], count)
        yield requests
        yield sent
        yield failures
        yield CounterMetricFamily(
            "blobcache_agent_requests_aborted",
            "Answers cut short: the reader left or was too slow, or the read failed.",
            value=self._aborted,
        )
        bounds = [*map(floatToGoString, SECONDS_BOUNDS), "+Inf"]
        yield HistogramMetricFamily(
            "blobcache_agent_request_seconds",
            "From a request's head to the last byte of its answer.",
            buckets=list(zip(bounds, accumulate(self._seconds_counts), strict=True)),
            sum_value=self._seconds_sum,
        )

    def on_response(self, record: ResponseRecord) -> None:
        """Count and log one answer."""
        result = RESULTS.get(record.cache_status, RESULT_NONE)
        if record.status >= _CLIENT_ERROR:
            result = RESULT_ERROR
        seconds = record.duration_seconds
        self._requests[result] += 1
        self._sent_bytes[result] += record.bytes_sent
        self._seconds_sum += seconds
        self._seconds_counts[bisect_left(SECONDS_BOUNDS, seconds)] += 1
        if record.reason:
            known = record.reason if record.reason in self._failures else REASON_OTHER
            self._failures[known] += 1
        if record.aborted:
            self._aborted += 1
        if result != RESULT_HIT or record.aborted or _levels.isEnabledFor(logging.DEBUG):
            self._log(record, result)

    @staticmethod
    def _log(record: ResponseRecord, result: str) -> None:
        # A hit is what always happens; all else is worth a line by default.
        is_plain_hit = result == RESULT_HIT and not record.aborted
        write = log.debug if is_plain_hit else log.info
        if record.status >= _SERVER_ERROR:
            write = log.warning
        write(
            "Answered a reader",
            method=record.method,
            namespace=record.namespace,
            config=record.name,
            blob_id=record.blob_id,
            status=record.status,
            cache=record.cache_status,
            reason=record.reason,
            bytes=record.bytes_sent,
            seconds=round(record.duration_seconds, 6),
            aborted=record.aborted,
        )

    def on_error(self, error: BaseException) -> None:
        """Log an error nobody foresaw, with its traceback."""
        log.error("Failed to answer a reader", exc_info=error)
