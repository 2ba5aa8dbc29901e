"""Each constraint of the resources, once accepted and once refused.

One table for both judges: the models (`tests/unit/api`) and a real API server
(`tests/contract/test_crds.py`). A sentence of ours must come from both; for the schema's own
constraints each has words of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

DELETE = object()
"""As a patch's value: the field goes."""

BASE: dict[str, Any] = {
    "apiVersion": "blobcache.dev/v1alpha1",
    "kind": "BlobCacheConfig",
    "metadata": {"name": "models", "namespace": "default"},
    "spec": {"backend": {"type": "S3", "s3": {"endpoint": "https://s3.test", "bucket": "models"}}},
}

OSS = {"type": "OSS", "oss": {"endpoint": "https://oss-cn-hangzhou.aliyuncs.com", "bucket": "mod"}}
REGISTRY = {"type": "Registry", "registry": {"host": "registry.test"}}
HTTP_PROXY = {"type": "HTTPProxy", "httpProxy": {"address": "http://files.test:8080"}}
LOCAL_FS = {"type": "LocalFS", "localFS": {"directory": "/srv/models"}}
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"


@dataclass(frozen=True)
class Case:
    """A resource that differs from the base by a patch, and what both judges say of it."""

    name: str
    patch: dict[str, Any]
    """Dotted paths and their new values."""
    says: str = ""
    """Sentence of both judges; accepted when this, `server` and `model` are empty."""
    server: str = ""
    """What the API server says where its words are its own."""
    model: str = ""
    """What the model says where its words are its own."""

    @property
    def is_accepted(self) -> bool:
        """Whether both judges take it."""
        return not (self.says or self.server or self.model)

    def body(self) -> dict[str, Any]:
        """Return the resource."""
        return apply_patch(BASE, self.patch)


def apply_patch(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the base with each dotted path set to its value, or deleted."""
    body = copy.deepcopy(base)
    for path, value in patch.items():
        *parents, last = path.split(".")
        at = body
        for part in parents:
            at = at.setdefault(part, {})
        if value is DELETE:
            del at[last]
        else:
            at[last] = copy.deepcopy(value)
    return body


def _accepted(path: str, /, **values: Any) -> list[Case]:
    return [Case(f"{path} {name}", {path: value}) for name, value in values.items()]


def _refused(path: str, says: str, /, **values: Any) -> list[Case]:
    return [Case(f"{path} {name}", {path: value}, says=says) for name, value in values.items()]


def _bounded(path: str, low: int, high: int) -> list[Case]:
    """Return both ends of an integer's range, and a step beyond each."""
    below = Case(
        f"{path} {low - 1}",
        {path: low - 1},
        server=f"should be greater than or equal to {low}",
        model=f"should be greater than or equal to {low}",
    )
    above = Case(
        f"{path} {high + 1}",
        {path: high + 1},
        server=f"should be less than or equal to {high}",
        model=f"should be less than or equal to {high}",
    )
    text = Case(f"{path} text", {path: str(low)}, server="must be of type integer", model="integer")
    return [*_accepted(path, low=low, high=high), below, above, text]


def _enumerated(path: str, *values: str) -> list[Case]:
    wrong = Case(f"{path} Other", {path: "Other"}, server="Unsupported value", model="should be")
    return [*(Case(f"{path} {value}", {path: value}) for value in values), wrong]


def _sized(path: str, maximum: int, *, letter: str = "a", before: str = "") -> list[Case]:
    """Return a string of the most characters, and one too long."""
    long = before + letter * (maximum - len(before))
    too_long = Case(
        f"{path} too long", {path: long + letter}, server="Too long", model="should have at most"
    )
    return [Case(f"{path} longest", {path: long}), too_long]


_QUANTITY = "must be a quantity of whole bytes from 0 to 8Pi, such as 1048576, 1Mi or 1.5Gi"
_URL = "must be an http or https URL with a host, and without user name, password, query or"
_HOST = "must be a host name or address with an optional port from 1 to 65535"
_PATH = "must be an absolute path without a trailing '/', empty, '.' or '..' segments"
_BUCKET = "must be 3 to 63 letters, digits, '.', '_' and '-', beginning and ending with"
_BLOB_ID = "must be 1 to 1024 bytes without control characters and without empty, '.' or '..'"
_RATE = "must be at least 1Ki; leave it out for no limit"
_CHUNK_SIZE = "must be a power of two from 16Ki to 16Mi"
_SECRET = "must be an object's name: lower-case letters, digits, '-' and '.'"
_UNIQUE = {"server": "Duplicate value", "model": "must name each blob once"}
_DIGEST = "must be 'sha256:' and 64 lower-case hexadecimal digits"
_LABELS = "must have label names as keys, such as 'kubernetes.io/arch'"
_CA = "must hold PEM certificates and no private key"


def _exactly(section: str, backend_type: str) -> str:
    return f"`{section}` must be set exactly when `type` is '{backend_type}'"


SHAPE = [
    Case("as it is", {}),
    Case("name longest", {"metadata.name": "a" * 63}),
    Case(
        "name too long",
        {"metadata.name": "a" * 64},
        server="`metadata.name` must be at most 63 characters",
        model="at most 63 characters",
    ),
    Case("no spec", {"spec": DELETE}, server="spec: Required value", model="`spec`"),
    Case("no backend", {"spec": {}}, server="spec.backend: Required value", model="`spec.backend`"),
    Case(
        "misspelt field",
        {"spec.cache": {"capactiy": "1Gi"}},
        server='unknown field "spec.cache.capactiy"',
        model="`spec.cache.capactiy`",
    ),
    Case("suspended", {"spec.suspend": True}),
    Case("suspend text", {"spec.suspend": "yes"}, server="type boolean", model="valid boolean"),
    *_enumerated("spec.readers", "Namespace", "Cluster"),
    *_accepted(
        "spec.nodeSelector",
        empty={},
        labels={"kubernetes.io/arch": "amd64", "disk": "", "a.b": "C_d.e-f"},
        sixteen={f"k{index}": "v" for index in range(16)},
    ),
    *_refused("spec.nodeSelector", _LABELS, key={"-a": "b"}, prefix={"A.b/c": "d"}),
    Case(
        "spec.nodeSelector value",
        {"spec.nodeSelector": {"a": "-b"}},
        server="should match",
        model="should match",
    ),
    Case(
        "spec.nodeSelector too many",
        {"spec.nodeSelector": {f"k{index}": "v" for index in range(17)}},
        server="must have at most 16",
        model="at most 16",
    ),
]

BACKEND = [
    Case("OSS", {"spec.backend": OSS}),
    Case("Registry", {"spec.backend": REGISTRY}),
    Case("HTTPProxy", {"spec.backend": HTTP_PROXY}),
    Case("LocalFS", {"spec.backend": LOCAL_FS}),
    Case("another type", {"spec.backend.type": "FTP"}, server="Unsupported", model="should be"),
    Case("no type", {"spec.backend.type": DELETE}, server="Required value", model="`spec.backend"),
    Case("no s3", {"spec.backend.s3": DELETE}, says=_exactly("s3", "S3")),
    Case("oss beside s3", {"spec.backend.oss": OSS["oss"]}, says=_exactly("oss", "OSS")),
    Case(
        "registry beside",
        {"spec.backend.registry": REGISTRY["registry"]},
        says=_exactly("registry", "Registry"),
    ),
    Case(
        "proxy beside",
        {"spec.backend.httpProxy": HTTP_PROXY["httpProxy"]},
        says=_exactly("httpProxy", "HTTPProxy"),
    ),
    Case(
        "folder beside",
        {"spec.backend.localFS": LOCAL_FS["localFS"]},
        says=_exactly("localFS", "LocalFS"),
    ),
    *_accepted(
        "spec.backend.s3.endpoint",
        port="http://minio.test:9000",
        path="https://gateway.test/s3/",
        ipv4="http://192.0.2.1:1",
        ipv6="http://[2001:db8::1]:65535",
        at_in_path="https://gateway.test/@s3",
    ),
    *_refused(
        "spec.backend.s3.endpoint",
        _URL,
        ftp="ftp://s3.test",
        bare="s3.test",
        userinfo="https://user:pass@s3.test",
        user="https://user@s3.test",
        query="https://s3.test/?a=b",
        fragment="https://s3.test/#a",
        space="https://s3.test/a b",
        backslash="https://s3.test/a\\b",
        no_host="https:///path",
        no_port="https://s3.test:99999",
        port_zero="https://s3.test:0",
    ),
    *_sized("spec.backend.s3.endpoint", 2048, before="https://s3.test/"),
    Case("oss endpoint", {"spec.backend": OSS, "spec.backend.oss.endpoint": "oss"}, says=_URL),
    Case("oss bucket", {"spec.backend": OSS, "spec.backend.oss.bucket": "-a-"}, says=_BUCKET),
    *_accepted("spec.backend.s3.bucket", dots="a.b-c_d", longest="a" * 63, shortest="abc"),
    *_refused("spec.backend.s3.bucket", _BUCKET, short="ab", slash="a/b", dot="abc.", empty=""),
    *_accepted("spec.backend.s3.region", short="r", usual="eu-central-1", longest="a" * 63),
    Case("region", {"spec.backend.s3.region": "a b"}, server="should match", model="should match"),
    Case(
        "region too long",
        {"spec.backend.s3.region": "a" * 64},
        server="Too long",
        model="at most 63",
    ),
    *_sized("spec.backend.s3.prefix", 1024),
    *_refused("spec.backend.s3.prefix", "must not contain control characters", line="a\nb"),
    *_enumerated("spec.backend.s3.addressing", "Path", "VirtualHost"),
]

REGISTRY_CASES = [
    Case(
        f"registry {name}",
        {"spec.backend": REGISTRY, f"spec.backend.registry.{field}": value},
        says=says,
    )
    for field, name, value, says in (
        ("host", "port", "registry.test:5000", ""),
        ("host", "ipv6", "[2001:db8::1]:5000", ""),
        ("host", "single label", "localhost", ""),
        ("host", "url", "https://registry.test", _HOST),
        ("host", "path", "registry.test/team", _HOST),
        ("host", "userinfo", "user@registry.test", _HOST),
        ("host", "large port", "registry.test:65536", _HOST),
        ("host", "port zero", "registry.test:0", _HOST),
        ("host", "hyphen", "-registry.test", _HOST),
        ("repository", "repository", "library/nginx", ""),
        ("repository", "separators", "a.b/c__d/e-f", ""),
        ("repository", "upper case", "Library/nginx", "must be a repository's name"),
        ("repository", "slash", "/nginx", "must be a repository's name"),
        ("scheme", "http", "http", ""),
    )
] + [
    Case(
        "registry scheme",
        {"spec.backend": REGISTRY, "spec.backend.registry.scheme": "HTTP"},
        server="Unsupported value",
        model="should be",
    ),
    Case(
        "proxy address",
        {"spec.backend": HTTP_PROXY, "spec.backend.httpProxy.address": "files"},
        says=_URL,
    ),
]

PATHS = [
    Case(f"{backend['type']} {name}", {"spec.backend": backend, path: value}, says=says)
    for backend, path in (
        (HTTP_PROXY, "spec.backend.httpProxy.path"),
        (LOCAL_FS, "spec.backend.localFS.directory"),
    )
    for name, value, says in (
        ("path", "/a/b.c", ""),
        ("hidden", "/a/.b", ""),
        ("dots", "/a/...", ""),
        ("relative", "a/b", _PATH),
        ("trailing slash", "/a/", _PATH),
        ("empty segment", "/a//b", _PATH),
        ("parent", "/a/../b", _PATH),
        ("parent last", "/a/..", _PATH),
        ("self", "/a/./b", _PATH),
        ("control", "/a/\tb", _PATH),
    )
]

CONNECTION = [
    *_accepted("spec.backend.credentialsSecretRef.name", usual="s3-credentials", dots="a.b"),
    *_refused("spec.backend.credentialsSecretRef.name", _SECRET, upper="Keys", slash="a/b"),
    *_sized("spec.backend.credentialsSecretRef.name", 253),
    *_accepted("spec.backend.tls", empty={}, insecure={"insecureSkipVerify": True}),
    *_accepted("spec.backend.tls.caBundle", certificate=CERTIFICATE),
    *_refused(
        "spec.backend.tls.caBundle",
        _CA,
        text="no certificate",
        key=CERTIFICATE + "-----BEGIN PRIVATE KEY-----\n",
    ),
    *_sized("spec.backend.tls.caBundle", 65536, before=CERTIFICATE),
    *_bounded("spec.backend.timeoutSeconds", 1, 300),
    *_bounded("spec.backend.connectTimeoutSeconds", 1, 60),
    *_bounded("spec.backend.retryLimit", 0, 10),
    *_accepted("spec.backend.bytesPerSecondLimit", least=1024, usual="100M"),
    *_refused("spec.backend.bytesPerSecondLimit", _RATE, zero=0, below="1023"),
]

CACHE = [
    *_enumerated("spec.cache.type", "FileCache", "None"),
    *_accepted(
        "spec.cache.capacity",
        integer=1048576,
        zero=0,
        mebi="1Mi",
        fraction="1.5Gi",
        milli="1000m",
        exponent="1e3",
        upper_exponent="1E3",
        kilo="0.1k",
        plus="+1Gi",
        most="8Pi",
        most_integer=2**53,
    ),
    *_refused(
        "spec.cache.capacity",
        _QUANTITY,
        milli_part="100m",
        unit="50 GB",
        negative=-1,
        negative_text="-1",
        fraction_of_byte="1.1Gi",
        exa="1Ei",
        above="8.1Pi",
        above_integer=2**53 + 1,
        empty="",
        infinite="1e99",
    ),
    Case(
        "spec.cache.capacity boolean",
        {"spec.cache.capacity": True},
        server="Invalid value",
        model=_QUANTITY,
    ),
    Case(
        "spec.cache.capacity float",
        {"spec.cache.capacity": 1.5},
        server="Invalid value",
        model=_QUANTITY,
    ),
    Case(
        "spec.cache.capacity long",
        {"spec.cache.capacity": "0" * 40 + "1"},
        server="Too long",
        model=_QUANTITY,
    ),
    *_accepted("spec.cache.chunkSize", least="16Ki", most="16Mi", integer=65536, milli="65536000m"),
    *_refused("spec.cache.chunkSize", _CHUNK_SIZE, odd="48Ki", small="8Ki", large="32Mi", zero=0),
    *_refused("spec.cache.chunkSize", _QUANTITY, unit="64 KB"),
    *_accepted("spec.cache.validate", no=False),
    Case(
        "spec.cache.validate text", {"spec.cache.validate": "x"}, server="boolean", model="boolean"
    ),
    *_bounded("spec.cache.ttlSeconds", 60, 10 * 366 * 24 * 3600),
]


def _blobs(*blobs: dict[str, Any]) -> dict[str, Any]:
    return {"spec.prefetch.blobs": list(blobs)}


PREFETCH = [
    *_bounded("spec.prefetch.maxNodes", 1, 10000),
    *_accepted("spec.prefetch.bytesPerSecondLimit", usual="10Mi"),
    *_refused("spec.prefetch.bytesPerSecondLimit", _RATE, zero="0"),
    Case("a blob", _blobs({"id": "a/b", "size": 1, "digest": "sha256:" + "0a" * 32})),
    Case("no id", _blobs({"size": 1}), server="Required value", model="`spec.prefetch.blobs[0].id"),
    Case("blob twice", _blobs({"id": "a"}, {"id": "a"}), **_UNIQUE),
    Case("size below", _blobs({"id": "a", "size": -1}), server="greater than", model="greater"),
    Case("size above", _blobs({"id": "a", "size": 2**53 + 1}), server="less", model="less"),
    *(
        Case(f"digest {name}", _blobs({"id": "a", "digest": digest}), says=_DIGEST)
        for name, digest in {
            "short": "sha256:" + "0a" * 31,
            "upper": "sha256:" + "0A" * 32,
            "bare": "0a" * 32,
            "sha512": "sha512:" + "0a" * 32,
        }.items()
    ),
    Case("most blobs", _blobs(*({"id": str(index)} for index in range(1000)))),
    Case(
        "too many blobs",
        _blobs(*({"id": str(index)} for index in range(1001))),
        server="Too many",
        model="at most 1000",
    ),
    *(
        Case(f"id {name}", {**_blobs({"id": blob}), "spec.eviction.pinned": [blob]}, says=says)
        for name, blob, says in (
            ("digest", "sha256:" + "0a" * 32, ""),
            ("dots", "a/..b/.../c.", ""),
            ("unicode", "ü" * 512, ""),
            ("longest", "a" * 1024, ""),
            ("parent", "a/../b", _BLOB_ID),
            ("self", ".", _BLOB_ID),
            ("leading slash", "/a", _BLOB_ID),
            ("trailing slash", "a/", _BLOB_ID),
            ("empty segment", "a//b", _BLOB_ID),
            ("control", "a\x07", _BLOB_ID),
            ("zero", "a\x00", _BLOB_ID),
            ("bytes", "ü" * 513, _BLOB_ID),
        )
    ),
    Case("id empty", _blobs({"id": ""}), server="at least 1 chars", model="at least 1 character"),
    Case("id too long", _blobs({"id": "a" * 1025}), server="Too long", model="at most 1024"),
]

EVICTION = [
    *_enumerated("spec.eviction.policy", "LRU", "None"),
    *_bounded("spec.eviction.highWatermarkPercent", 81, 100)[:2],
    Case(
        "high above",
        {"spec.eviction.highWatermarkPercent": 101},
        server="less than or equal to 100",
        model="less than or equal to 100",
    ),
    *_accepted("spec.eviction.lowWatermarkPercent", least=0, most=89),
    Case(
        "low below",
        {"spec.eviction.lowWatermarkPercent": -1},
        server="greater than or equal to 0",
        model="greater than or equal to 0",
    ),
    *_refused(
        "spec.eviction.lowWatermarkPercent",
        "`lowWatermarkPercent` must be less than `highWatermarkPercent`",
        equal=90,
        above=91,
    ),
    Case("pinned", {"spec.eviction.pinned": ["a", "b"]}),
    Case("pinned twice", {"spec.eviction.pinned": ["a", "a"]}, **_UNIQUE),
    Case(
        "too many pinned",
        {"spec.eviction.pinned": [str(index) for index in range(1001)]},
        server="Too many",
        model="at most 1000",
    ),
]

CASES = [
    *SHAPE,
    *BACKEND,
    *REGISTRY_CASES,
    *PATHS,
    *CONNECTION,
    *CACHE,
    *PREFETCH,
    *EVICTION,
]


@dataclass(frozen=True)
class Update:
    """A change of a stored resource, and whether it is allowed."""

    name: str
    old: dict[str, Any]
    new: dict[str, Any]
    says: str = ""
    """Sentence of both judges; allowed when empty."""


_OTHER = "may not change; create another BlobCacheConfig"

UPDATES = [
    Update(
        "endpoint and bucket", {}, {"spec.backend.s3": {"endpoint": "http://b", "bucket": "new"}}
    ),
    Update("backend type", {}, {"spec.backend": OSS}, f"`spec.backend.type` {_OTHER}"),
    Update("cache type", {}, {"spec.cache.type": "None"}, f"`spec.cache.type` {_OTHER}"),
    Update("chunk size", {}, {"spec.cache.chunkSize": "1Mi"}, f"`spec.cache.chunkSize` {_OTHER}"),
    Update("same chunk size", {}, {"spec.cache.chunkSize": 65536}),
    Update("default chunk size", {"spec.cache.chunkSize": "1Mi"}, {}, "`spec.cache.chunkSize`"),
    Update("capacity", {"spec.cache.capacity": "1Gi"}, {"spec.cache.capacity": "2Gi"}),
]
