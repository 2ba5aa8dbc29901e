"""Alibaba Cloud OSS, signed by hand.

Reference: Alibaba Cloud OSS developer guide, "Include a V4 signature in the Authorization header
(recommended)" and "Include a V1 signature in the Authorization header". V4 signs for a region,
which is taken from the endpoint's name where the configuration has none; an endpoint under a name
of one's own that tells no region is signed with V1.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from datetime import datetime
from email.utils import format_datetime
from typing import Final

import aiohttp
from multidict import CIMultiDict
from typing_extensions import override
from yarl import URL

from blobcache_storage.backend.blob_id import check_path_id
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.endpoint import bucket_url, check_bucket, parse_endpoint
from blobcache_storage.backend.exchange import origin_of
from blobcache_storage.backend.http import HTTPBackend
from blobcache_storage.backend.manners import Manners
from blobcache_storage.backend.signing import ClockSkew, error_code, quote_key
from blobcache_storage.config import BackendConfig, OSSConfig
from blobcache_storage.credentials import AccessKey
from blobcache_storage.errors import ConfigError, OriginDenied, StorageError

UNSIGNED_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
_ALGORITHM: Final = "OSS4-HMAC-SHA256"
_PRODUCT: Final = "oss"
_TERMINATOR: Final = "aliyun_v4_request"
_REGION_IN_HOST: Final = re.compile(
    r"oss(?:-accelerate)?-([a-z]{2}-[a-z0-9-]{1,40}?)(?:-internal)?\.aliyuncs\.com"
)


def _hmac_sha256(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def _canonical_headers(headers: CIMultiDict[str], further: tuple[str, ...] = ()) -> str:
    """Return the `x-oss-` headers and `further` ones, lower-case and sorted, a line each."""
    chosen = sorted(
        (name.lower(), text.strip())
        for name, text in headers.items()
        if name.lower().startswith("x-oss-") or name.lower() in further
    )
    return "".join(f"{name}:{text}\n" for name, text in chosen)


def sign_oss_v4(
    method: str,
    resource: str,
    headers: CIMultiDict[str],
    *,
    key: AccessKey,
    region: str,
    now: datetime,
) -> None:
    """Add the headers of a V4 signature.

    Args:
        resource: `/bucket/key`, not encoded, whatever the URL's style.
        now: In UTC.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    day = stamp[:8]
    headers["x-oss-date"] = stamp
    headers["x-oss-content-sha256"] = UNSIGNED_PAYLOAD
    if key.session_token is not None:
        headers["x-oss-security-token"] = key.session_token.get_secret_value()
    canonical = "\n".join(
        (
            method,
            quote_key(resource),
            "",  # no query
            _canonical_headers(headers, ("content-type", "content-md5")),
            "",  # no additional headers
            UNSIGNED_PAYLOAD,
        )
    )
    scope = f"{day}/{region}/{_PRODUCT}/{_TERMINATOR}"
    to_sign = "\n".join((_ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    signing_key = f"aliyun_v4{key.secret_access_key.get_secret_value()}".encode()
    for step in (day, region, _PRODUCT, _TERMINATOR):
        signing_key = _hmac_sha256(signing_key, step)
    signature = _hmac_sha256(signing_key, to_sign).hex()
    headers["Authorization"] = (
        f"{_ALGORITHM} Credential={key.access_key_id}/{scope},Signature={signature}"
    )


def sign_oss_v1(
    method: str, resource: str, headers: CIMultiDict[str], *, key: AccessKey, now: datetime
) -> None:
    """Add the headers of a V1 signature; arguments as of `sign_oss_v4`."""
    headers["Date"] = format_datetime(now, usegmt=True)
    if key.session_token is not None:
        headers["x-oss-security-token"] = key.session_token.get_secret_value()
    to_sign = "\n".join(
        (
            method,
            headers.get("Content-MD5", ""),
            headers.get("Content-Type", ""),
            headers["Date"],
            _canonical_headers(headers) + resource,
        )
    )
    secret = key.secret_access_key.get_secret_value().encode()
    signature = base64.b64encode(hmac.new(secret, to_sign.encode(), hashlib.sha1).digest())
    headers["Authorization"] = f"OSS {key.access_key_id}:{signature.decode()}"


def region_of(section: OSSConfig) -> str:
    """Return the region to sign for: the section's, or the endpoint's, or "" if neither says."""
    if section.region:
        # OSS writes regions with and without its own prefix; the signature wants it without.
        return section.region.removeprefix("oss-")
    host = parse_endpoint(section.endpoint, "oss.endpoint").host or ""
    match = _REGION_IN_HOST.fullmatch(host)
    return match.group(1) if match else ""


class OSSBackend(HTTPBackend):
    """Objects of one bucket; the key is prefix + blob id."""

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        super().__init__(config, policy=policy, manners=manners)
        assert config.oss is not None
        self._section = config.oss
        if self._section.signature not in ("V1", "V4"):
            raise ConfigError("`oss.signature` must be 'V4' or 'V1'")
        self._region = region_of(self._section)
        self._base = bucket_url(
            parse_endpoint(self._section.endpoint, "oss.endpoint"),
            check_bucket(self._section.bucket, "oss.bucket"),
            virtual_host=self._section.virtual_host,
            field="oss.endpoint",
        )
        self._skew = ClockSkew()

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return check_path_id(blob_id)

    def _key(self, blob_id: str) -> str:
        return self._section.prefix + blob_id

    @override
    def _url(self, blob_id: str) -> URL:
        return URL(f"{self._base}/{quote_key(self._key(blob_id))}", encoded=True)

    @override
    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        key = self._config.credentials
        if not isinstance(key, AccessKey):
            return
        resource, now = f"/{self._section.bucket}/{self._key(blob_id)}", self._skew.now()
        if self._section.signature == "V4" and self._region:
            sign_oss_v4(method, resource, headers, key=key, region=self._region, now=now)
        else:
            sign_oss_v1(method, resource, headers, key=key, now=now)

    @override
    async def _recover(self, blob_id: str, response: aiohttp.ClientResponse, body: bytes) -> bool:
        is_own = origin_of(response.url) == origin_of(self._url(blob_id))
        return is_own and response.status == 403 and self._skew.learn(response.headers)

    @override
    def _refine(self, error: StorageError, body: bytes) -> StorageError:
        code = error_code(body)
        if isinstance(error, OriginDenied) and code:
            return OriginDenied(f"{error} [{code}]", status=error.status)
        return error
