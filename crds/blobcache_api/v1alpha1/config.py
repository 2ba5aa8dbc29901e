"""BlobCacheConfig: where blobs live and how each node caches them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, Field, ValidationError

from blobcache_api.quantity import CEL_BYTES, Quantity, Rate, format_quantity
from blobcache_api.rules import Rule, TransitionRule
from blobcache_api.v1alpha1.backend import BACKEND_TYPE_RULE, BackendSpec
from blobcache_api.v1alpha1.common import (
    BlobID,
    Condition,
    Count,
    Flag,
    MalformedError,
    Message,
    Model,
    NodeName,
    ObjectMeta,
    Percent,
    Reason,
    Time,
    describe_errors,
)

KIND = "BlobCacheConfig"
CHUNK_SIZES_BYTES = tuple(2**power for power in range(14, 25))
"""Powers of two from 16Ki to 16Mi."""
CHUNK_SIZE_BYTES_DEFAULT = 64 * 1024
TTL_SECONDS_MIN = 60
TTL_SECONDS_MAX = 10 * 366 * 24 * 3600
BLOBS_MAX = 1000
"""Blobs in a prefetch list, and in a list of pinned ones."""
FAILURES_MAX = 10
PLAN_MAX = 10


class Readers(StrEnum):
    """Whose pods may read."""

    NAMESPACE = "Namespace"
    CLUSTER = "Cluster"


class CacheType(StrEnum):
    """How blobs are kept."""

    FILE_CACHE = "FileCache"
    NONE = "None"


class EvictionPolicy(StrEnum):
    """What makes room."""

    LRU = "LRU"
    NONE = "None"


_CHUNK_SIZE_RULE = Rule(
    cel=f"{CEL_BYTES} in [{', '.join(f'{size}.0' for size in CHUNK_SIZES_BYTES)}]",
    message="must be a power of two from 16Ki to 16Mi",
    holds=lambda size: size in CHUNK_SIZES_BYTES,
)
_CACHE_TYPE_TRANSITION = TransitionRule(
    cel="self == oldSelf",
    message="`spec.cache.type` may not change; create another BlobCacheConfig",
    allows=lambda new, old: bool(new == old),
)
_CHUNK_SIZE_TRANSITION = TransitionRule(
    cel=f"{CEL_BYTES} == {CEL_BYTES.replace('self', 'oldSelf')}",
    message="`spec.cache.chunkSize` may not change; create another BlobCacheConfig",
    allows=lambda new, old: bool(new == old),
)


class CacheSpec(Model):
    """How a node keeps what it fetched."""

    type: Annotated[CacheType, _CACHE_TYPE_TRANSITION] = CacheType.FILE_CACHE
    """FileCache keeps blobs in files; None passes every read through. May not change."""
    chunk_size: Annotated[
        Quantity,
        _CHUNK_SIZE_RULE,
        _CHUNK_SIZE_TRANSITION,
        Field(json_schema_extra={"default": format_quantity(CHUNK_SIZE_BYTES_DEFAULT)}),
    ] = CHUNK_SIZE_BYTES_DEFAULT
    """Unit of verification and record, not of transfer: a power of two. May not change."""
    capacity: Quantity | None = None
    """Bytes this config takes of each node's disk at most; absent: only the node's limit counts."""
    validate_blobs: Flag = Field(default=True, alias="validate")
    """False skips digests of whole blobs, never the checksum of each chunk."""
    ttl_seconds: (
        Annotated[int, Field(strict=True, ge=TTL_SECONDS_MIN, le=TTL_SECONDS_MAX)] | None
    ) = None
    """Evict what was not read for so long; absent means never for that reason."""


class PrefetchBlob(Model):
    """A blob to warm."""

    id: BlobID
    """The blob's id, as in the path readers use."""
    size: Annotated[int, Field(strict=True, ge=0, le=2**53)] | None = None
    """Bytes of the blob, where known."""
    digest: (
        Annotated[
            str,
            Field(max_length=71),
            Rule(
                cel="self.matches('^sha256:[0-9a-f]{64}$')",
                message="must be 'sha256:' and 64 lower-case hexadecimal digits",
                holds=lambda text: re.fullmatch("sha256:[0-9a-f]{64}", text) is not None,
            ),
        ]
        | None
    ) = None
    """Digest that the blob must have, where known."""


def _require_unique_blobs(blobs: tuple[PrefetchBlob, ...]) -> tuple[PrefetchBlob, ...]:
    """The list's type in the schema (map by id) says the same on the API server."""
    _require_unique(tuple(blob.id for blob in blobs))
    return blobs


def _require_unique(ids: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(ids)) != len(ids):
        raise ValueError("must name each blob once")
    return ids


class PrefetchSpec(Model):
    """What nodes fetch before anybody asks."""

    max_nodes: Annotated[int, Field(strict=True, ge=1, le=10000)] = 20
    """Nodes that warm at one time at most."""
    bytes_per_second_limit: Rate | None = None
    """Bytes per second that each node prefetches at most; absent means no limit."""
    blobs: Annotated[
        tuple[PrefetchBlob, ...],
        Field(
            max_length=BLOBS_MAX,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["id"],
            },
        ),
        AfterValidator(_require_unique_blobs),
    ] = ()
    """Blobs to warm, the most wanted first."""


class EvictionSpec(Model):
    """What makes room on a node, and when."""

    policy: EvictionPolicy = EvictionPolicy.LRU
    """LRU evicts what was not read for longest; None admits nothing more once full."""
    high_watermark_percent: Annotated[int, Field(strict=True, ge=1, le=100)] = 90
    """Percent of the capacity above which blobs are evicted."""
    low_watermark_percent: Annotated[int, Field(strict=True, ge=0, le=99)] = 80
    """Percent of the capacity down to which they are evicted."""
    pinned: Annotated[
        tuple[BlobID, ...],
        Field(max_length=BLOBS_MAX, json_schema_extra={"x-kubernetes-list-type": "set"}),
        AfterValidator(_require_unique),
    ] = ()
    """Ids of blobs that are not evicted."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="self.lowWatermarkPercent < self.highWatermarkPercent",
            message="`lowWatermarkPercent` must be less than `highWatermarkPercent`",
            holds=lambda spec: spec.low_watermark_percent < spec.high_watermark_percent,
        ),
    )


_LABEL_NAME = "([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
_LABEL_KEY = rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL_NAME}"

LabelValue = Annotated[str, Field(max_length=63, pattern=f"^{_LABEL_NAME}?$")]

_SELECTOR_RULE = Rule(
    cel=f"self.all(key, key.matches('^{_LABEL_KEY}$'))",
    message="must have label names as keys, such as 'kubernetes.io/arch'",
    holds=lambda labels: all(re.fullmatch(_LABEL_KEY, key, re.ASCII) for key in labels),
)


class BlobCacheConfigSpec(Model):
    """Where blobs live and how a node caches them."""

    suspend: Flag = False
    """True lets misses pass uncached and stops prefetching; what is cached is still served."""
    node_selector: Annotated[
        dict[str, LabelValue],
        Field(max_length=16, json_schema_extra={"x-kubernetes-map-type": "atomic"}),
        _SELECTOR_RULE,
    ] = Field(default_factory=dict)
    """Labels of the nodes that cache; empty means every node with an agent."""
    readers: Readers = Readers.NAMESPACE
    """Whose pods may read: Namespace for this config's, Cluster for all."""
    backend: BackendSpec
    """Where the blobs live. A blob is expected never to change: a complete one is not checked
    again at its origin, so a key that was overwritten keeps its cached version until evicted."""
    cache: CacheSpec = Field(default_factory=CacheSpec, json_schema_extra={"default": {}})
    """How a node keeps blobs."""
    prefetch: PrefetchSpec | None = None
    """What nodes fetch before anybody asks."""
    eviction: EvictionSpec = Field(
        default_factory=EvictionSpec,
        # The server checks a default by the rules before it fills in defaults of its parts.
        json_schema_extra={"default": {"highWatermarkPercent": 90, "lowWatermarkPercent": 80}},
    )
    """What makes room, and when."""


class NodeFailure(Model):
    """A node that could not apply or serve this config."""

    node: NodeName
    """Name of the node."""
    reason: Reason
    """CamelCase word that says why."""
    message: Message
    """What is wrong there and what to do."""


class NodesStatus(Model):
    """Roll-up of the nodes."""

    selected: Count
    """Nodes that the selector matches and that run an agent."""
    available: Count
    """Selected nodes whose agent answers."""
    ready: Count
    """Available nodes that applied this very configuration."""
    failed: Count
    """Selected nodes whose agent does not answer, or could not apply it."""
    summary: Annotated[str, Field(max_length=32)]
    """Ready and selected nodes, such as '3/5'."""
    failures: Annotated[
        tuple[NodeFailure, ...],
        Field(
            max_length=FAILURES_MAX,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["node"],
            },
        ),
    ] = ()
    """Some of the failures, at most 10."""


class UsageStatus(Model):
    """What is on the selected nodes' disks, summed up."""

    bytes: Count
    """Bytes cached."""
    blobs: Count
    """Blobs of which something is cached."""
    capacity_bytes: Count | None = None
    """Capacity of all selected nodes; absent where the config sets none."""
    cached: Annotated[str, Field(max_length=16)]
    """The bytes cached, for people: '50Gi'."""


class TrafficStatus(Model):
    """Figures of the selected nodes' agents since they started, summed up."""

    since: Time
    """When the oldest of these figures began to count."""
    requests: Count
    """Reads by pods."""
    hit_bytes: Count
    """Bytes served from the cache."""
    miss_bytes: Count
    """Bytes served that had to be fetched."""
    origin_bytes: Count
    """Bytes fetched from the origin, prefetch included."""
    origin_errors: Count
    """Failed requests to the origin."""
    hit_ratio_percent: Percent | None = None
    """Bytes served from the cache of all bytes served; absent before the first read."""


class PrefetchStatus(Model):
    """How far the prefetch list is on the selected nodes, summed up."""

    blobs: Count
    """Blobs to warm on all selected nodes."""
    blobs_ready: Count
    """Those that are complete."""
    bytes: Count
    """Their bytes, as far as sizes are known."""
    bytes_ready: Count
    """Bytes that are there."""
    percent: Percent
    """Rounded down; 100 only when all bytes are there."""


class PlannedEviction(Model):
    """A blob that goes, or went last."""

    node: NodeName
    """Node it is on."""
    blob: BlobID
    """Id of the blob."""
    bytes: Count
    """Bytes it takes there."""
    reason: Reason
    """Why it goes."""


class EvictionStatus(Model):
    """What made room."""

    last_time: Time | None = None
    """When blobs were last evicted."""
    evicted_blobs: Count = 0
    """Blobs evicted since the agents started."""
    evicted_bytes: Count = 0
    """Their bytes."""
    reasons: Annotated[dict[Annotated[str, Field(max_length=64)], Count], Field(max_length=16)] = (
        Field(default_factory=dict)
    )
    """Evicted blobs by reason."""
    plan: Annotated[
        tuple[PlannedEviction, ...],
        Field(max_length=PLAN_MAX, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = ()
    """Some of the latest plan, at most 10."""


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]
"""Conditions, one of each type."""


class BlobCacheConfigStatus(Model):
    """What was last observed; a roll-up of fixed size, the nodes' own are BlobCacheNodes."""

    observed_generation: Count | None = None
    """Generation of the spec that this status is about."""
    conditions: Conditions = ()
    """Ready, Degraded, CredentialsValid and Warm."""
    nodes: NodesStatus | None = None
    """Nodes, counted."""
    usage: UsageStatus | None = None
    """Bytes on disk."""
    traffic: TrafficStatus | None = None
    """Reads and fetches."""
    prefetch: PrefetchStatus | None = None
    """Progress of the prefetch list."""
    eviction: EvictionStatus | None = None
    """What made room."""


class BlobCacheConfig(Model):
    """A set of blobs at one origin and how the nodes cache them."""

    api_version: Literal["blobcache.dev/v1alpha1"]
    """Group and version."""
    kind: Literal["BlobCacheConfig"]
    """Kind."""
    metadata: ObjectMeta
    """Name and namespace."""
    spec: BlobCacheConfigSpec
    """What is wanted."""
    status: BlobCacheConfigStatus | None = None
    """What was observed."""


def from_resource(body: Mapping[str, Any]) -> BlobCacheConfig:
    """
    Read a BlobCacheConfig object as the API server or a YAML file has it.

    The status is not read: it is the operator's own, and a bad one shall not stop the config.

    Raises:
        MalformedError: It is none, or a field is wrong; the message names each such field.
    """
    wanted = {key: value for key, value in body.items() if key != "status"}
    try:
        return BlobCacheConfig.model_validate(wanted)
    except ValidationError as error:
        raise MalformedError(f"{_name_of(body)} is malformed: {describe_errors(error)}") from None


def find_forbidden_changes(new: BlobCacheConfigSpec, old: BlobCacheConfigSpec) -> list[str]:
    """Return the sentence of each immutable field that differs, as the API server tells it."""
    pairs = (
        (BACKEND_TYPE_RULE, new.backend.type, old.backend.type),
        (_CACHE_TYPE_TRANSITION, new.cache.type, old.cache.type),
        (_CHUNK_SIZE_TRANSITION, new.cache.chunk_size, old.cache.chunk_size),
    )
    return [rule.message for rule, after, before in pairs if not rule.allows(after, before)]


def _name_of(body: Mapping[str, Any]) -> str:
    """Return kind, namespace and name for a message, whatever the body is."""
    metadata = body.get("metadata")
    known = cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}
    namespace = str(known.get("namespace", "default"))[:63]
    return f"{KIND} '{namespace}/{str(known.get('name', ''))[:63]}'"
