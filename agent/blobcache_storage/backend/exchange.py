"""One request and its redirects: the client side of HTTP as every backend uses it.

Answers come back as soon as their head is there, whatever their status; what a status means is
`http`'s business. Errors name the origin's host, never a path, query or header: those may carry
signatures.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from blobcache_storage.backend.connector import (
    AddressPolicy,
    CheckedResolver,
    RefusedAddressError,
    open_connector,
)
from blobcache_storage.errors import (
    BackendError,
    OriginProtocolError,
    OriginRefused,
    OriginTimeout,
    OriginUnreachable,
)

USER_AGENT: Final = "blobcache"
REDIRECTS_MAX: Final = 3
LOCATION_CHARACTERS_MAX: Final = 8000
HEADER_LINE_BYTES_MAX: Final = 8190
HEADER_FIELD_BYTES_MAX: Final = 8190
HEADERS_MAX: Final = 128
READ_BUFFER_BYTES: Final = 256 * 1024
ERROR_BODY_BYTES_MAX: Final = 8 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

Authorize = Callable[[str, URL, "CIMultiDict[str]"], Awaitable[None]]
"""Adds credentials to the headers of a request to this URL."""


def origin_of(url: URL) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port: what credentials belong to."""
    return url.scheme, url.host, url.port


def host_of(url: URL) -> str:
    """Return `name[:port]` for messages."""
    name = url.host or "?"
    return name if url.is_default_port() else f"{name}:{url.port}"


def translate(error: Exception, host: str) -> BackendError:
    """Return what an error of the client means; its own text may hold a signed URL, so is lost."""
    if isinstance(error, TimeoutError):
        return OriginTimeout(f"origin '{host}' did not answer in time")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return OriginUnreachable(f"the name of origin '{host}' did not resolve")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        found = error.certificate_error
        why = getattr(found, "verify_message", "") or type(found).__name__
        return OriginUnreachable(
            f"the certificate of origin '{host}' is not trusted: {why};"
            " `tls.caBundle` must hold its authority"
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return OriginUnreachable(f"TLS with origin '{host}' failed")
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, RefusedAddressError):
            return OriginRefused(f"origin '{host}': {error.os_error}")
        number = error.os_error.errno
        why = os.strerror(number) if number else type(error.os_error).__name__
        return OriginUnreachable(
            f"origin '{host}' cannot be reached: {why}; it must run, and this node must reach it"
        )
    if isinstance(error, aiohttp.InvalidURL):
        return OriginProtocolError(f"the address of origin '{host}' is not one to connect to")
    if isinstance(error, aiohttp.ClientResponseError):
        return OriginProtocolError(f"the answer of origin '{host}' is not sound HTTP")
    return OriginUnreachable(f"the connection to origin '{host}' broke ({type(error).__name__})")


class Exchange:
    """Sends requests of one backend; connections are kept and reused.

    Args:
        tls: Trust and checks for https.
        connect_timeout_seconds: For the name, and again for connecting with TLS.
        timeout_seconds: From the request's last byte to the end of the answer's head.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        tls: ssl.SSLContext,
        *,
        connect_timeout_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._policy = policy
        self._tls = tls
        self.connect_timeout_seconds = connect_timeout_seconds
        self.timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._resolver: CheckedResolver | None = None
        self._is_closed = False

    def reconfigure(self, *, connect_timeout_seconds: float, timeout_seconds: float) -> None:
        """Take new time-outs for requests to come."""
        self.connect_timeout_seconds = connect_timeout_seconds
        self.timeout_seconds = timeout_seconds
        if self._resolver is not None:
            self._resolver.timeout_seconds = connect_timeout_seconds

    def _open_session(self) -> aiohttp.ClientSession:
        """Return the session, made on first use because it belongs to the running loop."""
        if self._is_closed:
            raise OriginUnreachable("the backend is shut down")
        if self._session is None:
            self._resolver = CheckedResolver(self._policy, self.connect_timeout_seconds)
            tracing = aiohttp.TraceConfig()
            tracing.on_request_headers_sent.append(self._start_head_clock)
            self._session = aiohttp.ClientSession(
                connector=open_connector(self._policy, self._resolver, self._tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": USER_AGENT},
                trust_env=False,
                auto_decompress=False,
                raise_for_status=False,
                trace_configs=[tracing],
                read_bufsize=READ_BUFFER_BYTES,
                max_line_size=HEADER_LINE_BYTES_MAX,
                max_field_size=HEADER_FIELD_BYTES_MAX,
                max_headers=HEADERS_MAX,
            )
        return self._session

    async def _start_head_clock(
        self,
        session: aiohttp.ClientSession,
        context: SimpleNamespace,
        params: aiohttp.TraceRequestHeadersSentParams,
    ) -> None:
        """Begin the time for the answer's head once the request left."""
        deadline: asyncio.Timeout = context.trace_request_ctx
        deadline.reschedule(asyncio.get_running_loop().time() + self.timeout_seconds)

    async def _send_once(
        self, method: str, url: URL, headers: CIMultiDict[str]
    ) -> aiohttp.ClientResponse:
        # The name has its own time-out in the resolver, connecting its own below; this one covers
        # both until the request is sent, and the head from then on.
        to_connect = 2 * self.connect_timeout_seconds
        try:
            async with asyncio.timeout(to_connect) as deadline:
                return await self._open_session().request(
                    method,
                    url,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(
                        total=None, sock_connect=self.connect_timeout_seconds
                    ),
                    trace_request_ctx=deadline,
                )
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error, host_of(url)) from None

    async def send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        *,
        authorize: Authorize | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request and follow at most `REDIRECTS_MAX` redirects.

        Args:
            url: Already percent-encoded; sent as it is.
            headers: Without credentials.
            authorize: Asked for credentials for each hop on the first URL's own origin; a hop
                to another origin ends that for good.

        Returns:
            The answer with its head read. The caller reads or closes it.

        Raises:
            BackendError: There is no answer, or a redirect that may not be followed.
        """
        first = url
        for _ in range(REDIRECTS_MAX + 1):
            complete = CIMultiDict(headers)
            complete["Accept-Encoding"] = "identity"
            if authorize is not None:
                await authorize(method, url, complete)
            response = await self._send_once(method, url, complete)
            location = response.headers.get("Location", "")
            if response.status not in _REDIRECTS or not location:
                return response
            await read_error_body(response, self.timeout_seconds)
            url = _next_hop(url, location)
            if origin_of(url) != origin_of(first):
                authorize = None
        raise OriginProtocolError(
            f"origin '{host_of(first)}' redirected more than {REDIRECTS_MAX} times"
        )

    async def close(self) -> None:
        """Close all connections; idempotent. Answers still being read break off."""
        self._is_closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        if self._resolver is not None:
            await self._resolver.close()


def _next_hop(url: URL, location: str) -> URL:
    """Return where a redirect leads, if it may be followed there."""
    host = host_of(url)
    if len(location) > LOCATION_CHARACTERS_MAX or not location.isascii():
        raise OriginProtocolError(f"origin '{host}' redirected to no usable Location")
    try:
        target = url.join(URL(location, encoded=True)).with_fragment(None)
        port = target.port
    except ValueError:
        raise OriginProtocolError(f"origin '{host}' redirected to no usable Location") from None
    if target.scheme not in ("http", "https") or not target.host or not port:
        raise OriginProtocolError(f"origin '{host}' redirected to something other than HTTP")
    if target.user is not None or target.password is not None:
        raise OriginProtocolError(f"origin '{host}' redirected to a URL with credentials in it")
    if url.scheme == "https" and target.scheme != "https":
        raise OriginProtocolError(f"origin '{host}' redirected from https to http")
    return target


async def read_error_body(response: aiohttp.ClientResponse, timeout_seconds: float) -> bytes:
    """Read what an answer without a blob says, to a bound, and end it.

    A short body read to its end leaves the connection for the next request. Never fails: the
    status was the answer, and what it says besides is of use only if it comes.
    """
    body = b""
    try:
        async with asyncio.timeout(timeout_seconds):
            while len(body) < ERROR_BODY_BYTES_MAX and not response.content.at_eof():
                body += await response.content.readany()
    except (aiohttp.ClientError, OSError):
        return body[:ERROR_BODY_BYTES_MAX]
    finally:
        response.close()
    return body[:ERROR_BODY_BYTES_MAX]
