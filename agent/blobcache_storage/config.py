"""Configuration of a cache manager: Nydus's ConfigV2 and what Blobcache adds to it.

Values only. Reading Nydus files (JSON v2, TOML v2, legacy JSON) is `nydus_config.py`'s job;
building one from a BlobCacheConfig resource is the agent's.
Nydus: `api/src/config.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blobcache_storage.credentials import Anonymous, Credentials
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import ConfigError

CHUNK_SIZE_BYTES_DEFAULT = 64 * 1024


@dataclass(frozen=True, slots=True)
class S3Config:
    """`endpoint` is a URL without userinfo, query or fragment."""

    endpoint: str
    region: str
    bucket: str
    prefix: str = ""
    virtual_host: bool = False


@dataclass(frozen=True, slots=True)
class OSSConfig:
    """Alibaba Cloud OSS; `virtual_host` False addresses path style (IP endpoints, fakes)."""

    endpoint: str
    bucket: str
    prefix: str = ""
    region: str = ""
    virtual_host: bool = True
    signature: str = "V4"
    """V4 or V1; V4 needs `region` (taken from the endpoint's name where it is empty)."""


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """`host` is name[:port]; without `repository` each blob id names its own."""

    host: str
    repository: str = ""
    scheme: str = "https"


@dataclass(frozen=True, slots=True)
class HTTPProxyConfig:
    """A blob is `{address}{path}/{blob_id}`."""

    address: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class LocalFSConfig:
    """Blobs are files below `directory`; Nydus's `blob_file` and `alt_dirs` are honoured."""

    directory: str = ""
    blob_file: str = ""
    alt_directories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Where blobs come from; exactly the section that `type` names is set."""

    type: str
    """oss, s3, registry, http-proxy or localfs."""
    s3: S3Config | None = None
    oss: OSSConfig | None = None
    registry: RegistryConfig | None = None
    http_proxy: HTTPProxyConfig | None = None
    localfs: LocalFSConfig | None = None
    credentials: Credentials = field(default_factory=Anonymous)
    ca_bundle_pem: str = ""
    insecure_skip_verify: bool = False
    timeout_seconds: float = 5.0
    """For the answer's head, and for each further 64 KiB of the body."""
    connect_timeout_seconds: float = 5.0
    retry_limit: int = 3
    bytes_per_second_limit: int | None = None


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """What is warmed without being asked for."""

    enable: bool = False
    blobs: tuple[BlobInfo, ...] = ()
    bytes_per_second_limit: int | None = None
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How blobs are kept; `type` blobcache or filecache, anything else passes through."""

    type: str = "filecache"
    work_dir: str = "."
    chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT
    capacity_bytes: int | None = None
    validate: bool = True
    ttl_seconds: int | None = None
    suspend: bool = False
    eviction_policy: str = "LRU"
    """LRU, or None: full means admit nothing more."""
    high_watermark_percent: int = 90
    low_watermark_percent: int = 80
    pinned: frozenset[str] = frozenset()
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)


@dataclass(frozen=True, slots=True)
class ConfigV2:
    """A whole configuration; `id` is the manager's name (namespace/name of a resource)."""

    id: str = ""
    backend: BackendConfig | None = None
    cache: CacheConfig | None = None
    uid: str = ""
    """The resource's uid, which names its folder in the cache root; "" uses `id`."""
    version: int = 2

    def get_backend_config(self) -> BackendConfig:
        """Return the backend section.

        Raises:
            ConfigError: There is none.
        """
        if self.backend is None:
            raise ConfigError("the configuration must have a `backend` section")
        return self.backend

    def get_cache_config(self) -> CacheConfig:
        """Return the cache section.

        Raises:
            ConfigError: There is none.
        """
        if self.cache is None:
            raise ConfigError("the configuration must have a `cache` section")
        return self.cache
