"""Where a config's blobs come from: `spec.backend`."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from blobcache_api.quantity import Rate
from blobcache_api.rules import Rule, TransitionRule
from blobcache_api.v1alpha1.common import Flag, LocalObjectReference, Model, rule_matching

URL_LENGTH_MAX = 2048
PATH_LENGTH_MAX = 1024
CA_BUNDLE_LENGTH_MAX = 65536

URL_MESSAGE = (
    "must be an http or https URL with a host, and without user name, password, query or fragment"
)
_URL = re.compile(
    r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?", re.ASCII
)
_URL_FORBIDDEN = re.compile(r"[?#\\]")


def is_plain_url(value: str) -> bool:
    """Whether a string is an http(s) URL that consists of scheme, host, port and path only."""
    if _URL.fullmatch(value) is None or _URL_FORBIDDEN.search(value):
        return False
    try:
        port = urlsplit(value).port
    except ValueError:
        return False
    return port is None or port > 0


URL_RULE = Rule(
    # The classes of host and path leave no room for user information; `isURL` reads the rest.
    cel=(
        "self.matches('^https?://([[][0-9A-Fa-f:.]+[]]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?$')"
        r" && !self.matches('[?#]') && !self.contains('\\') && isURL(self) && "
        "(url(self).getPort() == '' || (int(url(self).getPort()) >= 1 && "
        "int(url(self).getPort()) <= 65535))"
    ),
    message=URL_MESSAGE,
    holds=is_plain_url,
)

URL = Annotated[str, Field(min_length=1, max_length=URL_LENGTH_MAX), URL_RULE]
"""A URL of scheme, host, port and path."""

_BUCKET_RULE = rule_matching(
    "[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]",
    "must be 3 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or "
    "digit",
)
Bucket = Annotated[str, Field(max_length=63), _BUCKET_RULE]
"""Name of a bucket."""

_NO_CONTROLS_RULE = Rule(
    cel="!self.matches('[[:cntrl:]]')",
    message="must not contain control characters",
    holds=lambda text: not any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in text),
)
Prefix = Annotated[str, Field(max_length=PATH_LENGTH_MAX), _NO_CONTROLS_RULE]
"""What stands before each blob's id in its key, as it is."""

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(
    rf"({_LABEL}([.]{_LABEL})*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[1-9][0-9]{{0,4}}))?", re.ASCII
)


def _is_host(value: str) -> bool:
    found = _HOST.fullmatch(value)
    return found is not None and int(found["port"] or 1) <= 65535


_HOST_RULE = Rule(
    cel=(
        "self.matches('^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        "([.][A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*|[[][0-9A-Fa-f:.]+[]])"
        "(:[1-9][0-9]{0,4})?$') && (!self.matches(':[0-9]+$') || "
        "int(self.substring(self.lastIndexOf(':') + 1)) <= 65535)"
    ),
    message="must be a host name or address with an optional port from 1 to 65535, such as "
    "'registry.example.com:5000', and nothing else",
    holds=_is_host,
)
Host = Annotated[str, Field(min_length=1, max_length=255), _HOST_RULE]
"""`name[:port]`."""


def is_clean_path(value: str) -> bool:
    """Whether a string is an absolute path without empty, '.' or '..' segments; '/' is not."""
    segments = value.split("/")
    return (
        segments[0] == ""
        and len(segments) > 1
        and not {"", ".", ".."} & set(segments[1:])
        and not any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in value)
    )


_PATH_RULE = Rule(
    cel=("self.startsWith('/') && !self.matches('/[.]{0,2}(/|$)') && !self.matches('[[:cntrl:]]')"),
    message="must be an absolute path without a trailing '/', empty, '.' or '..' segments and "
    "control characters",
    holds=is_clean_path,
)
Directory = Annotated[str, Field(min_length=2, max_length=PATH_LENGTH_MAX), _PATH_RULE]
"""An absolute, clean path."""


class BackendType(StrEnum):
    """Kinds of origins."""

    S3 = "S3"
    OSS = "OSS"
    REGISTRY = "Registry"
    HTTP_PROXY = "HTTPProxy"
    LOCAL_FS = "LocalFS"


class Addressing(StrEnum):
    """How an S3 request names its bucket."""

    PATH = "Path"
    VIRTUAL_HOST = "VirtualHost"


class Scheme(StrEnum):
    """How a registry is spoken to."""

    HTTPS = "https"
    HTTP = "http"


class S3Backend(Model):
    """A bucket of Amazon S3 or of a store that speaks its protocol."""

    endpoint: URL
    """URL of the service, such as 'https://s3.eu-central-1.amazonaws.com'."""
    region: Annotated[str, Field(min_length=1, max_length=63, pattern="^[A-Za-z0-9-]+$")] = (
        "us-east-1"
    )
    """Region that requests are signed for."""
    bucket: Bucket
    """Name of the bucket."""
    prefix: Prefix | None = None
    """Put before a blob's id to form its key, as it is: no '/' is added."""
    addressing: Addressing = Addressing.PATH
    """Path puts the bucket into the path, VirtualHost into the host name."""


class OSSBackend(Model):
    """A bucket of Alibaba Cloud OSS."""

    endpoint: URL
    """URL of the service, such as 'https://oss-cn-hangzhou.aliyuncs.com'."""
    bucket: Bucket
    """Name of the bucket."""
    prefix: Prefix | None = None
    """Put before a blob's id to form its key, as it is: no '/' is added."""


class RegistryBackend(Model):
    """A container registry."""

    host: Host
    """Name and optional port of the registry, such as 'registry.example.com:5000'."""
    repository: (
        Annotated[
            str,
            Field(min_length=1, max_length=255),
            rule_matching(
                "[a-z0-9]+(([.]|_{1,2}|-+)[a-z0-9]+)*(/[a-z0-9]+(([.]|_{1,2}|-+)[a-z0-9]+)*)*",
                "must be a repository's name: lower-case letters and digits, parted by '.', '_', "
                "'__', '-' and '/'",
            ),
        ]
        | None
    ) = None
    """Repository all blobs are in; without one, blob ids begin with their repository."""
    scheme: Scheme = Scheme.HTTPS
    """https, or http for registries without TLS."""


class HTTPProxyBackend(Model):
    """A plain web server."""

    address: URL
    """URL of the server."""
    path: Directory | None = None
    """Path below the address; a blob is at address, path, '/' and its id."""


class LocalFSBackend(Model):
    """A folder of the node, below a root the administrator gave this namespace."""

    directory: Directory
    """Absolute path; a blob is the file directory, '/' and its id."""


class TLSOptions(Model):
    """How an origin's certificate is checked."""

    ca_bundle: (
        Annotated[
            str,
            Field(max_length=CA_BUNDLE_LENGTH_MAX),
            Rule(
                cel=(
                    "self.contains('-----BEGIN CERTIFICATE-----') && "
                    "self.contains('-----END CERTIFICATE-----') && !self.contains('PRIVATE KEY')"
                ),
                message="must hold PEM certificates and no private key",
                holds=lambda text: (
                    "-----BEGIN CERTIFICATE-----" in text
                    and "-----END CERTIFICATE-----" in text
                    and "PRIVATE KEY" not in text
                ),
            ),
        ]
        | None
    ) = None
    """PEM certificates of authorities to trust instead of the system's."""
    insecure_skip_verify: Flag = False
    """Trust any certificate; only where the administrator permits it."""


def _section_rule(section: str, name: str, backend_type: BackendType) -> Rule:
    return Rule(
        cel=f"has(self.{section}) == (self.type == '{backend_type.value}')",
        message=f"`{section}` must be set exactly when `type` is '{backend_type.value}'",
        holds=lambda backend: (
            (getattr(backend, name) is not None) == (backend.type is backend_type)
        ),
    )


BACKEND_TYPE_RULE = TransitionRule(
    cel="self == oldSelf",
    message="`spec.backend.type` may not change; create another BlobCacheConfig",
    allows=lambda new, old: bool(new == old),
)


class BackendSpec(Model):
    """Where the blobs live; exactly the section named by `type` is set."""

    type: Annotated[BackendType, BACKEND_TYPE_RULE]
    """Kind of origin; may not change."""
    s3: S3Backend | None = None
    """Set when type is S3."""
    oss: OSSBackend | None = None
    """Set when type is OSS."""
    registry: RegistryBackend | None = None
    """Set when type is Registry."""
    http_proxy: HTTPProxyBackend | None = None
    """Set when type is HTTPProxy."""
    local_fs: LocalFSBackend | None = None
    """Set when type is LocalFS."""
    credentials_secret_ref: LocalObjectReference | None = None
    """
    Secret of the same namespace, labelled `blobcache.dev/credentials: "true"`, with exactly one set
    of keys: accessKeyID, secretAccessKey and optionally sessionToken; username and password;
    token; or .dockerconfigjson. Without it requests are anonymous.
    """
    tls: TLSOptions | None = None
    """How the origin's certificate is checked; by default against the system's authorities."""
    timeout_seconds: Annotated[int, Field(strict=True, ge=1, le=300)] = 5
    """Longest wait for the head of an answer, and for each further 64 KiB of its body."""
    connect_timeout_seconds: Annotated[int, Field(strict=True, ge=1, le=60)] = 5
    """Longest wait for a connection."""
    retry_limit: Annotated[int, Field(strict=True, ge=0, le=10)] = 3
    """How often a failed request is repeated."""
    bytes_per_second_limit: Rate | None = None
    """Bytes per second that each node takes from the origin at most; absent means no limit."""

    rules: ClassVar[tuple[Rule, ...]] = (
        _section_rule("s3", "s3", BackendType.S3),
        _section_rule("oss", "oss", BackendType.OSS),
        _section_rule("registry", "registry", BackendType.REGISTRY),
        _section_rule("httpProxy", "http_proxy", BackendType.HTTP_PROXY),
        _section_rule("localFS", "local_fs", BackendType.LOCAL_FS),
    )
