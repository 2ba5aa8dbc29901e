"""A plain HTTP server or a caching proxy: a blob is `{address}{path}/{blob_id}`."""

from __future__ import annotations

import base64
from typing import Final
from urllib.parse import quote

from multidict import CIMultiDict
from typing_extensions import override
from yarl import URL

from blobcache_storage.backend.blob_id import check_joined_id
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.endpoint import parse_endpoint
from blobcache_storage.backend.http import HTTPBackend
from blobcache_storage.backend.manners import Manners
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import BasicAuth, BearerToken, Credentials

_PATH_SAFE: Final = "/-_.~!$&'()*+,;=:@"
"""What RFC 3986 section 3.3 allows in a path as it is."""


def basic_authorization(username: str, password: str) -> str:
    """Return the value of an Authorization header (RFC 7617, UTF-8)."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def static_authorization(credentials: Credentials) -> str | None:
    """Return the Authorization header of credentials that are sent as they are."""
    if isinstance(credentials, BasicAuth):
        return basic_authorization(credentials.username, credentials.password.get_secret_value())
    if isinstance(credentials, BearerToken):
        return f"Bearer {credentials.token.get_secret_value()}"
    return None


class HTTPProxyBackend(HTTPBackend):
    """Resources below one URL."""

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        super().__init__(config, policy=policy, manners=manners)
        section = config.http_proxy
        assert section is not None
        address = parse_endpoint(section.address, "httpProxy.address")
        path = section.path.strip("/")
        self._base = str(
            parse_endpoint(f"{address}".rstrip("/") + f"/{path}", "httpProxy.path")
        ).rstrip("/")

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return check_joined_id(blob_id)

    @override
    def _url(self, blob_id: str) -> URL:
        return URL(f"{self._base}/{quote(blob_id, safe=_PATH_SAFE)}", encoded=True)

    @override
    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        authorization = static_authorization(self._config.credentials)
        if authorization is not None:
            headers["Authorization"] = authorization
