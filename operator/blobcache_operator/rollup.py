"""
From one config's verdict and its nodes' reports to its status: sums, counts and four conditions.

Pure. Messages say what to do, and hold no figure that changes by itself: a message that flickers
would be written again and again.
"""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blobcache_api.quantity import format_quantity
from blobcache_api.v1alpha1.common import INT64_MAX
from blobcache_api.v1alpha1.config import (
    FAILURES_MAX,
    BlobCacheConfigStatus,
    EvictionStatus,
    NodeFailure,
    NodesStatus,
    PlannedEviction,
    PrefetchStatus,
    TrafficStatus,
    UsageStatus,
)
from blobcache_api.v1alpha1.node import ConfigState
from blobcache_operator.conditions import Finding, false, merge_conditions, true, unknown
from blobcache_operator.reconcile import Verdict, is_settled
from blobcache_operator.snapshot import AgentFacts, ConfigFacts, ConfigFigures, Failure
from blobcache_operator.traffic import Totals

MESSAGE_LENGTH_MAX = 1024
REASONS_MAX = 16
ROOM_FOR_OTHERS = "NodeLimits"
NO_AGENTS = (
    "No agent is there, so nothing is served. If the chart's DaemonSet has no pods, pod security "
    "refuses them: kubectl label namespace NAMESPACE "
    "pod-security.kubernetes.io/enforce=privileged (the namespace of the chart's release). "
    "Look by: kubectl describe daemonset blobcache-agent -n NAMESPACE. Agents outside the cluster "
    "are named by --agent NODE=URL."
)


@dataclass(frozen=True, slots=True)
class EvictionNews:
    """What the operator's own decisions did for a config in this leadership."""

    plan: tuple[PlannedEviction, ...] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)
    last_time: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class _Survey:
    """The nodes of one config, sorted out."""

    selected: tuple[str, ...]
    available: tuple[str, ...]
    ready: tuple[str, ...]
    failures: Mapping[str, Failure]
    unasked: int
    degraded: Mapping[str, Failure]
    figures: Mapping[str, ConfigFigures]


def roll_up(
    config: ConfigFacts,
    verdict: Verdict,
    agents: Mapping[str, AgentFacts],
    totals: Totals,
    news: EvictionNews,
    *,
    now: datetime.datetime,
) -> BlobCacheConfigStatus:
    """Return the status a config should have now."""
    survey = _survey(config, verdict, agents)
    previous = config.status.conditions if config.status else ()
    findings = [
        _ready(config, verdict, survey, has_agents=bool(agents)),
        _degraded(verdict, survey, has_agents=bool(agents)),
        _credentials_valid(config, verdict),
        _warm(config, verdict, survey),
    ]
    return BlobCacheConfigStatus(
        observed_generation=config.generation,
        conditions=merge_conditions(previous, findings, generation=config.generation, now=now),
        nodes=_nodes(survey),
        usage=_usage(config, survey),
        traffic=_traffic(totals),
        prefetch=_prefetch(config, survey),
        eviction=_eviction(config, totals, news, now),
    )


def _survey(config: ConfigFacts, verdict: Verdict, agents: Mapping[str, AgentFacts]) -> _Survey:
    available, ready = [], []
    failures: dict[str, Failure] = {}
    degraded: dict[str, Failure] = {}
    figures: dict[str, ConfigFigures] = {}
    unasked = 0
    for node in verdict.selected:
        agent = agents[node]
        found = agent.report.configs.get(config.uid) if agent.report else None
        if found is not None:
            figures[node] = found
        if agent.is_available:
            available.append(node)
        elif agent.failure is not None:
            failures[node] = agent.failure
            continue
        else:
            unasked += 1
            continue
        wanted = verdict.wanted.get(node)
        failure = verdict.withheld.get(node) or _failure_of(found, agent, config.uid, wanted)
        if failure is not None:
            failures[node] = failure
        elif (
            found is not None
            and found.state is ConfigState.APPLIED
            and (found.applied_digest == wanted)
        ):
            ready.append(node)
        if found is not None and found.degraded is not None and failure is None:
            degraded[node] = found.degraded
    return _Survey(
        verdict.selected, tuple(available), tuple(ready), failures, unasked, degraded, figures
    )


def _failure_of(
    found: ConfigFigures | None, agent: AgentFacts, uid: str, wanted: str | None
) -> Failure | None:
    """Return what stands between the node and this very configuration, if it is an error."""
    if found is not None and found.state is ConfigState.FAILED:
        return found.failure or Failure("Failed", "The agent gives no reason. See its log.")
    if found is not None and found.state is ConfigState.APPLIED and found.applied_digest == wanted:
        return None
    return agent.refusals.get(uid) or agent.push_failure


def _ready(config: ConfigFacts, verdict: Verdict, survey: _Survey, *, has_agents: bool) -> Finding:
    if verdict.refusal is not None:
        return false("Ready", verdict.refusal.reason, verdict.refusal.message)
    if not has_agents:
        return false(
            "Ready",
            "NoAgents",
            NO_AGENTS,
        )
    if not survey.selected:
        return false(
            "Ready",
            "NoNodesSelected",
            "No node with an agent has the labels of `spec.nodeSelector`. Change it, or label a "
            "node: kubectl label node NODE KEY=VALUE",
        )
    if verdict.credentials.problem is not None:
        problem = verdict.credentials.problem
        return false("Ready", problem.reason, problem.message)
    crowded = [found for found in verdict.withheld.values() if found.reason == "TooManyConfigs"]
    if crowded:
        return false("Ready", crowded[0].reason, crowded[0].message)
    if not survey.available:
        if survey.unasked:
            return unknown("Ready", "AskingAgents", "The operator has just begun to ask agents.")
        return false("Ready", "AgentsUnavailable", _tell(survey.failures, len(survey.selected)))
    present = {node: survey.failures[node] for node in survey.available if node in survey.failures}
    if present:
        reason = _most_common(present)
        return false("Ready", reason, _tell(present, len(survey.selected)))
    if len(survey.ready) < len(survey.available):
        return false(
            "Ready", "Applying", f"Nodes are applying generation {config.generation}. Wait."
        )
    return true("Ready", "Applied", "Every available node runs this configuration.")


def _degraded(verdict: Verdict, survey: _Survey, *, has_agents: bool) -> Finding:
    if verdict.refusal is not None:
        return true("Degraded", verdict.refusal.reason, verdict.refusal.message)
    if verdict.credentials.problem is not None:
        problem = verdict.credentials.problem
        return true("Degraded", problem.reason, problem.message)
    trouble = {**survey.degraded, **survey.failures}
    if trouble:
        reason = _most_common(trouble)
        return true("Degraded", reason, _tell(trouble, len(survey.selected)))
    if not has_agents:
        return true("Degraded", "NoAgents", NO_AGENTS)
    if not survey.selected:
        return false(
            "Degraded",
            "NoNodesSelected",
            "No node runs this configuration, so nothing of it can fail; see Ready.",
        )
    if not survey.available:
        return unknown("Degraded", "AskingAgents", "The operator has just begun to ask agents.")
    return false("Degraded", "AsExpected", "Nothing fails.")


def _credentials_valid(config: ConfigFacts, verdict: Verdict) -> Finding:
    if config.spec is None:
        return unknown("CredentialsValid", "InvalidSpec", "The spec cannot be read.")
    if config.spec.backend.credentials_secret_ref is None:
        return true(
            "CredentialsValid", "NotRequired", "No Secret is named; requests are anonymous."
        )
    problem = verdict.credentials.problem
    if problem is not None:
        return false("CredentialsValid", problem.reason, problem.message)
    if verdict.credentials.credentials is None:
        return unknown("CredentialsValid", "NotRead", "The Secret was not read.")
    return true("CredentialsValid", "SecretRead", "The Secret holds one set of credentials.")


def _warm(config: ConfigFacts, verdict: Verdict, survey: _Survey) -> Finding:
    spec = config.spec
    if spec is None or verdict.refusal is not None:
        return false("Warm", "NotApplied", "No node runs this configuration; see Ready.")
    if spec.prefetch is None or not spec.prefetch.blobs:
        return true("Warm", "NotRequired", "`spec.prefetch.blobs` names nothing.")
    if spec.suspend:
        return false("Warm", "Suspended", "Set `spec.suspend` to false to go on prefetching.")
    if not survey.available:
        return false("Warm", "NoNodes", "No node is available; see Ready.")
    current = {
        node: survey.figures[node]
        for node in survey.ready
        if node in survey.figures and node not in verdict.waiting
    }
    problems = {
        node: Failure(
            figures.prefetch.problem,
            _PREFETCH_REMEDIES.get(
                figures.prefetch.problem, "See Degraded, or the agent's log on that node."
            ),
        )
        for node, figures in current.items()
        if figures.prefetch is not None and figures.prefetch.problem is not None
    }
    if problems:
        return false("Warm", _most_common(problems), _tell(problems, len(survey.selected)))
    warm = [node for node, figures in current.items() if is_settled(figures)]
    if len(warm) == len(survey.available):
        return true("Warm", "AllBlobsCached", "Every available node has all blobs of the list.")
    return false("Warm", "Prefetching", "Nodes are fetching the list; see `status.prefetch`.")


_PREFETCH_REMEDIES = {
    "PrefetchExceedsCapacity": "The list does not fit below the high watermark. Raise "
    "`spec.cache.capacity` or the agent's --capacity, or shorten the list.",
    "BlobNotFound": "The origin does not have a blob that the list names; Degraded says which. "
    "Correct its `id` in `spec.prefetch.blobs`, or upload it.",
    "DigestMismatch": "A blob's bytes do not have the `digest` that the list gives. Correct it in "
    "`spec.prefetch.blobs`, or the blob at the origin.",
}


def _nodes(survey: _Survey) -> NodesStatus:
    shown = sorted(survey.failures.items())[:FAILURES_MAX]
    return NodesStatus(
        selected=len(survey.selected),
        available=len(survey.available),
        ready=len(survey.ready),
        failed=len(survey.failures),
        summary=f"{len(survey.ready)}/{len(survey.selected)}",
        failures=tuple(
            NodeFailure(node=node, reason=found.reason, message=found.message[:MESSAGE_LENGTH_MAX])
            for node, found in shown
        ),
    )


def _usage(config: ConfigFacts, survey: _Survey) -> UsageStatus:
    cached = sum(figures.bytes for figures in survey.figures.values())
    capacity = config.spec.cache.capacity if config.spec else None
    return UsageStatus(
        bytes=_bound(cached),
        blobs=_bound(sum(figures.blobs for figures in survey.figures.values())),
        capacity_bytes=None if capacity is None else _bound(capacity * len(survey.selected)),
        cached=format_quantity(_bound(cached)),
    )


def _traffic(totals: Totals) -> TrafficStatus:
    hit, missed = totals["hit_bytes"], totals["miss_bytes"]
    return TrafficStatus(
        since=totals.since,
        requests=totals["requests"],
        hit_bytes=hit,
        miss_bytes=missed,
        origin_bytes=totals["origin_bytes"],
        origin_errors=totals["origin_errors"],
        hit_ratio_percent=hit * 100 // (hit + missed) if hit + missed else None,
    )


def _prefetch(config: ConfigFacts, survey: _Survey) -> PrefetchStatus | None:
    """
    Sum up the list over all selected nodes, those that wait for their turn included.

    A node that has not reported the list counts with the sizes the spec gives, or as many bytes
    as the largest report: with less, the percentage would fall when it begins.
    """
    if config.spec is None or config.spec.prefetch is None or not config.spec.prefetch.blobs:
        return None
    listed = config.spec.prefetch.blobs
    reports = [found.prefetch for found in survey.figures.values() if found.prefetch is not None]
    expected = max([sum(blob.size or 0 for blob in listed), *(found.bytes for found in reports)])
    missing = len(survey.selected) - len(reports)
    blobs = len(listed) * len(survey.selected)
    blobs_ready = min(sum(found.blobs_ready for found in reports), blobs)
    total = sum(max(found.bytes, found.bytes_ready) for found in reports) + missing * expected
    ready = sum(found.bytes_ready for found in reports)
    return PrefetchStatus(
        blobs=blobs,
        blobs_ready=blobs_ready,
        bytes=_bound(total),
        bytes_ready=_bound(ready),
        percent=_percent(ready, total, is_complete=blobs_ready == blobs > 0),
    )


def _bound(number: int) -> int:
    """Return what a status can hold: sizes are a tenant's to claim, their sums have no end."""
    return min(number, INT64_MAX)


def _percent(ready: int, total: int, *, is_complete: bool) -> int:
    """Return the floored percentage; 100 exactly when everything is there."""
    if is_complete:
        return 100
    return min(99, ready * 100 // total) if total else 0


def _eviction(
    config: ConfigFacts, totals: Totals, news: EvictionNews, now: datetime.datetime
) -> EvictionStatus:
    before = config.status.eviction if config.status else None
    blobs = totals["evicted_blobs"]
    reasons = dict(news.reasons)
    others = blobs - sum(reasons.values())
    if others > 0:
        # Agents keep their hard limits by themselves and do not tell the operator which.
        reasons[ROOM_FOR_OTHERS] = reasons.get(ROOM_FOR_OTHERS, 0) + others
    last = news.last_time or (before.last_time if before else None)
    if blobs > (before.evicted_blobs if before else 0):
        last = now
    return EvictionStatus(
        last_time=last,
        evicted_blobs=blobs,
        evicted_bytes=totals["evicted_bytes"],
        reasons=dict(sorted(reasons.items())[:REASONS_MAX]),
        plan=news.plan or (before.plan if before else ()),
    )


def _most_common(failures: Mapping[str, Failure]) -> str:
    counted = Counter(failure.reason for failure in failures.values())
    return min(counted, key=lambda reason: (-counted[reason], reason))


def _tell(failures: Mapping[str, Failure], selected: int) -> str:
    """Return how many nodes fail, then the remedy of the commonest reason, with one such node."""
    reason = _most_common(failures)
    of_reason: Sequence[str] = sorted(node for node in failures if failures[node].reason == reason)
    node = of_reason[0]
    return (f"{len(failures)} of {selected} nodes, such as '{node}': {failures[node].message}")[
        :MESSAGE_LENGTH_MAX
    ]
