"""Tokens of an OCI registry: asked for once, shared by all who need them, renewed in time.

Reference: distribution, "Token Authentication Specification"; OCI distribution-spec, "Legacy
Docker support". Only `pull` is ever asked for, on the one repository, whatever a challenge says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from blobcache_storage.backend.challenge import (
    Challenge,
    is_realm_trusted,
    parse_challenges,
)
from blobcache_storage.backend.exchange import Exchange, host_of
from blobcache_storage.backend.headers import retry_after_seconds
from blobcache_storage.backend.http_proxy import static_authorization
from blobcache_storage.backend.signing import ClockSkew
from blobcache_storage.credentials import BasicAuth, BearerToken, Credentials
from blobcache_storage.errors import (
    BackendError,
    OriginDenied,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
)

TOKENS_MAX: Final = 256
"""Repositories whose tokens are kept; the least lately used go first."""
ANSWER_BYTES_MAX: Final = 64 * 1024
TOKEN_CHARACTERS_MAX: Final = 16 * 1024
LIFETIME_SECONDS_DEFAULT: Final = 60.0
"""What the specification sets where an answer has no `expires_in`."""
LIFETIME_SECONDS_MAX: Final = 3600.0
MARGIN_FRACTION: Final = 0.2
MARGIN_SECONDS_MAX: Final = 30.0
"""A token is renewed so long before it ends: a fifth of its life, or this."""


@dataclass(frozen=True, slots=True)
class _Token:
    header: str
    good_until: float


@dataclass(frozen=True, slots=True)
class _Realm:
    url: URL
    service: str


class TokenSource:
    """Credentials of one registry, in whichever form it asks for them.

    Args:
        registry: Scheme, host and port of the registry.
    """

    def __init__(
        self,
        exchange: Exchange,
        registry: URL,
        credentials: Credentials,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchange = exchange
        self._registry = registry
        self._credentials = credentials
        self._clock = clock
        self._realm: _Realm | None = None
        self._is_basic = False
        self._tokens: OrderedDict[str, _Token] = OrderedDict()
        self._flights: dict[str, asyncio.Task[str]] = {}

    def replace_credentials(self, credentials: Credentials) -> None:
        """Take new credentials; tokens got with the old ones are forgotten, if they differ."""
        if credentials == self._credentials:
            return
        self._credentials = credentials
        self._tokens.clear()
        self._flights.clear()
        self._is_basic = False

    async def authorization(self, repository: str) -> str | None:
        """Return the Authorization header for pulling from a repository; None before a challenge.

        Raises:
            BackendError: The token service gave no token.
        """
        if isinstance(self._credentials, BearerToken) or self._is_basic:
            return static_authorization(self._credentials)
        if self._realm is None:
            return None
        return await self._token(repository)

    async def challenged(
        self, repository: str, response: aiohttp.ClientResponse, sent: str | None
    ) -> bool:
        """Take up the challenge of a 401; return whether asking once more makes sense.

        Args:
            sent: The Authorization header that was refused. If another request has renewed the
                token meanwhile, that one is used: a crowd of refused requests renews once.

        Raises:
            OriginDenied: The realm may not be trusted, or the token service refused.
            OriginProtocolError: The challenge cannot be read.
        """
        if isinstance(self._credentials, BearerToken):
            return False
        host = host_of(self._registry)
        try:
            challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
        except ValueError:
            raise OriginProtocolError(
                f"registry '{host}' sent a challenge that cannot be read", status=401
            ) from None
        bearer = next((c for c in challenges if c.scheme == "bearer"), None)
        if bearer is not None:
            self._realm = self._trusted_realm(bearer)
            known = self._tokens.get(repository)
            if known is not None and known.header == sent:
                del self._tokens[repository]
            await self._token(repository)
            return True
        has_basic = any(c.scheme == "basic" for c in challenges)
        if not has_basic or not isinstance(self._credentials, BasicAuth):
            return False
        self._is_basic = True
        return sent != static_authorization(self._credentials)

    def _trusted_realm(self, challenge: Challenge) -> _Realm:
        host = host_of(self._registry)
        try:
            url = URL(challenge.parameters.get("realm", ""), encoded=True).with_fragment(None)
            is_trusted = is_realm_trusted(self._registry, url)
        except ValueError:
            is_trusted = False
        if not is_trusted:
            raise OriginDenied(
                f"registry '{host}' names a token realm that is not its own host, domain and"
                " security; nothing is sent there",
                status=401,
            )
        return _Realm(url, challenge.parameters.get("service", ""))

    async def _token(self, repository: str) -> str:
        known = self._tokens.get(repository)
        if known is not None and known.good_until > self._clock():
            self._tokens.move_to_end(repository)
            return known.header
        flight = self._flights.get(repository)
        if flight is None:
            flight = asyncio.create_task(self._fetch(repository, self._credentials))
            self._flights[repository] = flight
            flight.add_done_callback(lambda done: self._land(repository, done))
        # One who gives up must not take the token away from those who still wait.
        return await asyncio.shield(flight)

    def _land(self, repository: str, flight: asyncio.Task[str]) -> None:
        if self._flights.get(repository) is flight:
            del self._flights[repository]
        if not flight.cancelled():
            # Looked at here, so that an error nobody waits for any more is no warning.
            flight.exception()

    async def _fetch(self, repository: str, credentials: Credentials) -> str:
        assert self._realm is not None
        realm = self._realm
        query = {"scope": f"repository:{repository}:pull"}
        if realm.service:
            query["service"] = realm.service
        own = realm.url.raw_query_string
        full = f"{own}&{urlencode(query)}" if own else urlencode(query)
        url = URL(f"{realm.url.with_query(None)}?{full}", encoded=True)

        async def authorize(method: str, to: URL, headers: CIMultiDict[str]) -> None:
            authorization = static_authorization(credentials)
            if authorization is not None:
                headers["Authorization"] = authorization

        response = await self._exchange.send("GET", url, {}, authorize=authorize)
        if response.status != 200:
            response.close()
            raise _refusal(response, host_of(realm.url))
        body = await self._read(response)
        token, lifetime = _parse_answer(body, host_of(realm.url))
        margin = min(lifetime * MARGIN_FRACTION, MARGIN_SECONDS_MAX)
        header = f"Bearer {token}"
        if credentials == self._credentials:
            self._tokens[repository] = _Token(header, self._clock() + lifetime - margin)
            while len(self._tokens) > TOKENS_MAX:
                self._tokens.popitem(last=False)
        return header

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        host, body = host_of(response.url), b""
        try:
            async with asyncio.timeout(self._exchange.timeout_seconds):
                while not response.content.at_eof():
                    body += await response.content.readany()
                    if len(body) > ANSWER_BYTES_MAX:
                        raise OriginProtocolError(f"token service '{host}' sent too much")
        except TimeoutError:
            raise OriginTimeout(f"token service '{host}' did not answer in time") from None
        except (aiohttp.ClientError, OSError):
            raise OriginUnreachable(f"token service '{host}' broke off its answer") from None
        finally:
            response.close()
        return body

    async def close(self) -> None:
        """End token requests under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)


def _refusal(response: aiohttp.ClientResponse, host: str) -> BackendError:
    status = response.status
    if status in (400, 401, 403):
        return OriginDenied(f"token service '{host}' refused ({status})", status=status)
    if status in (429, 503):
        wait = retry_after_seconds(response.headers, ClockSkew().now())
        return OriginThrottled(
            f"token service '{host}' is busy ({status})", status=status, retry_after_seconds=wait
        )
    if status >= 500:
        return OriginServerError(f"token service '{host}' failed ({status})", status=status)
    return OriginProtocolError(f"token service '{host}' answered {status}", status=status)


def _parse_answer(body: bytes, host: str) -> tuple[str, float]:
    """Return token and lifetime in seconds."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise OriginProtocolError(f"token service '{host}' did not answer with a JSON object")
    token = answer.get("token") or answer.get("access_token")
    is_sound = (
        isinstance(token, str)
        and 0 < len(token) <= TOKEN_CHARACTERS_MAX
        and all("!" <= character <= "~" for character in token)
    )
    if not is_sound:
        raise OriginProtocolError(f"token service '{host}' answered without a usable token")
    lifetime = answer.get("expires_in", LIFETIME_SECONDS_DEFAULT)
    # Not `<= 0`: JSON as Python reads it has NaN.
    if not isinstance(lifetime, int | float) or isinstance(lifetime, bool) or not lifetime > 0:
        lifetime = LIFETIME_SECONDS_DEFAULT
    assert isinstance(token, str)
    # Bounded first: a whole number of hundreds of digits is no float.
    return token, float(min(lifetime, LIFETIME_SECONDS_MAX))
