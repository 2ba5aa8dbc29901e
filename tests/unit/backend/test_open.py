"""From configurations to backends, and ids to their blobs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend.blob_id import check_joined_id, check_path_id
from blobcache_storage.backend.http_proxy import HTTPProxyBackend
from blobcache_storage.backend.oss import OSSBackend
from blobcache_storage.backend.registry import RegistryBackend
from blobcache_storage.backend.s3 import S3Backend
from blobcache_storage.config import (
    BackendConfig,
    HTTPProxyConfig,
    OSSConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import AccessKey, BasicAuth, Pending
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import ConfigError, InvalidBlobId
from blobcache_storage.testing.fault_origin import FaultOrigin

S3 = BackendConfig(type="s3", s3=S3Config("https://s3.test", "us-east-1", "bucket"))
OSS = BackendConfig(type="oss", oss=OSSConfig("https://oss-cn-hangzhou.aliyuncs.com", "bucket"))
REGISTRY = BackendConfig(type="registry", registry=RegistryConfig("registry.test"))
PROXY = BackendConfig(type="http-proxy", http_proxy=HTTPProxyConfig("http://proxy.test"))
KEY = AccessKey("id", SecretStr("secret"))
LOGIN = BasicAuth("user", SecretStr("password"))


@pytest.mark.parametrize(
    ("config", "kind"),
    [(S3, S3Backend), (OSS, OSSBackend), (REGISTRY, RegistryBackend), (PROXY, HTTPProxyBackend)],
    ids=["s3", "oss", "registry", "http-proxy"],
)
def test_each_type_has_its_backend(
    open_any: OpenBackend, config: BackendConfig, kind: type
) -> None:
    """The type names the backend; opening one sends nothing and needs no loop."""
    assert isinstance(open_any(config), kind)
    assert isinstance(open_any(dataclasses.replace(config, credentials=Pending())), kind)


@pytest.mark.parametrize("name", ["", "S3", "gcs", "localdisk"])
def test_unknown_types(open_any: OpenBackend, name: str) -> None:
    """The message is the one the seed gives."""
    with pytest.raises(ConfigError) as caught:
        open_any(BackendConfig(type=name))
    assert str(caught.value) == f"unsupported backend type '{name}'"


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("s3", "s3"),
        ("oss", "oss"),
        ("registry", "registry"),
        ("http-proxy", "http_proxy"),
        ("localfs", "localfs"),
    ],
)
def test_missing_sections(open_any: OpenBackend, name: str, section: str) -> None:
    """A section that is missing is named."""
    with pytest.raises(ConfigError, match=f"`{section}`"):
        open_any(BackendConfig(type=name))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (S3, {"credentials": LOGIN}),
        (OSS, {"credentials": LOGIN}),
        (REGISTRY, {"credentials": KEY}),
        (PROXY, {"credentials": KEY}),
        (PROXY, {"timeout_seconds": 0}),
        (PROXY, {"timeout_seconds": float("nan")}),
        (PROXY, {"connect_timeout_seconds": -1}),
        (PROXY, {"retry_limit": -1}),
        (PROXY, {"bytes_per_second_limit": 0}),
        (PROXY, {"http_proxy": HTTPProxyConfig("/run/proxy.sock")}),
        (PROXY, {"http_proxy": HTTPProxyConfig("http://user:pw@proxy.test")}),
        (PROXY, {"http_proxy": HTTPProxyConfig("http://proxy.test", "/a?b")}),
        (PROXY, {"http_proxy": HTTPProxyConfig("http://proxy.test", "/../a")}),
        (PROXY, {"http_proxy": HTTPProxyConfig("http://proxy.test:port")}),
        (PROXY, {"http_proxy": HTTPProxyConfig("http://prox y.test")}),
        (OSS, {"oss": OSSConfig("https://x.test", "bucket", signature="V2")}),
        (OSS, {"oss": OSSConfig("https://10.0.0.1", "bucket")}),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(
    open_any: OpenBackend, config: BackendConfig, changes: dict[str, object]
) -> None:
    """What cannot work is refused when it is configured, not when it is read."""
    with pytest.raises(ConfigError):
        open_any(dataclasses.replace(config, **changes))  # type: ignore[arg-type]


IDS = ["a b", "ü/ö", "a%2Fb", "a%2e%2e/b", "a?b#c", "a&b=c", "a:b@c", "~a", "a\\..\\b", "x" * 1024]


@pytest.mark.parametrize("blob_id", IDS, ids=range(len(IDS)))
async def test_ids_reach_the_origin_as_they_are(
    origin: FaultOrigin, open_any: OpenBackend, blob_id: str
) -> None:
    """Decoding what was sent once gives the id: nothing is lost, doubled or read as a query."""
    for config in (
        BackendConfig(type="http-proxy", http_proxy=HTTPProxyConfig(origin.url, "/pp")),
        BackendConfig(type="s3", s3=S3Config(origin.url, "r", "pp"), credentials=KEY),
        BackendConfig(type="oss", oss=OSSConfig(origin.url, "pp", virtual_host=False)),
    ):
        origin.put(f"/pp/{blob_id}", b"bytes")
        async with await open_any(config).fetch(blob_id, RangeRequest()) as stream:
            assert b"".join([piece async for piece in stream]) == b"bytes"
        assert "?" not in origin.requests[-1].target


def test_where_an_empty_segment_is_a_name_and_where_not() -> None:
    """A key of a bucket may have empty segments; a path of a server or a folder may not."""
    for blob_id in ("a//b", "/a", "a/"):
        assert check_path_id(blob_id) == blob_id
        with pytest.raises(InvalidBlobId):
            check_joined_id(blob_id)


@given(st.text(max_size=60))
def test_accepted_ids_cannot_climb(blob_id: str) -> None:
    """Whatever is accepted stays below the place it is joined to."""
    try:
        accepted = check_joined_id(blob_id)
    except InvalidBlobId:
        return
    assert accepted == blob_id
    assert not {"", ".", ".."} & set(accepted.split("/"))
    assert accepted.isprintable() or all(ord(c) > 0x9F or c.isprintable() for c in accepted)
