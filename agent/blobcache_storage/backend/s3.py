"""S3 and what speaks like it: botocore signs, aiohttp transfers.

Reference: AWS General Reference, "Signature Version 4"; Amazon S3 API, GetObject, HeadObject.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from typing import Final, Protocol

import aiohttp
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import BotoCoreError
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
from blobcache_storage.config import BackendConfig, S3Config
from blobcache_storage.credentials import AccessKey, Ambient, Credentials
from blobcache_storage.errors import ConfigError, OriginDenied, OriginProtocolError, StorageError

AMBIENT_SECONDS_MAX: Final = 10.0
"""For the platform's chain to come up with credentials."""
KEY_BYTES_MAX: Final = 1024
"""Prefix and blob id together (Amazon S3 User Guide, "Naming Amazon S3 objects")."""
_TIMESTAMP: Final = "%Y%m%dT%H%M%SZ"
_DENIED_CODES: Final = frozenset(
    {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "TokenRefreshRequired"}
)

# At debug level this logger prints what it signs, session tokens among it.
logging.getLogger("botocore.auth").setLevel(logging.INFO)


class _Auth(S3SigV4Auth):  # type: ignore[misc] # botocore has no types
    """Signs as of a time that is given instead of read from this machine's clock."""

    def __init__(self, credentials: BotoCredentials, region: str, now: datetime) -> None:
        super().__init__(credentials, "s3", region)
        self._timestamp = now.strftime(_TIMESTAMP)

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        request.context["timestamp"] = self._timestamp
        super()._modify_request_before_signing(request)


def sign_s3(
    method: str,
    url: str,
    headers: CIMultiDict[str],
    *,
    credentials: BotoCredentials,
    region: str,
    now: datetime,
) -> None:
    """Add the signature's headers; whatever is in `headers` already is signed too.

    Args:
        url: As it is sent: S3 does not normalise paths, and host and port are part of it.
    """
    # Some proxies rewrite Accept-Encoding, which would break the signature over it.
    signed = {name: text for name, text in headers.items() if name.lower() != "accept-encoding"}
    request = AWSRequest(method=method, url=url, headers=signed)
    _Auth(credentials, region, now).add_auth(request)
    for name, text in request.headers.items():
        headers[name] = text


class _CredentialSource(Protocol):
    def get_frozen_credentials(self) -> BotoCredentials: ...


def _ambient_chain() -> _CredentialSource | None:
    """Return the platform's credentials; blocks on files and the instance's metadata service."""
    import boto3  # takes a third of a second and 15 MB that few need

    found: _CredentialSource | None = boto3.Session().get_credentials()
    return found


class S3Backend(HTTPBackend):
    """Objects of one bucket; the key is prefix + blob id."""

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        super().__init__(config, policy=policy, manners=manners)
        assert config.s3 is not None
        self._section = config.s3
        self._base = s3_base_url(config.s3)
        self._skew = ClockSkew()
        self._chain: _CredentialSource | None = None
        self._chain_lock = asyncio.Lock()

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return check_path_id(blob_id)

    @override
    def _url(self, blob_id: str) -> URL:
        return URL(f"{self._base}/{quote_key(self._section.prefix + blob_id)}", encoded=True)

    @override
    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        credentials = await self._signing_credentials(self._config.credentials)
        if credentials is not None:
            sign_s3(
                method,
                str(url),
                headers,
                credentials=credentials,
                region=self._section.region,
                now=self._skew.now(),
            )

    async def _signing_credentials(self, credentials: Credentials) -> BotoCredentials | None:
        if isinstance(credentials, AccessKey):
            token = credentials.session_token
            return BotoCredentials(
                credentials.access_key_id,
                credentials.secret_access_key.get_secret_value(),
                token.get_secret_value() if token is not None else None,
            )
        if not isinstance(credentials, Ambient):
            return None
        try:
            async with asyncio.timeout(AMBIENT_SECONDS_MAX), self._chain_lock:
                if self._chain is None:
                    self._chain = await asyncio.to_thread(_ambient_chain)
                if self._chain is None:
                    raise OriginDenied("the platform has no credentials for S3")
                return await asyncio.to_thread(self._chain.get_frozen_credentials)
        except (TimeoutError, BotoCoreError) as error:
            raise OriginDenied(
                f"the platform's credentials for S3 cannot be had ({type(error).__name__})"
            ) from None

    @override
    async def _recover(self, blob_id: str, response: aiohttp.ClientResponse, body: bytes) -> bool:
        is_own = origin_of(response.url) == origin_of(self._url(blob_id))
        return is_own and response.status == 403 and self._skew.learn(response.headers)

    @override
    def _refine(self, error: StorageError, body: bytes) -> StorageError:
        code = error_code(body)
        if isinstance(error, OriginProtocolError) and error.status in (301, 307):
            # S3 sends no Location here: only the owner of the configuration can follow.
            return OriginProtocolError(
                "the bucket is in another region: `s3.region` and `s3.endpoint` must be its own",
                status=error.status,
            )
        if isinstance(error, OriginProtocolError) and error.status == 400:
            # The answer to a HEAD has no code; a 400 to a well-formed request means credentials.
            if code in _DENIED_CODES or not code:
                return OriginDenied(
                    f"the origin refused the credentials ({code or 400})", status=400
                )
            return OriginProtocolError(f"the origin refused the request ({code})", status=400)
        if isinstance(error, OriginDenied) and code:
            return OriginDenied(f"{error} [{code}]", status=error.status)
        return error


def s3_base_url(section: S3Config) -> str:
    """Return the bucket's URL.

    Raises:
        ConfigError: A field of the section cannot be used.
    """
    if not section.region or not section.region.isascii() or "/" in section.region:
        raise ConfigError("`s3.region` must be set; S3-compatible stores take 'us-east-1'")
    bucket = check_bucket(section.bucket, "s3.bucket")
    endpoint = section.endpoint or f"https://s3.{section.region}.amazonaws.com"
    return bucket_url(
        parse_endpoint(endpoint, "s3.endpoint"),
        bucket,
        virtual_host=section.virtual_host,
        field="s3.endpoint",
    )
