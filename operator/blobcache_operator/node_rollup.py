"""From one agent's facts to the status of its BlobCacheNode. Pure."""

import datetime
from collections.abc import Mapping

from blobcache_api.quantity import format_quantity
from blobcache_api.v1alpha1.node import (
    CONFIGS_MAX,
    BlobCacheNodeStatus,
    DiskStatus,
    NodeConfigStatus,
)
from blobcache_operator.conditions import Finding, false, merge_conditions, true, unknown
from blobcache_operator.snapshot import AgentFacts, ConfigFigures, ReportFacts

ORIGIN_REASONS = frozenset(
    {
        "OriginUnreachable",
        "OriginTimeout",
        "OriginServerError",
        "OriginThrottled",
        "OriginProtocolError",
        "OriginDenied",
        "OriginRefused",
        "CircuitOpen",
    }
)


def roll_up_node(
    agent: AgentFacts | None, previous: BlobCacheNodeStatus | None, *, now: datetime.datetime
) -> BlobCacheNodeStatus:
    """
    Return the status of a node.

    While its agent is away, what was last known of it stays: its bytes are still there.
    """
    before = previous or BlobCacheNodeStatus()
    report = agent.report if agent else None
    findings = [_ready(agent), _disk_pressure(report), _origin_reachable(report)]
    if report is None:
        return before.model_copy(
            update={
                "conditions": merge_conditions(
                    before.conditions, findings, generation=None, now=now
                )
            }
        )
    return BlobCacheNodeStatus(
        agent_version=report.agent_version,
        start_time=report.start_time,
        conditions=merge_conditions(before.conditions, findings, generation=None, now=now),
        disk=_disk(report),
        configs=_configs(report.configs),
    )


def _ready(agent: AgentFacts | None) -> Finding:
    if agent is None:
        return false(
            "Ready", "NoAgent", "No agent is on this node. See the DaemonSet blobcache-agent."
        )
    if agent.failure is not None:
        return false("Ready", agent.failure.reason, agent.failure.message)
    if agent.report is None:
        return unknown("Ready", "AskingAgent", "The operator has just begun to ask the agent.")
    return true("Ready", "AgentAnswers", "The agent answers.")


def _disk_pressure(report: ReportFacts | None) -> Finding:
    if report is None:
        return unknown("DiskPressure", "NotReported", "The agent has not reported yet.")
    if report.disk.problem:
        return true("DiskPressure", "DiskProblem", report.disk.problem)
    if report.disk.pressure:
        return true(
            "DiskPressure",
            "TooLittleFree",
            f"Less than {format_quantity(report.disk.min_free_bytes)} are free, so nothing is "
            "added. Free space on the node, or lower the agent's --min-free.",
        )
    return false("DiskPressure", "EnoughFree", "The cache may grow.")


def _origin_reachable(report: ReportFacts | None) -> Finding:
    if report is None:
        return unknown("OriginReachable", "NotReported", "The agent has not reported yet.")
    for uid in sorted(report.configs):
        figures = report.configs[uid]
        if figures.degraded is not None and figures.degraded.reason in ORIGIN_REASONS:
            return false(
                "OriginReachable",
                figures.degraded.reason,
                f"{figures.namespace}/{figures.name}: {figures.degraded.message}",
            )
    return true("OriginReachable", "NoErrors", "No origin fails.")


def _disk(report: ReportFacts) -> DiskStatus:
    disk = report.disk
    return DiskStatus(
        total_bytes=disk.total_bytes,
        available_bytes=disk.available_bytes,
        used_bytes=disk.used_bytes,
        capacity_bytes=disk.capacity_bytes,
        min_free_bytes=disk.min_free_bytes,
        pressure=disk.pressure,
        cached=format_quantity(disk.used_bytes),
    )


def _configs(configs: Mapping[str, ConfigFigures]) -> tuple[NodeConfigStatus, ...]:
    # One name may be reported twice while its config is deleted and made again; the list's keys
    # are names, so only one may be written.
    by_name = {(figures.namespace, figures.name): figures for figures in configs.values()}
    return tuple(
        NodeConfigStatus(
            namespace=figures.namespace,
            name=figures.name,
            uid=figures.uid,
            applied_digest=figures.applied_digest,
            state=figures.state,
            reason=figures.failure.reason if figures.failure else None,
            message=figures.failure.message if figures.failure else "",
            bytes=figures.bytes,
            blobs=figures.blobs,
            hit_bytes=figures.hit_bytes,
            miss_bytes=figures.miss_bytes,
            origin_bytes=figures.origin_bytes,
            warm_percent=_warm_percent(figures),
        )
        for _, figures in sorted(by_name.items())[:CONFIGS_MAX]
    )


def _warm_percent(figures: ConfigFigures) -> int | None:
    prefetch = figures.prefetch
    if prefetch is None:
        return None
    if prefetch.blobs_ready >= prefetch.blobs:
        return 100
    return min(99, prefetch.bytes_ready * 100 // prefetch.bytes) if prefetch.bytes else 0
