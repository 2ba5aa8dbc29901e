"""From a configuration to its backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.http_proxy import HTTPProxyBackend
from blobcache_storage.backend.localfs import LocalFSBackend
from blobcache_storage.backend.oss import OSSBackend
from blobcache_storage.backend.registry import RegistryBackend
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import (
    AccessKey,
    Ambient,
    Anonymous,
    BasicAuth,
    BearerToken,
    Credentials,
    Pending,
)
from blobcache_storage.errors import ConfigError

INSECURE_TLS_REFUSED: Final = "InsecureTLSRefused"
"""Begins the message of the ConfigError for `insecureSkipVerify` where it is not permitted."""
TIMEOUT_SECONDS_MAX: Final = 3600.0
RETRY_LIMIT_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class BackendEnvironment:
    """What the administrator of this process permits."""

    policy: AddressPolicy = field(default_factory=lambda: AddressPolicy(in_cluster=True))
    """Shared and changed in place when the cluster's own addresses change."""
    localfs_roots: tuple[str, ...] | None = ()
    """Folders below which localfs may read; None permits all, as for a library on one machine."""
    allow_ambient: bool = False
    permit_insecure: bool = False
    """Whether `insecure_skip_verify` is honoured."""


Constructor = Callable[[BackendConfig, BackendEnvironment], BlobBackend]


@dataclass(frozen=True, slots=True)
class _Kind:
    section: str
    """The field of BackendConfig that must be set, and its name in messages."""
    credentials: tuple[type[Credentials], ...]
    construct: Constructor


def _construct_s3(config: BackendConfig, environment: BackendEnvironment) -> BlobBackend:
    # botocore takes 20 MB and a quarter of a second that the other kinds do not need.
    from blobcache_storage.backend.s3 import S3Backend

    return S3Backend(config, policy=environment.policy)


_STATIC: Final = (BasicAuth, BearerToken, Anonymous, Pending)
_KINDS: Final[dict[str, _Kind]] = {
    "s3": _Kind("s3", (AccessKey, Ambient, Anonymous, Pending), _construct_s3),
    "oss": _Kind(
        "oss",
        (AccessKey, Anonymous, Pending),
        lambda config, environment: OSSBackend(config, policy=environment.policy),
    ),
    "registry": _Kind(
        "registry",
        _STATIC,
        lambda config, environment: RegistryBackend(config, policy=environment.policy),
    ),
    "http-proxy": _Kind(
        "http_proxy",
        _STATIC,
        lambda config, environment: HTTPProxyBackend(config, policy=environment.policy),
    ),
    "localfs": _Kind(
        "localfs",
        (Anonymous,),
        lambda config, environment: LocalFSBackend(config, roots=environment.localfs_roots),
    ),
}


def open_backend(config: BackendConfig, *, environment: BackendEnvironment) -> BlobBackend:
    """Return the backend of a configuration. No network; reads the system's TLS roots.

    Raises:
        ConfigError: The type is unknown, its section is missing or wrong, or it asks for
            something the administrator does not permit.
    """
    kind = _KINDS.get(config.type)
    if kind is None:
        raise ConfigError(f"unsupported backend type '{config.type}'")
    if getattr(config, kind.section) is None:
        raise ConfigError(f"a backend of type '{config.type}' must have a `{kind.section}` section")
    check_common(config, environment)
    if not isinstance(config.credentials, kind.credentials):
        raise ConfigError(
            f"a backend of type '{config.type}' cannot use credentials of kind"
            f" '{type(config.credentials).__name__}'"
        )
    return kind.construct(config, environment)


def check_common(config: BackendConfig, environment: BackendEnvironment) -> None:
    """Check what all kinds share.

    Raises:
        ConfigError: A limit is out of its bounds, or something is not permitted.
    """
    if config.insecure_skip_verify and not environment.permit_insecure:
        raise ConfigError(
            f"{INSECURE_TLS_REFUSED}: `tls.insecureSkipVerify` must be permitted by the"
            " administrator"
        )
    if isinstance(config.credentials, Ambient) and not environment.allow_ambient:
        raise ConfigError(
            "the platform's own credentials must be permitted by the administrator"
            " (flag --allow-ambient-credentials)"
        )
    for name in ("timeout_seconds", "connect_timeout_seconds"):
        if not 0 < getattr(config, name) <= TIMEOUT_SECONDS_MAX:
            raise ConfigError(f"`{name}` must be above 0 and at most {TIMEOUT_SECONDS_MAX:g}")
    if not 0 <= config.retry_limit <= RETRY_LIMIT_MAX:
        raise ConfigError(f"`retry_limit` must be from 0 to {RETRY_LIMIT_MAX}")
    if config.bytes_per_second_limit is not None and config.bytes_per_second_limit <= 0:
        raise ConfigError("`bytes_per_second_limit` must be above 0")
