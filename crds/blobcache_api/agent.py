"""Messages between operator and agent: desired state, report, evictions.

Everything is bounded, unknown fields are refused and no error quotes its input. Secret values
leave this module in `dump_for_push` only.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import from_json

from blobcache_api.pushed_credentials import (
    REVEAL,
)
from blobcache_api.pushed_credentials import CredentialsState as CredentialsState
from blobcache_api.pushed_credentials import PushedCredentials as PushedCredentials
from blobcache_api.rules import Rule
from blobcache_api.v1alpha1.common import (
    UID,
    BlobID,
    Count,
    Flag,
    MalformedError,
    Message,
    Model,
    Namespace,
    NodeName,
    Reason,
    ResourceName,
    Time,
    describe_errors,
)
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
from blobcache_api.v1alpha1.node import CONFIGS_MAX, ConfigState, Digest

PROTOCOL_VERSION = 1
"""Version of these messages; agents report the range they speak."""

STATE_SIZE_BYTES_MAX = 16 * 1024 * 1024
REPORT_SIZE_BYTES_MAX = 4 * 1024 * 1024
EVICTION_SIZE_BYTES_MAX = 1024 * 1024
DEPTH_MAX = 32
"""Objects and lists inside each other in a message."""
TOMBSTONES_MAX = 4096
DENIED_ADDRESSES_MAX = 16384
CANDIDATES_MAX = 256
VICTIMS_MAX = 256
KEYS_MAX = 32
"""Keys of the cluster's token issuer."""

Unix = Annotated[float, Field(ge=0, le=2**40)]
"""Seconds since 1970 with a fraction."""

Text = Annotated[str, Field(max_length=256)]
"""A short string of a program: version, boot id, blob version."""


class PushedConfig(Model):
    """One BlobCacheConfig with all that a node needs to run it."""

    namespace: Namespace
    """The config's namespace."""
    name: ResourceName
    """The config's name."""
    uid: UID
    """The config's uid."""
    generation: Count
    """Generation of the spec."""
    spec: BlobCacheConfigSpec
    """The spec, with the administrator's caps applied."""
    credentials: PushedCredentials | None = None
    """Present exactly when `credentials_state` is Present."""
    credentials_state: CredentialsState = CredentialsState.NOT_REQUIRED
    """Whether the origin needs credentials and has them."""
    digest: Digest = ""
    """Digest of the above and of the Secret's version; see `seal_config`."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="",
            message="`credentials` must be set exactly when `credentialsState` is 'Present'",
            holds=lambda config: (
                (config.credentials is not None)
                == (config.credentials_state is CredentialsState.PRESENT)
            ),
        ),
    )


def _require_network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError("must be an IP address or a CIDR range") from None
    return value


DeniedAddress = Annotated[str, Field(max_length=64), AfterValidator(_require_network)]
"""An IP address or CIDR range."""


class DesiredState(Model):
    """The whole desired state of one node: what is not in it is not wanted."""

    protocol_version: Annotated[int, Field(strict=True, ge=1, le=1000)] = PROTOCOL_VERSION
    """Version of the messages."""
    epoch: Count
    """Microseconds of the leader's acquisition; grows with every leader."""
    revision: Count
    """Counts states within the epoch."""
    digest: Digest = ""
    """Digest of everything but epoch, revision and itself; see `seal_state`."""
    node: NodeName
    """Node this state is for."""
    configs: Annotated[tuple[PushedConfig, ...], Field(max_length=CONFIGS_MAX)] = ()
    """Configs that select the node."""
    tombstones: Annotated[tuple[UID, ...], Field(max_length=TOMBSTONES_MAX)] = ()
    """Uids of deleted configs: their bytes are deleted."""
    denied_addresses: Annotated[
        tuple[DeniedAddress, ...], Field(max_length=DENIED_ADDRESSES_MAX)
    ] = ()
    """Addresses no origin may have: nodes and the API server."""
    jwks: dict[str, Any] = Field(default_factory=dict)
    """The cluster's JSON web key set, which verifies readers' tokens; empty where unknown."""
    issuer: Annotated[str, Field(max_length=2048)] = ""
    """Issuer of readers' tokens."""

    @field_validator("jwks")
    @classmethod
    def _check_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        keys = value.get("keys", [])
        if not isinstance(keys, list) or len(keys) > KEYS_MAX or set(value) - {"keys"}:
            raise ValueError(f"must be empty or a key set of at most {KEYS_MAX} keys")
        if len(json.dumps(value)) > 64 * 1024:
            raise ValueError("must be at most 64 KiB")
        return value

    @field_validator("configs")
    @classmethod
    def _check_unique(cls, value: tuple[PushedConfig, ...]) -> tuple[PushedConfig, ...]:
        names = {(config.namespace, config.name) for config in value}
        if len(names) != len(value) or len({config.uid for config in value}) != len(value):
            raise ValueError("must hold each config once")
        return value


class ConfigResult(Model):
    """What became of one config of a pushed state."""

    namespace: Namespace
    name: ResourceName
    uid: UID
    applied: Flag
    reason: Reason | None = None
    """Why not; absent when applied."""
    message: Message = ""
    """The same for people."""
    digest: Digest = ""
    """Digest of what the agent runs now."""


class ApplyResult(Model):
    """Answer to a state that was taken."""

    epoch: Count
    revision: Count
    digest: Digest
    configs: Annotated[tuple[ConfigResult, ...], Field(max_length=CONFIGS_MAX)] = ()


class StaleState(Model):
    """Answer (409) to a state older than the one the agent has: the newest it has seen."""

    epoch: Count
    revision: Count


class ProtocolRange(Model):
    """Versions of these messages an agent speaks, both included."""

    min: Annotated[int, Field(strict=True, ge=1, le=1000)]
    max: Annotated[int, Field(strict=True, ge=1, le=1000)]


class DiskReport(Model):
    """The file system of the cache root."""

    total_bytes: Count
    available_bytes: Count
    used_bytes: Count
    """Taken by the cache."""
    capacity_bytes: Count | None = None
    """What the cache may take; absent where only free space limits it."""
    min_free_bytes: Count
    pressure: Flag = False
    """Whether less than `min_free_bytes` is available."""
    problem: Message = ""
    """What is wrong with the disk, for people; empty when nothing is."""


class PrefetchReport(Model):
    """How far a config's prefetch list is on this node."""

    blobs: Count
    blobs_ready: Count
    bytes: Count
    """Bytes of all blobs whose size is known."""
    bytes_ready: Count
    problem: Reason | None = None
    """Why it does not go on, such as PrefetchExceedsCapacity."""


class ConfigReport(Model):
    """One config on this node; counters run since the agent started."""

    namespace: Namespace
    name: ResourceName
    uid: UID
    applied_digest: Digest = ""
    """Digest of what the agent runs; empty when nothing."""
    state: ConfigState
    reason: Reason | None = None
    message: Message = ""
    bytes: Count = 0
    """Bytes on disk."""
    blobs: Count = 0
    requests: Count = 0
    hit_bytes: Count = 0
    miss_bytes: Count = 0
    origin_bytes: Count = 0
    """Bytes fetched, prefetch included."""
    origin_errors: Count = 0
    evicted_blobs: Count = 0
    evicted_bytes: Count = 0
    prefetch: PrefetchReport | None = None
    """Absent without a prefetch list."""
    degraded_reason: Reason | None = None
    """What fails though the config is applied; absent when nothing does."""
    degraded_message: Message = ""


class Candidate(Model):
    """A blob that could go, among the coldest of the node."""

    config_uid: UID
    blob_id: BlobID
    blob_version: Text
    """Tells generations of one id apart."""
    bytes: Count
    last_read_time: Unix
    in_use: Flag = False
    pinned: Flag = False
    wanted: Flag = False
    """Named by a prefetch list."""
    orphan: Flag = False
    """Of a config that is no longer in the state."""


class Report(Model):
    """What an agent says of itself."""

    node: NodeName
    boot_id: Text
    """Changes when the machine starts."""
    pod_uid: Annotated[str, Field(max_length=64)] = ""
    agent_version: Annotated[str, Field(max_length=64)]
    start_time: Time
    protocol: ProtocolRange
    features: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(max_length=64)
    ] = ()
    """What this agent can do beyond the first version."""
    epoch: Count = 0
    """Of the newest state seen; 0 before the first."""
    revision: Count = 0
    digest: Digest = ""
    """Digest of the newest state."""
    change: Count
    """Moves on state changes; the N of `after=N`."""
    disk: DiskReport
    configs: Annotated[tuple[ConfigReport, ...], Field(max_length=CONFIGS_MAX)] = ()
    candidates: Annotated[tuple[Candidate, ...], Field(max_length=CANDIDATES_MAX)] = ()
    """The coldest blobs."""
    orphan_bytes: Count = 0


class Victim(Model):
    """A blob to evict, if nobody read it since."""

    config_uid: UID
    blob_id: BlobID
    blob_version: Text
    last_read_before: Unix
    """Read at or after this time, it stays."""
    reason: Reason


class EvictionRequest(Model):
    """Blobs to evict."""

    victims: Annotated[tuple[Victim, ...], Field(max_length=VICTIMS_MAX)]


class EvictionOutcome(StrEnum):
    """What became of a victim."""

    EVICTED = "evicted"
    IN_USE = "inUse"
    PINNED = "pinned"
    CHANGED = "changed"
    UNKNOWN = "unknown"


class EvictionResult(Model):
    """What became of one victim."""

    config_uid: UID
    blob_id: BlobID
    outcome: EvictionOutcome
    bytes: Count = 0
    """Bytes freed."""


class EvictionResponse(Model):
    """A result per victim, in the order asked."""

    results: Annotated[tuple[EvictionResult, ...], Field(max_length=VICTIMS_MAX)] = ()


M = TypeVar("M", bound=Model)


def parse_message(model: type[M], raw: bytes, *, size_bytes_max: int) -> M:
    """
    Read a message.

    Raises:
        MalformedError: Too large, too deep, not JSON, or not this message; no value is quoted.
    """
    if len(raw) > size_bytes_max:
        raise MalformedError(f"the message must be at most {size_bytes_max} bytes")
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError:
        # The parser's text quotes nothing but may come to; positions help nobody here.
        raise MalformedError("the message must be JSON") from None
    _check_depth(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise MalformedError(describe_errors(error)) from None


def parse_state(raw: bytes) -> DesiredState:
    """Read a desired state of at most `STATE_SIZE_BYTES_MAX`; see `parse_message`."""
    return parse_message(DesiredState, raw, size_bytes_max=STATE_SIZE_BYTES_MAX)


def parse_report(raw: bytes) -> Report:
    """Read a report of at most `REPORT_SIZE_BYTES_MAX`; see `parse_message`."""
    return parse_message(Report, raw, size_bytes_max=REPORT_SIZE_BYTES_MAX)


def dump_message(message: Model) -> bytes:
    """Return a message's JSON; secrets in it are masked."""
    return message.model_dump_json(exclude_none=True).encode()


def dump_for_push(state: DesiredState) -> bytes:
    """Return a state's JSON for the wire, secret values included."""
    return state.model_dump_json(exclude_none=True, context={REVEAL: True}).encode()


def dump_for_disk(state: DesiredState) -> bytes:
    """
    Return a state's JSON without credentials: where some were, they are Pending.

    Digests stay, so they say what was applied, not that its credentials are here.
    """
    return dump_message(drop_credentials(state))


def drop_credentials(state: DesiredState) -> DesiredState:
    """Return the state as a restarted agent knows it: credentials that were there are Pending."""
    pending = {"credentials": None, "credentials_state": CredentialsState.PENDING}
    configs = tuple(
        config if config.credentials is None else config.model_copy(update=pending)
        for config in state.configs
    )
    return state.model_copy(update={"configs": configs})


def seal_config(
    config: PushedConfig, *, secret_version: str = "", digest_key: bytes = b""
) -> PushedConfig:
    """
    Return the config with its digest set.

    Args:
        config: Its own digest is ignored.
        secret_version: The Secret's uid and resourceVersion; empty without one.
        digest_key: Secret of the caller. Digests stand in status, where a weak password could be
            guessed from them; so values are hashed only under a key, and left out without one.
    """
    body = config.model_dump(mode="json", exclude={"digest", "credentials"}, exclude_none=True)
    credentials = config.credentials
    if credentials is not None:
        body["credentialKeys"] = sorted(credentials.model_dump(exclude_none=True))
        if digest_key:
            values = _canonical(list(credentials.secret_values()) + _public_values(credentials))
            body["credentials"] = hmac.new(digest_key, values, hashlib.sha256).hexdigest()
    body["secretVersion"] = secret_version
    return config.model_copy(update={"digest": _hash(body)})


def state_digest(state: DesiredState) -> str:
    """Return the digest of a state of sealed configs: of all but epoch, revision and digest."""
    own = {"epoch", "revision", "digest", "configs"}
    body = state.model_dump(mode="json", exclude=own, exclude_none=True)
    body["tombstones"] = sorted(state.tombstones)
    body["deniedAddresses"] = sorted(state.denied_addresses)
    body["configs"] = sorted([config.uid, config.digest] for config in state.configs)
    return _hash(body)


def seal_state(state: DesiredState) -> DesiredState:
    """Return the state with its digest set; its configs must be sealed."""
    return state.model_copy(update={"digest": state_digest(state)})


def _public_values(credentials: PushedCredentials) -> list[str]:
    return [credentials.access_key_id or "", credentials.username or ""]


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _hash(body: Any) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _check_depth(body: Any) -> None:
    """Walk level by level; the parser's own limit is some hundreds, deep enough to hurt models."""
    level = [body]
    for _ in range(DEPTH_MAX):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    if any(isinstance(node, dict | list) for node in level):
        raise MalformedError(f"the message must be at most {DEPTH_MAX} levels deep")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
