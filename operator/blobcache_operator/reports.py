"""From a validated report to the small facts that are kept of it. Pure."""

from blobcache_api.agent import ConfigReport, Report
from blobcache_operator.snapshot import ConfigFigures, Failure, ReportFacts


def condense(report: Report) -> ReportFacts:
    """Return a report's facts; its candidates are used once and not kept."""
    return ReportFacts(
        agent_version=report.agent_version,
        start_time=report.start_time,
        incarnation=f"{report.boot_id}/{report.pod_uid}/{report.start_time.isoformat()}",
        protocol=report.protocol,
        features=frozenset(report.features),
        disk=report.disk,
        configs={config.uid: _figures(config) for config in report.configs},
        orphan_uids=frozenset(item.config_uid for item in report.candidates if item.orphan),
    )


def _figures(config: ConfigReport) -> ConfigFigures:
    return ConfigFigures(
        namespace=config.namespace,
        name=config.name,
        uid=config.uid,
        applied_digest=config.applied_digest,
        state=config.state,
        failure=_failure(config.reason, config.message),
        degraded=_failure(config.degraded_reason, config.degraded_message),
        bytes=config.bytes,
        blobs=config.blobs,
        requests=config.requests,
        hit_bytes=config.hit_bytes,
        miss_bytes=config.miss_bytes,
        origin_bytes=config.origin_bytes,
        origin_errors=config.origin_errors,
        evicted_blobs=config.evicted_blobs,
        evicted_bytes=config.evicted_bytes,
        prefetch=config.prefetch,
    )


def _failure(reason: str | None, message: str) -> Failure | None:
    return None if reason is None else Failure(reason, message)
