"""The agent's settings, as values: what the command line and the environment come to."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blobcache_agent.mirror.bindings import Bindings

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ANY_NAMESPACE = "*"
"""In place of a namespace: all of them."""

MIN_FREE_PERCENT_DEFAULT = 20
"""Above the 15 % at which a kubelet starts to evict pods for want of disk."""
MIN_FREE_BYTES_DEFAULT = 1024**3


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a server listens; `host` "" is every interface, `port` 0 a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the form the flags take."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class MinFree:
    """The floor of free space: the larger of a share of the file system and a byte count."""

    percent: int = MIN_FREE_PERCENT_DEFAULT
    bytes: int = MIN_FREE_BYTES_DEFAULT

    def of(self, filesystem_bytes: int) -> int:
        """Return the floor in bytes for a file system of that size."""
        return max(self.bytes, filesystem_bytes * self.percent // 100)


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the administrator gave which namespaces; `ANY_NAMESPACE` stands for all."""

    localfs_roots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Directories below which LocalFS backends of a namespace may read."""
    ambient_namespaces: frozenset[str] = frozenset()
    """Whose S3 configurations without a Secret may use the platform's own credentials."""
    insecure_tls_namespaces: frozenset[str] = frozenset()
    """Whose configurations may skip the check of the origin's certificate."""

    def roots_of(self, namespace: str) -> tuple[str, ...]:
        """Return the directories a namespace may read below."""
        return (
            *self.localfs_roots.get(namespace, ()),
            *self.localfs_roots.get(ANY_NAMESPACE, ()),
        )

    def allows_ambient(self, namespace: str) -> bool:
        """Whether the namespace may use the platform's own credentials."""
        return bool({namespace, ANY_NAMESPACE} & self.ambient_namespaces)

    def allows_insecure_tls(self, namespace: str) -> bool:
        """Whether the namespace may skip the check of certificates."""
        return bool({namespace, ANY_NAMESPACE} & self.insecure_tls_namespaces)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What both ways to run have in common."""

    cache_root: Path
    listen: ListenAddress
    health_listen: ListenAddress | None
    capacity_bytes: int | None = None
    """Of the whole node; None = what the disk has above the floor of free space."""
    min_free: MinFree = field(default_factory=MinFree)
    permissions: Permissions = field(default_factory=Permissions)
    connections_max: int = 4096
    mirrored: Bindings = field(default_factory=lambda: Bindings(()))
    """Registry hosts that containerd pulls from through this agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings(AgentSettings):
    """`blobcache-agent serve`: a node of a cluster, told what to do by the operator."""

    node_name: str
    pod_uid: str
    tls_dir: Path
    control_listen: ListenAddress
    allowed_origin_networks: tuple[Network, ...] = ()
    """Loopback and private networks where origins may nevertheless be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandaloneSettings(AgentSettings):
    """`blobcache-agent standalone`: one machine, configured by files."""

    files: tuple[Path, ...]
