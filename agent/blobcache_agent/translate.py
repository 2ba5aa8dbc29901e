"""From a resource's spec to the engine's configuration: pure, and the last check before it.

Everything the administrator has a say in is decided here, on the node itself, whatever the
operator pushed. What is refused is refused for that one configuration, with a reason.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from blobcache_agent.errors import Refusal
from blobcache_agent.settings import Permissions
from blobcache_api.pushed_credentials import PushedCredentials
from blobcache_api.v1alpha1.backend import (
    Addressing,
    BackendSpec,
    BackendType,
    HTTPProxyBackend,
    LocalFSBackend,
    OSSBackend,
    RegistryBackend,
    S3Backend,
)
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec, CacheType, PrefetchBlob
from blobcache_storage.config import (
    BackendConfig,
    CacheConfig,
    ConfigV2,
    HTTPProxyConfig,
    LocalFSConfig,
    OSSConfig,
    PrefetchConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import (
    AccessKey,
    Ambient,
    Anonymous,
    BasicAuth,
    BearerToken,
    Credentials,
    Pending,
)
from blobcache_storage.device import BlobInfo

_CACHE_TYPES = {CacheType.FILE_CACHE: "filecache", CacheType.NONE: "none"}
"""The engine passes through for any type it does not keep files for."""

_FITTING_CREDENTIALS: dict[BackendType, tuple[type[Credentials], ...]] = {
    BackendType.S3: (AccessKey,),
    BackendType.OSS: (AccessKey,),
    BackendType.REGISTRY: (BasicAuth, BearerToken),
    BackendType.HTTP_PROXY: (BasicAuth, BearerToken),
    BackendType.LOCAL_FS: (),
}
_KEYS_OF = {
    BackendType.S3: "accessKeyID and secretAccessKey",
    BackendType.OSS: "accessKeyID and secretAccessKey",
    BackendType.REGISTRY: "username and password, token, or .dockerconfigjson",
    BackendType.HTTP_PROXY: "username and password, or token",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A configuration as both ways to run know it."""

    namespace: str
    name: str
    uid: str
    spec: BlobCacheConfigSpec

    @property
    def id(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A configuration as it should be, with its credentials."""

    resource: Resource
    credentials: Credentials
    digest: str = ""
    """What the operator calls this very content; "" without an operator."""
    place: str = ""
    """File and object it was read from, for messages; "" where it was pushed."""


def translate(
    resource: Resource, credentials: Credentials, permissions: Permissions, work_dir: str = "."
) -> ConfigV2:
    """Return the engine's configuration.

    Args:
        resource: The resource; its models have checked each field's form.
        credentials: `Anonymous` where the resource names no Secret, `Pending` where it does and
            the values are not here.
        permissions: What the administrator allows on this node.
        work_dir: The cache root.

    Raises:
        Refusal: The configuration may not or cannot be used here.
    """
    spec = resource.spec
    _check_permissions(resource, permissions)
    return ConfigV2(
        id=resource.id,
        uid=resource.uid,
        backend=_backend(spec.backend, _credentials(resource, credentials, permissions)),
        cache=_cache(spec, work_dir),
    )


def _check_permissions(resource: Resource, permissions: Permissions) -> None:
    backend = resource.spec.backend
    tls = backend.tls
    if tls and tls.insecure_skip_verify and not permissions.allows_insecure_tls(resource.namespace):
        raise Refusal(
            "InsecureTLSRefused",
            f"`spec.backend.tls.insecureSkipVerify` must be false: namespace "
            f"'{resource.namespace}' may not skip the check of certificates. Set "
            "`spec.backend.tls.caBundle`, or have the administrator start the agents with "
            f"--allow-insecure-tls {resource.namespace}",
        )
    if backend.local_fs:
        directory = backend.local_fs.directory
        roots = permissions.roots_of(resource.namespace)
        if not any(is_below(directory, root) for root in roots):
            raise Refusal(
                "LocalFSRefused",
                f"`spec.backend.localFS.directory` '{directory}' must lie below a directory that "
                f"the administrator gave namespace '{resource.namespace}' by --allow-localfs; "
                f"allowed are: {', '.join(roots) or 'none'}",
            )


def is_below(directory: str, root: str) -> bool:
    """Whether a clean absolute path is the root or lies below it."""
    return root == "/" or directory == root or directory.startswith(f"{root}/")


def _credentials(
    resource: Resource, credentials: Credentials, permissions: Permissions
) -> Credentials:
    backend = resource.spec.backend
    if backend.credentials_secret_ref is None:
        # A Secret's values without a reference would be someone else's.
        is_ambient = backend.type is BackendType.S3 and permissions.allows_ambient(
            resource.namespace
        )
        return Ambient() if is_ambient else Anonymous()
    if isinstance(credentials, Pending):
        return credentials
    if isinstance(credentials, Anonymous):
        return Pending()
    if isinstance(credentials, _FITTING_CREDENTIALS[backend.type]):
        return credentials
    keys = _KEYS_OF.get(backend.type)
    wanted = f"must hold {keys}" if keys else "must not be named"
    raise Refusal(
        "SecretKeysUnfit",
        f"Secret '{resource.namespace}/{backend.credentials_secret_ref.name}' {wanted} for a "
        f"backend of type '{backend.type.value}'",
    )


def to_engine(pushed: PushedCredentials) -> Credentials:
    """Return pushed or resolved credentials as the engine knows them."""
    if pushed.access_key_id is not None and pushed.secret_access_key is not None:
        return AccessKey(pushed.access_key_id, pushed.secret_access_key, pushed.session_token)
    if pushed.username is not None and pushed.password is not None:
        return BasicAuth(pushed.username, pushed.password)
    assert pushed.token is not None, "the model permits exactly one complete set"
    return BearerToken(pushed.token)


def _backend(spec: BackendSpec, credentials: Credentials) -> BackendConfig:
    base = BackendConfig(
        type="",
        credentials=credentials,
        ca_bundle_pem=(spec.tls.ca_bundle or "") if spec.tls else "",
        insecure_skip_verify=bool(spec.tls and spec.tls.insecure_skip_verify),
        timeout_seconds=float(spec.timeout_seconds),
        connect_timeout_seconds=float(spec.connect_timeout_seconds),
        retry_limit=spec.retry_limit,
        bytes_per_second_limit=spec.bytes_per_second_limit,
    )
    if spec.s3:
        return replace(base, type="s3", s3=_s3(spec.s3))
    if spec.oss:
        return replace(base, type="oss", oss=_oss(spec.oss))
    if spec.registry:
        return replace(base, type="registry", registry=_registry(spec.registry))
    if spec.http_proxy:
        return replace(base, type="http-proxy", http_proxy=_http_proxy(spec.http_proxy))
    if spec.local_fs:
        return replace(base, type="localfs", localfs=_localfs(spec.local_fs))
    raise Refusal(
        "AgentTooOld",
        f"this agent knows no backend of type '{spec.type}'; upgrade the agents",
    )


def _s3(spec: S3Backend) -> S3Config:
    return S3Config(
        endpoint=spec.endpoint.rstrip("/"),
        region=spec.region,
        bucket=spec.bucket,
        prefix=spec.prefix or "",
        virtual_host=spec.addressing is Addressing.VIRTUAL_HOST,
    )


def _oss(spec: OSSBackend) -> OSSConfig:
    return OSSConfig(
        endpoint=spec.endpoint.rstrip("/"),
        bucket=spec.bucket,
        prefix=spec.prefix or "",
        # A bucket cannot be put before an address.
        virtual_host=not _is_address(urlsplit(spec.endpoint).hostname or ""),
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _registry(spec: RegistryBackend) -> RegistryConfig:
    return RegistryConfig(
        host=spec.host, repository=spec.repository or "", scheme=spec.scheme.value
    )


def _http_proxy(spec: HTTPProxyBackend) -> HTTPProxyConfig:
    return HTTPProxyConfig(address=spec.address.rstrip("/"), path=spec.path or "")


def _localfs(spec: LocalFSBackend) -> LocalFSConfig:
    return LocalFSConfig(directory=spec.directory)


def _cache(spec: BlobCacheConfigSpec, work_dir: str) -> CacheConfig:
    return CacheConfig(
        type=_CACHE_TYPES[spec.cache.type],
        work_dir=work_dir,
        chunk_size_bytes=spec.cache.chunk_size,
        capacity_bytes=spec.cache.capacity,
        validate=spec.cache.validate_blobs,
        ttl_seconds=spec.cache.ttl_seconds,
        suspend=spec.suspend,
        eviction_policy=spec.eviction.policy.value,
        high_watermark_percent=spec.eviction.high_watermark_percent,
        low_watermark_percent=spec.eviction.low_watermark_percent,
        pinned=frozenset(spec.eviction.pinned),
        prefetch=_prefetch(spec),
    )


def _prefetch(spec: BlobCacheConfigSpec) -> PrefetchConfig:
    if spec.prefetch is None:
        return PrefetchConfig()
    return PrefetchConfig(
        enable=bool(spec.prefetch.blobs) and not spec.suspend,
        blobs=tuple(_wanted(blob) for blob in spec.prefetch.blobs),
        bytes_per_second_limit=spec.prefetch.bytes_per_second_limit,
    )


def _wanted(blob: PrefetchBlob) -> BlobInfo:
    return BlobInfo(id=blob.id, size_bytes=blob.size, digest=blob.digest)
