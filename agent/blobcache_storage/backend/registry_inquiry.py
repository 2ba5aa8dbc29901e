"""Asking a registry on behalf of somebody: may who shows this credential read, and what is it?

Nothing here knows a configuration's own credential. What a caller shows goes to the registry's
own host as it is, and with no redirect anywhere else; who shows nothing is asked for with an
anonymous token at most, which realm gives it out being checked as for any other token.

Reference: OCI distribution-spec, "Checking if content exists in the registry".
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from typing import Final, Literal

import aiohttp
from multidict import CIMultiDict
from pydantic import SecretStr
from yarl import URL

from blobcache_storage.backend.blob_id import is_repository
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.exchange import (
    Exchange,
    host_of,
    origin_of,
    read_error_body,
    translate,
)
from blobcache_storage.backend.http import status_error
from blobcache_storage.backend.manners import Manners, SlotsBusy
from blobcache_storage.backend.registry import (
    MANIFEST_ACCEPT,
    MANIFEST_BYTES_MAX,
    registry_origin,
    resource_url,
)
from blobcache_storage.backend.registry_token import TokenSource
from blobcache_storage.backend.tls import tls_context
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import Anonymous
from blobcache_storage.device import RequestSource
from blobcache_storage.errors import (
    ConfigError,
    InvalidBlobId,
    OriginDenied,
    OriginProtocolError,
    OriginTimeout,
)

Kind = Literal["manifests", "blobs"]

CHALLENGES_MAX: Final = 8
INQUIRY_SECONDS_MAX: Final = 15.0
"""One question, with the token it needs and redirects; whatever time-outs are configured."""
SLOT_WAIT_SECONDS_MAX: Final = 2.0
_CHALLENGE: Final = re.compile(r"[\x20-\x7e]{1,4096}")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_TRANSIENT: Final = frozenset({408, 429})


@dataclass(frozen=True, slots=True)
class Finding:
    """What the registry answered. It is well, whatever it said: other answers are raised."""

    status: int
    """200 (there, and permitted), 401, 403, 404, or another 4xx."""
    digest: str = ""
    """`sha256:<hex>` of what is there."""
    challenges: tuple[str, ...] = ()
    """The WWW-Authenticate headers of a 401, verbatim, each one line of visible ASCII."""


def is_reference(kind: Kind, reference: str) -> bool:
    """Whether a text can name something of this kind: a digest, or for manifests also a tag."""
    if _DIGEST.fullmatch(reference):
        return True
    return kind == "manifests" and _TAG.fullmatch(reference) is not None


class RegistryInquiry:
    """Asks one registry. Safe for many tasks of one loop.

    Args:
        config: Of a registry backend; its credentials are not looked at.
        policy: Which addresses the registry may have.
    """

    def __init__(self, config: BackendConfig, *, policy: AddressPolicy) -> None:
        registry = config.registry
        if registry is None:
            raise ConfigError("only a registry can be asked for images")
        self._origin = registry_origin(registry)
        self._timeout_seconds = config.timeout_seconds
        self._exchange = Exchange(
            policy,
            tls_context(config.ca_bundle_pem, insecure_skip_verify=config.insecure_skip_verify),
            connect_timeout_seconds=config.connect_timeout_seconds,
            timeout_seconds=config.timeout_seconds,
        )
        # Once is enough: who asks has other places to go to.
        self._manners = Manners(retry_limit=0, bytes_per_second_limit=None)
        self._tokens = TokenSource(self._exchange, self._origin, Anonymous())

    async def ask(
        self, repository: str, kind: Kind, reference: str, authorization: SecretStr | None
    ) -> Finding:
        """Ask for the head of a manifest, or of one byte of a blob.

        Args:
            reference: A digest, or a manifest's tag.
            authorization: The caller's Authorization header; None if it shows none.

        Raises:
            InvalidBlobId: A name or reference that cannot be.
            OriginUnreachable, OriginTimeout, OriginServerError, OriginThrottled, CircuitOpen, …:
                The registry, or the token service of an anonymous caller, did not answer.
        """
        if not is_repository(repository) or not is_reference(kind, reference):
            raise InvalidBlobId("a repository, tag or digest must follow the distribution-spec")

        async def attempt() -> Finding:
            await self._take_slot()
            try:
                async with asyncio.timeout(INQUIRY_SECONDS_MAX):
                    return await self._ask(repository, kind, reference, authorization)
            except TimeoutError:
                host = host_of(self._origin)
                raise OriginTimeout(f"registry '{host}' did not answer in time") from None
            finally:
                self._manners.slots.release(RequestSource.ON_DEMAND)

        return await self._manners.run(
            f"{repository}@{reference}", RequestSource.ON_DEMAND, attempt
        )

    async def _take_slot(self) -> None:
        """Wait for one of the few questions at a time, but not for long: who asks has others."""
        try:
            async with asyncio.timeout(SLOT_WAIT_SECONDS_MAX):
                await self._manners.slots.acquire(RequestSource.ON_DEMAND)
        except TimeoutError:
            raise SlotsBusy("too many are being asked for at a time") from None

    async def _ask(
        self, repository: str, kind: Kind, reference: str, authorization: SecretStr | None
    ) -> Finding:
        url = resource_url(self._origin, repository, kind, reference)
        # A URL signed for GET is often refused to HEAD, and blobs are often redirected.
        method = "HEAD" if kind == "manifests" else "GET"
        response = await self._send(method, url, repository, kind, authorization)
        if (
            response.status in (200, 206)
            and kind == "manifests"
            and not _DIGEST.fullmatch(reference)
        ):
            return await self._resolved(response, url, repository, authorization)
        return await self._finding(response, reference)

    async def _send(
        self, method: str, url: URL, repository: str, kind: Kind, authorization: SecretStr | None
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": MANIFEST_ACCEPT} if kind == "manifests" else {"Range": "bytes=0-0"}

        async def show(to_method: str, to: URL, complete: CIMultiDict[str]) -> None:
            assert authorization is not None
            complete["Authorization"] = authorization.get_secret_value()

        if authorization is not None:
            return await self._exchange.send(method, url, headers, authorize=show)

        async def show_token(to_method: str, to: URL, complete: CIMultiDict[str]) -> None:
            try:
                token = await self._tokens.authorization(repository)
            except OriginDenied:
                return  # no token for strangers: the registry's own challenge says what is needed
            if token is not None:
                complete["Authorization"] = token

        response = await self._exchange.send(method, url, headers, authorize=show_token)
        if response.status != 401 or origin_of(response.url) != origin_of(self._origin):
            return response
        sent = response.request_info.headers.get("Authorization")
        try:
            is_worth_it = await self._tokens.challenged(repository, response, sent)
        except (OriginDenied, OriginProtocolError):
            return response
        if not is_worth_it:
            return response
        response.close()
        return await self._exchange.send(method, url, headers, authorize=show_token)

    async def _resolved(
        self,
        response: aiohttp.ClientResponse,
        url: URL,
        repository: str,
        authorization: SecretStr | None,
    ) -> Finding:
        """Return what a tag stands for: as the registry says, or, if it does not, as it hashes."""
        said = response.headers.get("Docker-Content-Digest", "")
        finding = await self._finding(response, said)
        if finding.status != 200 or _DIGEST.fullmatch(said):
            return finding
        response = await self._send("GET", url, repository, "manifests", authorization)
        if response.status != 200:
            return await self._finding(response, "")
        body = await self._body(response)
        return Finding(200, f"sha256:{hashlib.sha256(body).hexdigest()}")

    async def _finding(self, response: aiohttp.ClientResponse, digest: str) -> Finding:
        """Return what a head says, and end the answer."""
        status, headers = response.status, response.headers
        if status in (200, 206):
            response.close()
            # A log-in page in place of what was asked for permits nothing.
            if headers.get("Content-Type", "").strip().lower().startswith("text/html"):
                return Finding(403)
            return Finding(200, digest if _DIGEST.fullmatch(digest) else "")
        await read_error_body(response, self._timeout_seconds)
        host = host_of(response.url)
        if status >= 500 or status in _TRANSIENT:
            raise status_error(status, headers, digest, host)
        if status == 416:
            # An empty blob has no first byte.
            return Finding(200, digest)
        if not 400 <= status < 500:
            raise OriginProtocolError(f"registry '{host}' answered {status}", status=status)
        if origin_of(response.url) != origin_of(self._origin):
            # A storage host behind a redirect has no say in who may read.
            return Finding(404 if status == 404 else 403)
        return Finding(status, challenges=_challenges(response) if status == 401 else ())

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        host, body = host_of(response.url), b""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while not response.content.at_eof():
                    body += await response.content.readany()
                    if len(body) > MANIFEST_BYTES_MAX:
                        raise OriginProtocolError(f"registry '{host}' sent too large a manifest")
        except TimeoutError:
            raise OriginTimeout(f"registry '{host}' did not send a manifest in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error, host) from None
        finally:
            response.close()
        return body

    async def close(self) -> None:
        """End what is under way."""
        await self._tokens.close()
        await self._exchange.close()


def _challenges(response: aiohttp.ClientResponse) -> tuple[str, ...]:
    found = response.headers.getall("WWW-Authenticate", [])[:CHALLENGES_MAX]
    return tuple(value for value in found if _CHALLENGE.fullmatch(value))
