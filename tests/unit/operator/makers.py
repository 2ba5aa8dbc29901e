"""Facts for tests of the operator's pure core, each with defaults that are well."""

from __future__ import annotations

import datetime
from typing import Any

from blobcache_api.agent import DiskReport, PrefetchReport, ProtocolRange
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
from blobcache_api.v1alpha1.node import ConfigState
from blobcache_operator.reconcile import Plan, reconcile
from blobcache_operator.snapshot import (
    AgentFacts,
    ConfigFacts,
    ConfigFigures,
    CredentialFacts,
    Limits,
    NodeFacts,
    ReportFacts,
    Snapshot,
)

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
GIB = 1024**3
S3 = {
    "type": "S3",
    "s3": {"endpoint": "http://s3.example.com", "bucket": "models"},
    "credentialsSecretRef": {"name": "key"},
}


def spec(**changed: Any) -> BlobCacheConfigSpec:
    """Return a spec in API names."""
    backend = {"type": "HTTPProxy", "httpProxy": {"address": "http://origin.example.com"}}
    return BlobCacheConfigSpec.model_validate({"backend": backend, **changed})


def config(name: str, *, age: int = 0, namespace: str = "demo", **changed: Any) -> ConfigFacts:
    """Return a config; a greater `age` is an older one. Further arguments are its spec's."""
    created = (NOW - datetime.timedelta(minutes=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ConfigFacts(
        namespace=namespace,
        name=name,
        uid=f"uid-{namespace}-{name}",
        generation=1,
        created=created,
        spec=spec(**changed),
    )


def report(*figures: ConfigFigures, **changed: Any) -> ReportFacts:
    """Return a report with these configs."""
    values: dict[str, Any] = {
        "agent_version": "0.1.0",
        "start_time": START,
        "incarnation": "first",
        "protocol": ProtocolRange(min=1, max=1),
        "features": frozenset(),
        "disk": DiskReport(
            total_bytes=100 * GIB, available_bytes=50 * GIB, used_bytes=0, min_free_bytes=0
        ),
        "configs": {item.uid: item for item in figures},
    }
    return ReportFacts(**{**values, **changed})


def agent(node: str, *figures: ConfigFigures, **changed: Any) -> AgentFacts:
    """Return an agent that answers."""
    return AgentFacts(node=node, report=report(*figures, **changed), is_asked=True)


def figures(of: ConfigFacts, digest: str = "", **changed: Any) -> ConfigFigures:
    """Return what an agent says of a config that it runs."""
    values: dict[str, Any] = {
        "namespace": of.namespace,
        "name": of.name,
        "uid": of.uid,
        "applied_digest": digest,
        "state": ConfigState.APPLIED,
    }
    return ConfigFigures(**{**values, **changed})


def prefetch(ready: int, of: int, size: int = 10, problem: str | None = None) -> PrefetchReport:
    """Return progress of `of` blobs of `size` bytes each."""
    return PrefetchReport(
        blobs=of, blobs_ready=ready, bytes=of * size, bytes_ready=ready * size, problem=problem
    )


def snapshot(
    *configs: ConfigFacts,
    agents: tuple[AgentFacts, ...] = (),
    labels: dict[str, dict[str, str]] | None = None,
    credentials: dict[str, CredentialFacts] | None = None,
    deleted: frozenset[str] = frozenset(),
) -> Snapshot:
    """Return a snapshot whose nodes are the agents', with these labels."""
    nodes = {
        item.node: NodeFacts(item.node, f"uid-{item.node}", (labels or {}).get(item.node, {}))
        for item in agents
    }
    return Snapshot(
        now=NOW,
        configs=configs,
        nodes=nodes,
        agents={item.node: item for item in agents},
        credentials=credentials or {},
        deleted_uids=deleted,
    )


def plan(facts: Snapshot, **limits: Any) -> Plan:
    """Return the plan under these limits."""
    return reconcile(facts, Limits(**limits))


def names(made: Plan, node: str) -> list[str]:
    """Return the names of the configs a node should run."""
    return [item.name for item in made.nodes[node].configs]
