"""The operator's Prometheus metrics; labels come from closed sets, never from objects' names."""

from prometheus_client import Counter, Gauge, Histogram

LEADING = Gauge("blobcache_operator_leading", "1 while this process holds the Lease")
KUBE_REQUESTS = Counter(
    "blobcache_operator_kube_requests_total",
    "Requests to the API server; code 0 means no answer",
    ["method", "code"],
)
PASSES = Counter("blobcache_operator_reconcile_total", "Passes of the reconcile loop", ["result"])
PASS_SECONDS = Histogram(
    "blobcache_operator_reconcile_seconds", "Time of one collect-plan-act pass"
)
LAST_PASS = Gauge(
    "blobcache_operator_last_success_timestamp_seconds", "When a pass last went through"
)
CONFIGS = Gauge("blobcache_operator_configs", "BlobCacheConfigs by verdict", ["verdict"])
AGENTS = Gauge("blobcache_operator_agents", "Agents by state", ["state"])
PUSHES = Counter("blobcache_operator_pushes_total", "Desired states sent to agents", ["result"])
PUSH_SECONDS = Histogram("blobcache_operator_push_seconds", "Time of one push")
STATUS_WRITES = Counter(
    "blobcache_operator_status_writes_total", "Status writes by kind and result", ["kind", "result"]
)
EVENTS = Counter("blobcache_operator_events_total", "Events by result", ["result"])
EVICTION_REQUESTS = Counter(
    "blobcache_operator_eviction_victims_total", "Victims by the agents' answer", ["outcome"]
)
CERTIFICATE_EXPIRY = Gauge(
    "blobcache_operator_certificate_expiry_timestamp_seconds",
    "When a certificate ends",
    ["certificate"],
)

# Label sets exist from the start, so that a rate over them is 0 and not absent.
for _result in ("ok", "failed"):
    PASSES.labels(result=_result)
    PUSHES.labels(result=_result)
    EVENTS.labels(result=_result)
    for _kind in ("config", "node"):
        STATUS_WRITES.labels(kind=_kind, result=_result)
