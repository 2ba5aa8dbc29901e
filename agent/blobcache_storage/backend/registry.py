"""An OCI registry: blobs named by their digest, behind the registry's tokens and redirects.

Reference: OCI distribution-spec, "Pulling blobs".
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

import aiohttp
from multidict import CIMultiDict
from typing_extensions import override
from yarl import URL

from blobcache_storage.backend.blob_id import (
    canonical_digest,
    is_repository,
    split_repository_id,
)
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.endpoint import parse_endpoint
from blobcache_storage.backend.exchange import origin_of
from blobcache_storage.backend.headers import Headers
from blobcache_storage.backend.http import HTTPBackend
from blobcache_storage.backend.manners import Manners
from blobcache_storage.backend.registry_token import TokenSource
from blobcache_storage.config import BackendConfig
from blobcache_storage.device import BlobVersion, Validator
from blobcache_storage.errors import ConfigError, OriginProtocolError

SHORTCUT_SECONDS: Final = 60.0
"""How long a redirect is followed without asking the registry: below the life of any signed URL,
and a credential taken away ends within the minute."""
SHORTCUTS_MAX: Final = 256


class RegistryBackend(HTTPBackend):
    """Blobs of one repository, or of any where the configuration names none."""

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        super().__init__(config, policy=policy, manners=manners)
        section = config.registry
        assert section is not None
        if section.scheme not in ("http", "https"):
            raise ConfigError("`registry.scheme` must be 'https' or 'http'")
        if section.repository and not is_repository(section.repository):
            raise ConfigError("`registry.repository` must be a repository's name")
        self._repository = section.repository
        self._origin = parse_endpoint(f"{section.scheme}://{section.host}", "registry.host")
        if self._origin.raw_path not in ("", "/"):
            raise ConfigError("`registry.host` must be a name and a port at most")
        self._tokens = TokenSource(self._exchange, self._origin, config.credentials)
        self._shortcuts: OrderedDict[str, tuple[URL, float]] = OrderedDict()

    @override
    def check_blob_id(self, blob_id: str) -> str:
        if self._repository:
            return canonical_digest(blob_id)
        repository, digest = split_repository_id(blob_id)
        return f"{repository}/{digest}"

    def _split(self, blob_id: str) -> tuple[str, str]:
        if self._repository:
            return self._repository, canonical_digest(blob_id)
        return split_repository_id(blob_id)

    @override
    def digest_of(self, blob_id: str) -> str | None:
        return self._split(self.check_blob_id(blob_id))[1]

    @override
    def _url(self, blob_id: str) -> URL:
        repository, digest = self._split(blob_id)
        base = str(self._origin).rstrip("/")
        return URL(f"{base}/v2/{repository}/blobs/{digest}", encoded=True)

    @override
    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        authorization = await self._tokens.authorization(self._split(blob_id)[0])
        if authorization is not None:
            headers["Authorization"] = authorization

    @override
    async def _recover(self, blob_id: str, response: aiohttp.ClientResponse, body: bytes) -> bool:
        # A storage host behind a redirect has no say in where the registry's credentials go.
        if response.status != 401 or origin_of(response.url) != origin_of(self._origin):
            return False
        sent = response.request_info.headers.get("Authorization")
        return await self._tokens.challenged(self._split(blob_id)[0], response, sent)

    @override
    def _shortcut(self, method: str, blob_id: str) -> URL | None:
        # A URL signed for GET is often refused to HEAD.
        url, until = self._shortcuts.get(blob_id, (None, 0.0))
        return url if method == "GET" and time.monotonic() < until else None

    @override
    def _landed(self, method: str, blob_id: str, url: URL) -> None:
        if method != "GET" or origin_of(url) == origin_of(self._origin):
            return
        self._shortcuts[blob_id] = (url, time.monotonic() + SHORTCUT_SECONDS)
        self._shortcuts.move_to_end(blob_id)
        while len(self._shortcuts) > SHORTCUTS_MAX:
            self._shortcuts.popitem(last=False)

    @override
    def _forget_shortcut(self, blob_id: str) -> None:
        self._shortcuts.pop(blob_id, None)

    @override
    def _version(self, blob_id: str, headers: Headers, size_bytes: int) -> BlobVersion:
        digest = self._split(blob_id)[1]
        said = headers.get("Docker-Content-Digest", "")
        if said.startswith("sha256:") and said != digest:
            raise OriginProtocolError(f"the registry answered for another digest than '{digest}'")
        return BlobVersion(
            size_bytes, Validator.DIGEST, digest, f'"{digest}"', headers.get("Last-Modified")
        )

    @override
    def reconfigure(self, config: BackendConfig) -> None:
        super().reconfigure(config)
        self._shortcuts.clear()
        self._tokens.replace_credentials(config.credentials)

    @override
    async def shutdown(self) -> None:
        await self._tokens.close()
        await super().shutdown()
