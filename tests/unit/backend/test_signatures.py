"""Signatures against published and independently made ones, and clocks that disagree."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from botocore.credentials import Credentials as BotoCredentials
from multidict import CIMultiDict
from pydantic import SecretStr
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend.oss import region_of, sign_oss_v1, sign_oss_v4
from blobcache_storage.backend.s3 import S3Backend, s3_base_url, sign_s3
from blobcache_storage.backend.signing import error_code, quote_key
from blobcache_storage.config import BackendConfig, OSSConfig, S3Config
from blobcache_storage.credentials import AccessKey, Ambient, Anonymous
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import ConfigError, OriginDenied, OriginProtocolError
from blobcache_storage.testing.fault_origin import FaultOrigin
from blobcache_storage.testing.origin_guards import OSSGuard, S3ClockGuard, error_document

WHEN = datetime(2026, 11, 24, 6, 49, 21, tzinfo=UTC)
KEY = AccessKey("AKID", SecretStr("SECRET"))
SESSION_KEY = AccessKey("AKID", SecretStr("SECRET"), SecretStr("session-token/+="))
SCOPE = "OSS4-HMAC-SHA256 Credential=AKID/20261124/cn-hangzhou/oss/aliyun_v4_request"


def test_s3_as_amazon_prints_it() -> None:
    """The example "GET Object" of Amazon S3's API reference comes out as printed there."""
    headers = CIMultiDict({"Range": "bytes=0-9"})
    sign_s3(
        "GET",
        "https://examplebucket.s3.amazonaws.com/test.txt",
        headers,
        credentials=BotoCredentials(
            "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
        ),
        region="us-east-1",
        now=datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


@pytest.mark.parametrize(
    ("method", "key", "credentials", "signature"),
    [
        (
            "GET",
            "layers/a b+ü=1",
            KEY,
            "f3c8b60710f639801d5a25d1537d1eb4d44b950f7a78e391ab696848d25dc729",
        ),
        (
            "HEAD",
            "prefix/x~y(z)*'!",
            KEY,
            "b7b0200d91e75bc8305ad8b25bae8c7649dead04211f1ccbce27435f60f7f451",
        ),
        (
            "GET",
            "plain",
            SESSION_KEY,
            "e55e05f74093fdc92e0f05347ae2e4570d3c049ba1e1dc9616356cde740cf21c",
        ),
    ],
)
def test_oss_v4_as_alibabas_sdk_makes_it(
    method: str, key: str, credentials: AccessKey, signature: str
) -> None:
    """Made with the signer of alibabacloud-oss-v2 1.4.1 for bucket `my-bucket`."""
    headers = CIMultiDict({"Range": "bytes=1-2"})
    sign_oss_v4(
        method, f"/my-bucket/{key}", headers, key=credentials, region="cn-hangzhou", now=WHEN
    )
    assert headers["Authorization"] == f"{SCOPE},Signature={signature}"


@pytest.mark.parametrize(
    ("method", "key", "signature"),
    [
        ("GET", "layers/a b+ü=1", "UCacH80HJJE/8G/B4XcD/p6aUFM="),
        ("HEAD", "prefix/x~y(z)*'!", "58ldZC1/6V4eRUDCb6jJpS8Ecz0="),
    ],
)
def test_oss_v1_as_alibabas_sdk_makes_it(method: str, key: str, signature: str) -> None:
    """Made with the signer of alibabacloud-oss-v2 1.4.1 for bucket `my-bucket`."""
    headers = CIMultiDict({"Range": "bytes=1-2"})
    sign_oss_v1(method, f"/my-bucket/{key}", headers, key=KEY, now=WHEN)
    assert headers["Authorization"] == f"OSS AKID:{signature}"


def test_oss_v1_as_alibaba_prints_it() -> None:
    """The example of OSS's developer guide, with content headers and OSS headers."""
    headers = CIMultiDict(
        {
            "Content-MD5": "ODBGOERFMDMzQTczRUY3NUE3NzA5QzdFNUYzMDQxNEM=",
            "Content-Type": "text/html",
            "X-OSS-Magic": "abracadabra",
            "X-OSS-Meta-Author": "foo@bar.com",
        }
    )
    key = AccessKey("44CF9590006BF252F707", SecretStr("OtxrzxIsfpFjA7SwPzILwy8Bw21TLhquhboDYROV"))
    when = datetime(2005, 11, 17, 18, 49, 58, tzinfo=UTC)
    sign_oss_v1("PUT", "/oss-example/nelson", headers, key=key, now=when)
    assert headers["Authorization"] == "OSS 44CF9590006BF252F707:26NBxoKdsyly4EDv6inkoDft/yA="


@pytest.mark.parametrize(
    ("endpoint", "region", "wanted"),
    [
        ("https://oss-cn-hangzhou.aliyuncs.com", "", "cn-hangzhou"),
        ("https://oss-cn-hangzhou-internal.aliyuncs.com", "", "cn-hangzhou"),
        ("https://oss-us-east-1.aliyuncs.com", "", "us-east-1"),
        ("https://oss-cn-hangzhou.aliyuncs.com", "oss-cn-beijing", "cn-beijing"),
        ("https://cdn.example.com", "", ""),
        ("https://oss-cn-hangzhou.aliyuncs.com.evil.test", "", ""),
    ],
)
def test_oss_regions(endpoint: str, region: str, wanted: str) -> None:
    """The endpoint's name tells the region unless the section does."""
    assert region_of(OSSConfig(endpoint, "bucket", region=region)) == wanted


def test_keys_are_encoded_once() -> None:
    """Slashes and unreserved characters stay; everything else, percent signs too, is encoded."""
    key = "a/b c+d%20e?f#g&h=ü~.-_*'()!"
    assert quote_key(key) == quote(key, safe="/~")
    assert "%2520" in quote_key(key)


def test_error_codes() -> None:
    """The code of an error document, if there is one."""
    assert error_code(error_document(403, "AccessDenied").body) == "AccessDenied"
    assert error_code(b"<html>Forbidden</html>") == ""
    assert error_code(b"<Code>" + b"x" * 100 + b"</Code>") == ""


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        (
            S3Config("https://s3.test:9000", "us-east-1", "bucket"),
            "https://s3.test:9000/bucket",
        ),
        (
            S3Config("https://s3.test/", "us-east-1", "bucket", virtual_host=True),
            "https://bucket.s3.test",
        ),
        (
            S3Config("http://s3.test:9000/base/", "us-east-1", "b.c", virtual_host=True),
            "http://b.c.s3.test:9000/base",
        ),
        (S3Config("", "eu-west-1", "bucket"), "https://s3.eu-west-1.amazonaws.com/bucket"),
    ],
)
def test_s3_addresses(section: S3Config, wanted: str) -> None:
    """Path and virtual-host style, ports and base paths kept."""
    assert s3_base_url(section) == wanted


@pytest.mark.parametrize(
    "section",
    [
        S3Config("https://user:secret@s3.test", "r", "bucket"),
        S3Config("https://s3.test?x=1", "r", "bucket"),
        S3Config("https://s3.test#x", "r", "bucket"),
        S3Config("ftp://s3.test", "r", "bucket"),
        S3Config("s3.test", "r", "bucket"),
        S3Config("https://", "r", "bucket"),
        S3Config("https://s3.test/../x", "r", "bucket"),
        S3Config("https://s3.test\\@evil.test", "r", "bucket"),
        S3Config("https://s3.test", "", "bucket"),
        S3Config("https://s3.test", "r", "a/b"),
        S3Config("https://s3.test", "r", "evil.test#"),
        S3Config("https://s3.test", "r", ""),
        S3Config("https://10.0.0.1", "r", "bucket", virtual_host=True),
    ],
    ids=str,
)
def test_s3_sections_that_cannot_be(section: S3Config) -> None:
    """What is not an address and a bucket is an error of the configuration."""
    with pytest.raises(ConfigError, match=r"s3\.") as caught:
        s3_base_url(section)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("hours", [-2, 2])
@pytest.mark.parametrize("kind", ["s3", "oss V1", "oss V4"])
async def test_a_wrong_clock_is_learnt_from_one_refusal(
    origin: FaultOrigin, open_any: OpenBackend, hours: int, kind: str
) -> None:
    """One refusal teaches the origin's time; from then on signatures are made for it."""
    origin.clock_offset = timedelta(hours=hours)
    origin.put("/bucket/blob", b"bytes")
    if kind == "s3":
        origin.guard = S3ClockGuard(origin.now)
        section = S3Config(origin.url, "us-east-1", "bucket")
        backend = open_any(BackendConfig(type="s3", s3=section, credentials=KEY))
    else:
        origin.guard = OSSGuard("AKID", "SECRET", now=origin.now)
        oss = OSSConfig(
            origin.url, "bucket", region="cn-hangzhou", virtual_host=False, signature=kind[-2:]
        )
        backend = open_any(BackendConfig(type="oss", oss=oss, credentials=KEY))
    for _ in range(2):
        assert (await backend.stat("blob")).size_bytes == 5
        async with await backend.fetch("blob", RangeRequest(first=1)) as stream:
            assert b"".join([piece async for piece in stream]) == b"ytes"
    assert len(origin.requests) == 5


async def test_a_clock_days_off_is_not_believed(origin: FaultOrigin, open_any: OpenBackend) -> None:
    """An origin cannot make us sign for next week."""
    origin.clock_offset = timedelta(days=7)
    origin.guard = S3ClockGuard(origin.now)
    section = S3Config(origin.url, "us-east-1", "bucket")
    with pytest.raises(OriginDenied):
        await open_any(BackendConfig(type="s3", s3=section, credentials=KEY)).stat("blob")
    assert len(origin.requests) == 1


async def test_requests_without_credentials_are_unsigned(
    origin: FaultOrigin, open_any: OpenBackend
) -> None:
    """Anonymous means no header of a signature at all."""
    origin.put("/bucket/blob", b"bytes")
    for kind, section in (
        ("s3", S3Config(origin.url, "us-east-1", "bucket")),
        ("oss", OSSConfig(origin.url, "bucket", virtual_host=False)),
    ):
        config = BackendConfig(type=kind, credentials=Anonymous(), **{kind: section})  # type: ignore[arg-type]
        await open_any(config).stat("blob")
    for request in origin.requests:
        assert not {"authorization", "x-amz-date", "x-oss-date"} & set(request.headers)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
async def test_s3_refuses_tokens_with_400(
    origin: FaultOrigin, open_any: OpenBackend, code: str
) -> None:
    """S3 answers 400 to an expired token: that is about credentials, with and without a body."""
    origin.guard = lambda request: error_document(400, code)
    section = S3Config(origin.url, "us-east-1", "bucket")
    backend = open_any(BackendConfig(type="s3", s3=section, credentials=SESSION_KEY))
    with pytest.raises(OriginDenied, match=code):
        await backend.fetch("blob", RangeRequest())
    with pytest.raises(OriginDenied):
        await backend.stat("blob")


async def test_a_bucket_of_another_region(origin: FaultOrigin, open_any: OpenBackend) -> None:
    """S3's redirect without a Location names the fields to correct."""
    origin.guard = lambda request: error_document(301, "PermanentRedirect")
    section = S3Config(origin.url, "us-east-1", "bucket")
    backend = open_any(BackendConfig(type="s3", s3=section, credentials=KEY))
    with pytest.raises(OriginProtocolError, match=r"s3\.region"):
        await backend.fetch("blob", RangeRequest())


async def test_ambient_credentials_come_from_the_platform(
    origin: FaultOrigin, open_any: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain's credentials sign; a platform without any is told so."""
    origin.put("/bucket/blob", b"bytes")
    section = S3Config(origin.url, "us-east-1", "bucket")
    config = BackendConfig(type="s3", s3=section, credentials=Ambient())
    with pytest.raises(ConfigError, match="--allow-ambient-credentials"):
        open_any(config)
    found: list[BotoCredentials | None] = [None, BotoCredentials("AMBIENT", "secret", "token")]
    monkeypatch.setattr("blobcache_storage.backend.s3._ambient_chain", lambda: found.pop(0))
    backend = open_any(config, allow_ambient=True)
    assert isinstance(backend, S3Backend)
    with pytest.raises(OriginDenied, match="no credentials"):
        await backend.stat("blob")
    await backend.stat("blob")
    assert "Credential=AMBIENT/" in origin.requests[0].headers["authorization"]
    assert origin.requests[0].headers["x-amz-security-token"] == "token"
