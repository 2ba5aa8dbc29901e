"""From a resource's spec to the engine's configuration, and what is refused on the way."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from blobcache_agent.errors import Refusal
from blobcache_agent.settings import Permissions
from blobcache_agent.translate import Resource, is_below, to_engine, translate
from blobcache_api.pushed_credentials import PushedCredentials
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
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

S3: dict[str, Any] = {
    "type": "S3",
    "s3": {"endpoint": "https://s3.example.com/", "bucket": "models", "region": "eu-1"},
}
KEY = AccessKey("AKIA", SecretStr("hush"))


def run(
    backend: dict[str, Any],
    credentials: Credentials | None = None,
    permissions: Permissions | None = None,
    **sections: Any,
) -> ConfigV2:
    """Translate a resource demo/models."""
    spec = BlobCacheConfigSpec.model_validate({"backend": backend, **sections})
    resource = Resource(namespace="demo", name="models", uid="u-1", spec=spec)
    return translate(resource, credentials or Anonymous(), permissions or Permissions())


def with_secret(backend: dict[str, Any]) -> dict[str, Any]:
    """Return the backend with a reference to a Secret."""
    return {**backend, "credentialsSecretRef": {"name": "key"}}


def refusal_of(*arguments: Any, **named: Any) -> Refusal:
    """Return the refusal of a translation."""
    with pytest.raises(Refusal) as caught:
        run(*arguments, **named)
    return caught.value


def test_identity_and_defaults() -> None:
    """The id is namespace/name, the folder's name the uid, and defaults are the API's."""
    config = run(S3)
    assert (config.id, config.uid) == ("demo/models", "u-1")
    assert config.cache == CacheConfig(type="filecache", chunk_size_bytes=65536)
    assert config.backend == BackendConfig(
        type="s3", s3=S3Config("https://s3.example.com", "eu-1", "models")
    )


@pytest.mark.parametrize(
    ("backend", "kind", "section", "value"),
    [
        (
            {
                "type": "S3",
                "s3": {
                    "endpoint": "https://a.example",
                    "bucket": "abc",
                    "prefix": "p/",
                    "addressing": "VirtualHost",
                },
            },
            "s3",
            "s3",
            S3Config("https://a.example", "us-east-1", "abc", "p/", virtual_host=True),
        ),
        (
            {"type": "OSS", "oss": {"endpoint": "https://oss-cn-x.aliyuncs.com", "bucket": "abc"}},
            "oss",
            "oss",
            OSSConfig("https://oss-cn-x.aliyuncs.com", "abc"),
        ),
        (
            {"type": "OSS", "oss": {"endpoint": "http://127.0.0.1:80", "bucket": "abc"}},
            "oss",
            "oss",
            OSSConfig("http://127.0.0.1:80", "abc", virtual_host=False),
        ),
        (
            {"type": "Registry", "registry": {"host": "r.example:5000", "scheme": "http"}},
            "registry",
            "registry",
            RegistryConfig("r.example:5000", "", "http"),
        ),
        (
            {"type": "HTTPProxy", "httpProxy": {"address": "http://h/", "path": "/blobs"}},
            "http-proxy",
            "http_proxy",
            HTTPProxyConfig("http://h", "/blobs"),
        ),
        (
            {"type": "LocalFS", "localFS": {"directory": "/srv/models/a"}},
            "localfs",
            "localfs",
            LocalFSConfig("/srv/models/a"),
        ),
    ],
)
def test_each_backend(backend: dict[str, Any], kind: str, section: str, value: object) -> None:
    """Each type gets its section, and no other."""
    permissions = Permissions(localfs_roots={"demo": ("/srv/models",)})
    translated = run(backend, permissions=permissions).get_backend_config()
    assert translated.type == kind
    sections = ("s3", "oss", "registry", "http_proxy", "localfs")
    assert {name for name in sections if getattr(translated, name)} == {section}
    assert getattr(translated, section) == value


def test_every_cache_field() -> None:
    """What the user says about the cache arrives."""
    cache = run(
        S3,
        suspend=True,
        cache={
            "chunkSize": "1Mi",
            "capacity": "1Gi",
            "validate": False,
            "ttlSeconds": 60,
        },
        eviction={
            "policy": "None",
            "highWatermarkPercent": 70,
            "lowWatermarkPercent": 60,
            "pinned": ["a", "b"],
        },
        prefetch={
            "bytesPerSecondLimit": "1Mi",
            "blobs": [{"id": "a", "size": 5, "digest": "sha256:" + "0" * 64}],
        },
    ).get_cache_config()
    assert cache == CacheConfig(
        type="filecache",
        chunk_size_bytes=2**20,
        capacity_bytes=2**30,
        validate=False,
        ttl_seconds=60,
        suspend=True,
        eviction_policy="None",
        high_watermark_percent=70,
        low_watermark_percent=60,
        pinned=frozenset({"a", "b"}),
        prefetch=PrefetchConfig(
            enable=False,
            blobs=(BlobInfo("a", 5, "sha256:" + "0" * 64),),
            bytes_per_second_limit=2**20,
        ),
    )


def test_type_none_passes_through() -> None:
    """A cache of type None is none of the types the engine keeps files for."""
    assert run(S3, cache={"type": "None"}).get_cache_config().type == "none"


def test_every_backend_option() -> None:
    """Limits and TLS arrive."""
    bundle = "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"
    options = {
        "tls": {"caBundle": bundle},
        "timeoutSeconds": 7,
        "connectTimeoutSeconds": 8,
        "retryLimit": 1,
        "bytesPerSecondLimit": "1Mi",
    }
    backend = run({**S3, **options}).get_backend_config()
    assert backend.ca_bundle_pem == bundle
    assert backend.timeout_seconds == 7.0
    assert backend.connect_timeout_seconds == 8.0
    assert backend.retry_limit == 1
    assert backend.bytes_per_second_limit == 2**20


class TestCredentials:
    """Which credentials a backend gets."""

    def test_without_a_secret_requests_are_unsigned(self) -> None:
        """Values that came without a reference are not used."""
        assert run(S3, KEY).get_backend_config().credentials == Anonymous()

    def test_values_of_the_secret_are_used(self) -> None:
        """The reference is there and so are the values."""
        assert run(with_secret(S3), KEY).get_backend_config().credentials == KEY

    @pytest.mark.parametrize("missing", [Pending(), Anonymous()])
    def test_without_values_they_are_pending(self, missing: Credentials) -> None:
        """A named Secret whose values are not here never means unsigned requests."""
        assert run(with_secret(S3), missing).get_backend_config().credentials == Pending()

    def test_the_platforms_own_only_where_allowed(self) -> None:
        """Only S3, only of a namespace that may, only without a Secret."""
        allowed = Permissions(ambient_namespaces=frozenset({"demo"}))
        other = Permissions(ambient_namespaces=frozenset({"other"}))
        everyone = Permissions(ambient_namespaces=frozenset({"*"}))
        oss = {"type": "OSS", "oss": {"endpoint": "https://o.example", "bucket": "abc"}}
        found = {
            "allowed": run(S3, permissions=allowed),
            "other": run(S3, permissions=other),
            "everyone": run(S3, permissions=everyone),
            "oss": run(oss, permissions=allowed),
            "secret": run(with_secret(S3), permissions=allowed),
        }
        assert {
            name: config.get_backend_config().credentials for name, config in found.items()
        } == {
            "allowed": Ambient(),
            "other": Anonymous(),
            "everyone": Ambient(),
            "oss": Anonymous(),
            "secret": Pending(),
        }

    @pytest.mark.parametrize(
        ("pushed", "expected"),
        [
            (
                {"accessKeyID": "a", "secretAccessKey": "b", "sessionToken": "c"},
                AccessKey("a", SecretStr("b"), SecretStr("c")),
            ),
            ({"username": "u", "password": "p"}, BasicAuth("u", SecretStr("p"))),
            ({"token": "t"}, BearerToken(SecretStr("t"))),
        ],
    )
    def test_pushed_sets(self, pushed: dict[str, str], expected: Credentials) -> None:
        """Each of the three sets becomes its own type."""
        assert to_engine(PushedCredentials.model_validate(pushed)) == expected

    def test_unfit_ones_are_refused(self) -> None:
        """An access key is of no use to a registry; the message has no value in it."""
        registry = {"type": "Registry", "registry": {"host": "r.example"}}
        refusal = refusal_of(with_secret(registry), KEY)
        assert refusal.reason == "SecretKeysUnfit"
        assert "demo/key" in refusal.message
        assert "hush" not in refusal.message


class TestPermissions:
    """What only the administrator may allow."""

    def test_insecure_tls_is_refused_unless_allowed(self) -> None:
        """The message names the flag and the other way out."""
        insecure = {**S3, "tls": {"insecureSkipVerify": True}}
        refusal = refusal_of(insecure)
        assert refusal.reason == "InsecureTLSRefused"
        assert "--allow-insecure-tls demo" in refusal.message
        assert "caBundle" in refusal.message
        allowed = Permissions(insecure_tls_namespaces=frozenset({"demo"}))
        assert run(insecure, permissions=allowed).get_backend_config().insecure_skip_verify

    @pytest.mark.parametrize(
        ("directory", "roots", "is_allowed"),
        [
            ("/srv/models", ("/srv/models",), True),
            ("/srv/models/a", ("/srv/models",), True),
            ("/srv/models-secret", ("/srv/models",), False),
            ("/srv", ("/srv/models",), False),
            ("/etc", ("/",), True),
            ("/etc", (), False),
            ("/b/c", ("/a", "/b"), True),
        ],
    )
    def test_local_directories(
        self, directory: str, roots: tuple[str, ...], is_allowed: bool
    ) -> None:
        """Only what lies below a root of this very namespace, by whole segments."""
        backend = {"type": "LocalFS", "localFS": {"directory": directory}}
        for namespace, expected in (("demo", is_allowed), ("*", is_allowed), ("other", False)):
            permissions = Permissions(localfs_roots={namespace: roots})
            if expected:
                run(backend, permissions=permissions)
            else:
                refusal = refusal_of(backend, permissions=permissions)
                assert refusal.reason == "LocalFSRefused"
                assert "--allow-localfs" in refusal.message

    def test_is_below_compares_whole_segments(self) -> None:
        """A longer name is not a directory below."""
        assert is_below("/a/b", "/a")
        assert not is_below("/ab", "/a")
