"""An OCI registry: blobs and manifests named by their digest, behind its tokens and redirects.

Reference: OCI distribution-spec, "Pulling blobs", "Pulling manifests".
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

import aiohttp
from multidict import CIMultiDict
from typing_extensions import override
from yarl import URL

from blobcache_storage.backend.base import FetchStream, resolve_span
from blobcache_storage.backend.blob_id import RegistryId, is_repository, parse_registry_id
from blobcache_storage.backend.body import PartOfStream
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.endpoint import parse_endpoint
from blobcache_storage.backend.exchange import origin_of
from blobcache_storage.backend.headers import Headers
from blobcache_storage.backend.http import HTTPBackend
from blobcache_storage.backend.manners import Manners
from blobcache_storage.backend.registry_token import TokenSource
from blobcache_storage.config import BackendConfig, RegistryConfig
from blobcache_storage.device import BlobVersion, RangeRequest, RequestSource, Validator
from blobcache_storage.errors import ConfigError, OriginProtocolError, RangeNotSatisfiable

SHORTCUT_SECONDS: Final = 60.0
"""How long a redirect is followed without asking the registry: below the life of any signed URL,
and a credential taken away ends within the minute."""
SHORTCUTS_MAX: Final = 256
MANIFEST_BYTES_MAX: Final = 4 * 1024 * 1024
"""A registry need not take larger ones (OCI distribution-spec, "Pushing manifests")."""
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
)
MANIFEST_ACCEPT: Final = ", ".join((*MANIFEST_TYPES, "*/*"))
"""All kinds: a registry asked for one kind may convert, and the digest would not fit."""


def registry_origin(config: RegistryConfig) -> URL:
    """Return scheme, host and port of a registry.

    Raises:
        ConfigError: The scheme or the host is none.
    """
    if config.scheme not in ("http", "https"):
        raise ConfigError("`registry.scheme` must be 'https' or 'http'")
    origin = parse_endpoint(f"{config.scheme}://{config.host}", "registry.host")
    if origin.raw_path not in ("", "/"):
        raise ConfigError("`registry.host` must be a name and a port at most")
    return origin


def resource_url(origin: URL, repository: str, kind: str, reference: str) -> URL:
    """Return where a checked repository's blob or manifest is (`kind` as the path has it)."""
    base = str(origin).rstrip("/")
    return URL(f"{base}/v2/{repository}/{kind}/{reference}", encoded=True)


class RegistryBackend(HTTPBackend):
    """Blobs and manifests of one repository, or of any where the configuration names none."""

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        super().__init__(config, policy=policy, manners=manners)
        section = config.registry
        assert section is not None
        self._origin = registry_origin(section)
        if section.repository and not is_repository(section.repository):
            raise ConfigError("`registry.repository` must be a repository's name")
        self._repository = section.repository
        self._tokens = TokenSource(self._exchange, self._origin, config.credentials)
        self._shortcuts: OrderedDict[str, tuple[URL, float]] = OrderedDict()

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return str(parse_registry_id(blob_id, self._repository))

    def _parse(self, blob_id: str) -> RegistryId:
        return parse_registry_id(blob_id, self._repository)

    def _repository_of(self, blob_id: str) -> str:
        return self._repository or self._parse(blob_id).repository

    @override
    def digest_of(self, blob_id: str) -> str | None:
        return self._parse(blob_id).digest

    @override
    def _url(self, blob_id: str) -> URL:
        wanted = self._parse(blob_id)
        kind = "manifests" if wanted.is_manifest else "blobs"
        return resource_url(self._origin, self._repository_of(blob_id), kind, wanted.digest)

    @override
    def _headers(self, blob_id: str) -> dict[str, str]:
        return {"Accept": MANIFEST_ACCEPT} if self._parse(blob_id).is_manifest else {}

    @override
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        if not self._parse(blob_id).is_manifest or request.is_whole:
            return await super().fetch(blob_id, request, expect=expect, source=source)
        # Registries send manifests whole, whatever part is asked for.
        whole = await super().fetch(blob_id, RangeRequest(), expect=expect, source=source)
        try:
            return PartOfStream(whole, resolve_span(request, whole.version.size_bytes))
        except RangeNotSatisfiable:
            await whole.aclose()
            raise

    @override
    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        authorization = await self._tokens.authorization(self._repository_of(blob_id))
        if authorization is not None:
            headers["Authorization"] = authorization

    @override
    async def _recover(self, blob_id: str, response: aiohttp.ClientResponse, body: bytes) -> bool:
        # A storage host behind a redirect has no say in where the registry's credentials go.
        if response.status != 401 or origin_of(response.url) != origin_of(self._origin):
            return False
        sent = response.request_info.headers.get("Authorization")
        return await self._tokens.challenged(self._repository_of(blob_id), response, sent)

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
        wanted = self._parse(blob_id)
        digest = wanted.digest
        said = headers.get("Docker-Content-Digest", "")
        if said.startswith("sha256:") and said != digest:
            raise OriginProtocolError(f"the registry answered for another digest than '{digest}'")
        if wanted.is_manifest and size_bytes > MANIFEST_BYTES_MAX:
            raise OriginProtocolError(f"a manifest must have at most {MANIFEST_BYTES_MAX} bytes")
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
