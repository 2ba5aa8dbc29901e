"""
Facts, as of one moment: what the pure core works on. Frozen, small, without behaviour.

There may be a thousand nodes with hundreds of configs each, so what reports say is kept in slotted
objects rather than in the models that validated it.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from blobcache_api.agent import DiskReport, PrefetchReport, ProtocolRange
from blobcache_api.pushed_credentials import PushedCredentials
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec, BlobCacheConfigStatus
from blobcache_api.v1alpha1.node import ConfigState


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something is not as wanted: a CamelCase word and a sentence."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """One BlobCacheConfig as listed; `spec` is None when it does not fit its model."""

    namespace: str
    name: str
    uid: str
    generation: int
    created: str
    spec: BlobCacheConfigSpec | None
    problem: str = ""
    status: BlobCacheConfigStatus | None = None

    @property
    def key(self) -> str:
        """`namespace/name`, as people write it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One Node: its metadata and addresses."""

    name: str
    uid: str
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CredentialFacts:
    """
    What a config's Secret gave.

    Args:
        credentials: None when none are needed, or when `problem` is set.
        version: The Secret's uid and resourceVersion.
        problem: Why there are none, with the remedy.
    """

    credentials: PushedCredentials | None = None
    version: str = ""
    problem: Failure | None = None


@dataclass(frozen=True, slots=True)
class ConfigFigures:
    """One config on one node, as reported; counters run since the agent's start."""

    namespace: str
    name: str
    uid: str
    applied_digest: str
    state: ConfigState
    failure: Failure | None = None
    degraded: Failure | None = None
    bytes: int = 0
    blobs: int = 0
    requests: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    origin_bytes: int = 0
    origin_errors: int = 0
    evicted_blobs: int = 0
    evicted_bytes: int = 0
    prefetch: PrefetchReport | None = None


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """One agent's report without its candidates."""

    agent_version: str
    start_time: datetime.datetime
    incarnation: str
    protocol: ProtocolRange
    features: frozenset[str]
    disk: DiskReport
    configs: Mapping[str, ConfigFigures]
    orphan_uids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """
    One agent as this leadership knows it.

    Args:
        failure: Why it does not answer; None when it does, or was not asked yet.
        push_failure: Why it did not take the last push as a whole, although it answers.
        report: The last report; kept while the agent is away, for its bytes are still there.
        refusals: Per config uid, what the agent said to the last push.
        is_asked: False until the first answer or failure.
    """

    node: str
    failure: Failure | None = None
    push_failure: Failure | None = None
    report: ReportFacts | None = None
    refusals: Mapping[str, Failure] = field(default_factory=dict)
    is_asked: bool = False

    @property
    def is_available(self) -> bool:
        """Whether it answers."""
        return self.failure is None and self.report is not None


@dataclass(frozen=True, slots=True)
class Limits:
    """The administrator's bounds; bytes, and bytes per second; None is no bound."""

    configs_per_node: int = 256
    configs_per_namespace: int = 32
    capacity: int | None = None
    namespace_capacity: int | None = None
    protected_percent: int = 50
    origin_rate: int | None = None
    namespace_origin_rate: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a plan depends on."""

    now: datetime.datetime
    configs: tuple[ConfigFacts, ...] = ()
    nodes: Mapping[str, NodeFacts] = field(default_factory=dict)
    agents: Mapping[str, AgentFacts] = field(default_factory=dict)
    credentials: Mapping[str, CredentialFacts] = field(default_factory=dict)
    deleted_uids: frozenset[str] = frozenset()
