"""BlobCacheNode: what one node's agent caches; status only, written by the operator."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from blobcache_api.v1alpha1.common import (
    UID,
    Count,
    Flag,
    Message,
    Model,
    Namespace,
    Percent,
    Reason,
    ResourceName,
    Time,
)
from blobcache_api.v1alpha1.config import Conditions

KIND = "BlobCacheNode"
CONFIGS_MAX = 256
"""Configs on one node."""

Digest = Annotated[str, Field(max_length=64, pattern="^([0-9a-f]{64})?$")]
"""Digest of what was applied, 64 hexadecimal digits; empty where nothing was."""


class ConfigState(StrEnum):
    """Where an agent is with a config."""

    APPLIED = "Applied"
    FAILED = "Failed"
    PENDING = "Pending"


class NodeConfigStatus(Model):
    """One config on this node."""

    namespace: Namespace
    """The config's namespace."""
    name: ResourceName
    """The config's name."""
    uid: UID
    """The config's uid."""
    applied_digest: Digest = ""
    """Digest of the configuration the agent runs."""
    state: ConfigState
    """Applied, Failed or Pending."""
    reason: Reason | None = None
    """Why it is not applied, or serves badly."""
    message: Message = ""
    """The same for people."""
    bytes: Count = 0
    """Bytes on this node's disk."""
    blobs: Count = 0
    """Blobs of which something is there."""
    hit_bytes: Count = 0
    """Bytes served from the cache since the agent started."""
    miss_bytes: Count = 0
    """Bytes served that had to be fetched."""
    origin_bytes: Count = 0
    """Bytes fetched from the origin, prefetch included."""
    warm_percent: Percent | None = None
    """How much of the prefetch list is there; absent without one."""


class DiskStatus(Model):
    """The file system of the cache root."""

    total_bytes: Count
    """Size of the file system."""
    available_bytes: Count
    """Free for the agent."""
    used_bytes: Count
    """Taken by the cache."""
    capacity_bytes: Count | None = None
    """What the cache may take; absent where only free space limits it."""
    min_free_bytes: Count
    """What the cache leaves free."""
    pressure: Flag = False
    """Whether less than that is free."""
    cached: Annotated[str, Field(max_length=16)] = ""
    """The bytes taken, for people: '50Gi'."""


class BlobCacheNodeStatus(Model):
    """What was last reported by the node's agent."""

    agent_version: Annotated[str, Field(max_length=64)] = ""
    """Version of the agent."""
    start_time: Time | None = None
    """When the agent started; figures count from then."""
    conditions: Conditions = ()
    """Ready, DiskPressure and OriginReachable."""
    disk: DiskStatus | None = None
    """The cache's file system."""
    configs: Annotated[
        tuple[NodeConfigStatus, ...],
        Field(
            max_length=CONFIGS_MAX,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["namespace", "name"],
            },
        ),
    ] = ()
    """Configs on this node."""
