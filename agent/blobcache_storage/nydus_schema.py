"""The shape of Nydus's configuration files: tables, keys, types, bounds and defaults.

Only what a parser checks; rules between fields are `nydus_config`'s. Nydus: `api/src/config.rs`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

BATCH_SIZE_BYTES_DEFAULT: Final = 1 << 20

_Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$")]
_U8 = Annotated[int, Field(ge=0, le=2**8 - 1)]
_U32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
_USize = Annotated[int, Field(ge=0, le=2**64 - 1)]


class Section(BaseModel):
    """A table: types as strict as serde's, unknown keys ignored, values never in messages."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class ProxySection(Section):
    """A forward proxy; only its URL is looked at."""

    url: _Text = ""


class RemoteSection(Section):
    """What the HTTP backends have in common; times in whole seconds, 0 = none."""

    skip_verify: bool = False
    ca_cert_files: list[_Text] = []
    timeout: _U32 = 5
    connect_timeout: _U32 = 5
    retry_limit: _U8 = 0
    proxy: ProxySection = ProxySection()


class OSSSection(RemoteSection):
    """Endpoint without scheme, bucket and access key; S3 has them too."""

    scheme: _Text = "https"
    endpoint: _Text
    bucket_name: _Text
    object_prefix: _Text = ""
    access_key_id: _Text = ""
    access_key_secret: SecretStr = SecretStr("")


class S3Section(OSSSection):
    """As OSS, with a region."""

    region: _Text


class RegistrySection(RemoteSection):
    """`auth` is the base64 form of user:password."""

    scheme: _Text = "https"
    host: _Text
    repo: _Text
    auth: SecretStr | None = None
    registry_token: SecretStr | None = None
    blob_url_scheme: _Text = ""
    blob_redirected_host: _Text = ""


class HTTPProxySection(RemoteSection):
    """`addr` is a URL, or the path of a unix socket."""

    addr: _Text
    path: _Text = ""


class LocalFSSection(Section):
    """Needs `blob_file` or `dir`."""

    blob_file: _Text = ""
    dir: _Text = ""
    alt_dirs: list[_Text] = []


class BackendSection(Section):
    """`type` names the section that counts."""

    type: _Text
    oss: OSSSection | None = None
    s3: S3Section | None = None
    registry: RegistrySection | None = None
    localfs: LocalFSSection | None = None
    http_proxy: Annotated[HTTPProxySection | None, Field(alias="http-proxy")] = None


class PrefetchSection(Section):
    """`batch_size` in bytes, `bandwidth_limit` in bytes per second (0 = none)."""

    enable: bool
    threads: _USize = 8
    batch_size: _USize = BATCH_SIZE_BYTES_DEFAULT
    bandwidth_limit: _U32 = 0


class FileCacheSection(Section):
    """Where files are, and encryption, which we refuse."""

    work_dir: _Text = "."
    enable_encryption: bool = False
    enable_convergent_encryption: bool = False


class FsCacheSection(Section):
    """The kernel-driven cache."""

    work_dir: _Text = "."


class CacheSection(Section):
    """`type` names the section that counts."""

    type: _Text = ""
    compressed: bool = False
    validate_: Annotated[bool, Field(alias="validate")] = False
    prefetch: PrefetchSection | None = None
    filecache: FileCacheSection | None = None
    fscache: FsCacheSection | None = None


class RafsSection(Section):
    """The file system's part: checked, as Nydus does, and of no use to a blob cache."""

    mode: _Text = "direct"
    batch_size: _USize = BATCH_SIZE_BYTES_DEFAULT
    prefetch: PrefetchSection | None = None


class V2Document(Section):
    """A whole file, version 2."""

    version: _U32
    id: _Text = ""
    backend: BackendSection | None = None
    external_backends: list[dict[str, Any]] = []
    cache: CacheSection | None = None
    rafs: RafsSection | None = None


class LegacyBackend(Section):
    """The section is called `config` whatever the type."""

    type: _Text
    config: dict[str, Any]


class LegacyCache(Section):
    """As LegacyBackend."""

    type: _Text = ""
    compressed: bool = False
    validate_: Annotated[bool, Field(alias="validate")] = False
    config: dict[str, Any] | None = None


class LegacyDevice(Section):
    """Where blobs come from and are kept."""

    id: _Text = ""
    backend: LegacyBackend
    external_backends: list[dict[str, Any]] = []
    cache: LegacyCache = LegacyCache()


class LegacyPrefetch(Section):
    """`merging_size` in bytes, `bandwidth_rate` in bytes per second (0 = none)."""

    enable: bool = False
    threads_count: _USize = 8
    merging_size: _USize = BATCH_SIZE_BYTES_DEFAULT
    bandwidth_rate: _U32 = 0


class LegacyDocument(Section):
    """A whole file of the legacy form."""

    device: LegacyDevice
    mode: _Text = "direct"
    amplify_io: _USize = BATCH_SIZE_BYTES_DEFAULT
    fs_prefetch: LegacyPrefetch = LegacyPrefetch()
