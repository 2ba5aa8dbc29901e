"""What is counted and logged about each answer to a reader: one counter step, one line."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from blobcache_agent.data.catalog import ResponseRecord
from blobcache_agent.logs import get_logger
from blobcache_storage import errors
from blobcache_storage.cache.base import CacheStatus

RESULTS = {
    CacheStatus.HIT.value: "hit",
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
    "Forbidden",
    "HeadTooLarge",
    "InsecureTLSRefused",
    "InternalError",
    "LocalFSRefused",
    "MethodNotAllowed",
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
    "TooManyConnections",
    "Unauthenticated",
    "UnknownConfig",
    "VersionNotSupported",
)
_SERVER_ERROR = 500
_CLIENT_ERROR = 400

log = get_logger(__name__)


def _engine_reasons(base: type[errors.StorageError]) -> set[str]:
    return {base.reason}.union(*(_engine_reasons(kind) for kind in base.__subclasses__()))


class RequestObserver:
    """Counts and logs answers of the data API.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            "blobcache_agent_requests",
            "Answers to readers, by how the cache took part.",
            ["result"],
            registry=registry,
        )
        sent = Counter(
            "blobcache_agent_sent_bytes",
            "Bytes of bodies sent to readers, by how the cache took part.",
            ["result"],
            registry=registry,
        )
        failures = Counter(
            "blobcache_agent_request_errors",
            "Answers to readers that failed or were cut short, by reason.",
            ["reason"],
            registry=registry,
        )
        self._aborted = Counter(
            "blobcache_agent_requests_aborted",
            "Answers cut short: the reader left or was too slow, or the read failed.",
            registry=registry,
        )
        self._seconds = Histogram(
            "blobcache_agent_request_seconds",
            "From a request's head to the last byte of its answer.",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10, 60, 300),
            registry=registry,
        )
        # Bound once: looking a label up costs more than counting.
        names = (*RESULTS.values(), RESULT_NONE, RESULT_ERROR)
        self._requests = {name: requests.labels(name) for name in names}
        self._sent = {name: sent.labels(name) for name in names}
        reasons = _engine_reasons(errors.StorageError) | {*_OWN_REASONS, REASON_OTHER}
        self._failures = {name: failures.labels(name) for name in sorted(reasons)}

    def on_response(self, record: ResponseRecord) -> None:
        """Count and log one answer."""
        result = RESULTS.get(record.cache_status, RESULT_NONE)
        if record.status >= _CLIENT_ERROR:
            result = RESULT_ERROR
        self._requests[result].inc()
        self._sent[result].inc(record.bytes_sent)
        self._seconds.observe(record.duration_seconds)
        if record.reason:
            self._failures.get(record.reason, self._failures[REASON_OTHER]).inc()
        if record.aborted:
            self._aborted.inc()
        # A hit is what always happens; all else is worth a line by default.
        is_plain_hit = result == "hit" and not record.aborted
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
