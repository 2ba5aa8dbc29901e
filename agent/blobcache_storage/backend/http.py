"""What all HTTP origins have in common: from a fetch to a checked head.

A backend says where a blob is (`_url`), who asks (`_authorize`) and what it can do about a refusal
(`_recover`); the rest is here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import aiohttp
from multidict import CIMultiDict
from typing_extensions import override
from yarl import URL

from blobcache_storage.backend.base import (
    BlobBackend,
    FetchStream,
    check_expected,
    resolve_span,
)
from blobcache_storage.backend.body import HTTPStream
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.exchange import Exchange, host_of, read_error_body
from blobcache_storage.backend.headers import (
    Headers,
    content_length,
    content_range,
    retry_after_seconds,
    unsatisfied_size,
    version_of,
)
from blobcache_storage.backend.manners import Manners
from blobcache_storage.backend.tls import tls_context
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import Pending
from blobcache_storage.device import (
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
    Validator,
)
from blobcache_storage.errors import (
    BackendError,
    BlobChanged,
    BlobNotFound,
    CredentialsPending,
    OriginDenied,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    RangeNotSatisfiable,
    StorageError,
)

_MENDABLE: Final = frozenset({400, 401, 403})
"""Refusals that new credentials or a corrected clock may turn."""


def range_header(request: RangeRequest) -> str | None:
    """Return the Range header of a request, None for a whole blob (RFC 9110 section 14.2)."""
    if request.suffix_length is not None:
        return f"bytes=-{request.suffix_length}"
    if request.first is None:
        return None
    return f"bytes={request.first}-{'' if request.last is None else request.last}"


def status_error(status: int, headers: Headers, blob_id: str, host: str) -> StorageError:
    """Return the error that an answer without a blob means."""
    if status in (404, 410):
        return BlobNotFound(f"origin '{host}' has no blob '{blob_id}'", status=status)
    if status in (401, 403):
        return OriginDenied(
            f"origin '{host}' refused blob '{blob_id}' ({status}): the credentials must permit"
            " reading it",
            status=status,
        )
    if status == 412:
        return BlobChanged(f"the origin now has another version of blob '{blob_id}'")
    if status in (429, 503):
        wait = retry_after_seconds(headers, datetime.now(UTC))
        return OriginThrottled(
            f"origin '{host}' is busy ({status}); it must permit what is asked of it, or"
            " `bytesPerSecondLimit` must ask for less",
            status=status,
            retry_after_seconds=wait,
        )
    if status == 408:
        return OriginTimeout(f"origin '{host}' gave up waiting ({status})", status=status)
    if status >= 500:
        return OriginServerError(f"origin '{host}' failed ({status})", status=status)
    return OriginProtocolError(
        f"origin '{host}' answered {status} for blob '{blob_id}'", status=status
    )


class HTTPBackend(BlobBackend):
    """A backend whose blobs are resources of an HTTP origin.

    Args:
        config: Checked by `open_backend`.
        policy: Which addresses the origin may have; may change while in use.
        manners: How it is asked; by default as the configuration says.
    """

    def __init__(
        self, config: BackendConfig, *, policy: AddressPolicy, manners: Manners | None = None
    ) -> None:
        self._config = config
        self._manners = manners or Manners(
            retry_limit=config.retry_limit, bytes_per_second_limit=config.bytes_per_second_limit
        )
        self._exchange = Exchange(
            policy,
            tls_context(config.ca_bundle_pem, insecure_skip_verify=config.insecure_skip_verify),
            connect_timeout_seconds=config.connect_timeout_seconds,
            timeout_seconds=config.timeout_seconds,
        )

    @abc.abstractmethod
    def _url(self, blob_id: str) -> URL:
        """Return where a blob is, percent-encoded, for a canonical id."""

    def _headers(self, blob_id: str) -> dict[str, str]:
        """Return what every request for a blob says besides range and version."""
        return {}

    async def _authorize(
        self, blob_id: str, method: str, url: URL, headers: CIMultiDict[str]
    ) -> None:
        """Add credentials to the headers; `url` is on the origin of `_url(blob_id)`."""

    async def _recover(self, blob_id: str, response: aiohttp.ClientResponse, body: bytes) -> bool:
        """Do what can be done about a 4xx; return whether to ask once more."""
        return False

    def _shortcut(self, method: str, blob_id: str) -> URL | None:
        """Return where an earlier request for a blob was redirected to, if that is still good."""
        return None

    def _landed(self, method: str, blob_id: str, url: URL) -> None:
        """Note where a request for a blob ended up."""

    def _forget_shortcut(self, blob_id: str) -> None:
        """Ask at the front door again."""

    def _refine(self, error: StorageError, body: bytes) -> StorageError:
        """Return a more telling error, if the body of an answer tells more."""
        return error

    def _version(self, blob_id: str, headers: Headers, size_bytes: int) -> BlobVersion:
        """Return the version an answer belongs to."""
        return version_of(headers, size_bytes)

    def _check_credentials(self) -> None:
        if isinstance(self._config.credentials, Pending):
            raise CredentialsPending("the credentials of this origin have not arrived yet")

    @override
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        blob_id = self.check_blob_id(blob_id)
        self._check_credentials()
        return await self._manners.run(
            blob_id, source, lambda: self._fetch_once(blob_id, request, expect, source)
        )

    @override
    async def stat(self, blob_id: str) -> BlobVersion:
        blob_id = self.check_blob_id(blob_id)
        self._check_credentials()
        return await self._manners.run(
            blob_id, RequestSource.ON_DEMAND, lambda: self._stat_once(blob_id)
        )

    async def _fetch_once(
        self,
        blob_id: str,
        request: RangeRequest,
        expect: BlobVersion | None,
        source: RequestSource,
    ) -> FetchStream:
        slots = self._manners.slots
        await slots.acquire(source)
        try:
            response = await self._ask(blob_id, request, expect)
            try:
                version, span = self._check_head(blob_id, request, expect, response)
            except BaseException:
                response.close()
                raise
        except BaseException:
            slots.release(source)
            raise
        return HTTPStream(
            response,
            version,
            span,
            rate=self._manners.rate,
            source=source,
            timeout_seconds=self._config.timeout_seconds,
            on_end=self._ender(source),
        )

    def _ender(self, source: RequestSource) -> Callable[[bool], None]:
        def end(origin_failed: bool) -> None:
            self._manners.slots.release(source)
            if origin_failed:
                self._manners.breaker.note_failure(is_probe=False)

        return end

    async def _ask(
        self, blob_id: str, request: RangeRequest, expect: BlobVersion | None
    ) -> aiohttp.ClientResponse:
        """Return a 200 or 206, its body unread."""
        headers = self._headers(blob_id)
        wanted = range_header(request)
        if wanted is not None:
            headers["Range"] = wanted
        if expect is not None and expect.validator is Validator.ETAG:
            headers["If-Match"] = expect.token
        response = await self._answer("GET", blob_id, headers)
        if response.status == 416:
            size = unsatisfied_size(response.headers)
            await read_error_body(response, self._config.timeout_seconds)
            if size is None and request.first != 0:
                size = (await self._head(blob_id)).size_bytes
            if expect is not None and size is not None and size != expect.size_bytes:
                raise BlobChanged(f"the origin now has another version of blob '{blob_id}'")
            if size is not None and (size > 0 or request.first != 0):
                raise RangeNotSatisfiable(size)
            # No byte at offset 0: the blob is empty, and only a whole request may say so.
            headers.pop("Range", None)
            response = await self._answer("GET", blob_id, headers)
        if response.status not in (200, 206):
            await self._fail(blob_id, response)
        return response

    async def _answer(
        self, method: str, blob_id: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request; a refusal that can be mended is mended once."""

        async def authorize(sent_method: str, url: URL, complete: CIMultiDict[str]) -> None:
            await self._authorize(blob_id, sent_method, url, complete)

        response = await self._ask_shortcut(method, blob_id, headers)
        if response is not None:
            return response
        url = self._url(blob_id)
        response = await self._exchange.send(method, url, headers, authorize=authorize)
        if response.status in _MENDABLE:
            body = await read_error_body(response, self._config.timeout_seconds)
            if not await self._recover(blob_id, response, body):
                host = host_of(response.url)
                error = status_error(response.status, response.headers, blob_id, host)
                raise self._refine(error, body)
            response = await self._exchange.send(method, url, headers, authorize=authorize)
        if response.status in (200, 206):
            self._landed(method, blob_id, response.url)
        return response

    async def _ask_shortcut(
        self, method: str, blob_id: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse | None:
        """Ask where an earlier redirect led; None if that is not known or no longer good."""
        shortcut = self._shortcut(method, blob_id)
        if shortcut is None:
            return None
        try:
            response = await self._exchange.send(method, shortcut, headers)
        except BackendError:
            self._forget_shortcut(blob_id)
            raise
        if response.status in (200, 206, 416):
            return response
        self._forget_shortcut(blob_id)
        if response.status in (429, 503):
            # It is good still and its host is busy: asking anew at once would lead back there.
            return response
        await read_error_body(response, self._config.timeout_seconds)
        return None

    async def _fail(self, blob_id: str, response: aiohttp.ClientResponse) -> None:
        """Raise the error that an answer means."""
        body = await read_error_body(response, self._config.timeout_seconds)
        error = status_error(response.status, response.headers, blob_id, host_of(response.url))
        raise self._refine(error, body)

    def _check_head(
        self,
        blob_id: str,
        request: RangeRequest,
        expect: BlobVersion | None,
        response: aiohttp.ClientResponse,
    ) -> tuple[BlobVersion, ByteRange]:
        """Return version and span of an answer, which must be exactly what was asked."""
        headers, host = response.headers, host_of(response.url)
        self._check_encoding(headers, host)
        length = content_length(headers)
        if response.status == 206:
            start, end, size = content_range(headers)
            span = ByteRange(start, end)
        elif length is None:
            raise OriginProtocolError(f"origin '{host}' did not say how long blob '{blob_id}' is")
        else:
            size, span = length, ByteRange(0, length)
        version = self._version(blob_id, headers, size)
        check_expected(blob_id, version, expect)
        asked = resolve_span(request, size)
        if response.status == 206 and (request.is_whole or span != asked):
            raise OriginProtocolError(f"origin '{host}' answered with another range than asked")
        if response.status == 200 and asked.start != 0:
            raise OriginProtocolError(f"origin '{host}' ignored the range asked for")
        if length is not None and length != span.length:
            raise OriginProtocolError(f"origin '{host}' announced another length than its range")
        return version, span

    def _check_encoding(self, headers: Headers, host: str) -> None:
        if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise OriginProtocolError(
                f"origin '{host}' encoded the blob; it must be served as it is stored"
            )

    async def _stat_once(self, blob_id: str) -> BlobVersion:
        await self._manners.slots.acquire(RequestSource.ON_DEMAND)
        try:
            return await self._head(blob_id)
        finally:
            self._manners.slots.release(RequestSource.ON_DEMAND)

    async def _head(self, blob_id: str) -> BlobVersion:
        response = await self._answer("HEAD", blob_id, self._headers(blob_id))
        if response.status != 200:
            await self._fail(blob_id, response)
        response.close()
        self._check_encoding(response.headers, host_of(response.url))
        size = content_length(response.headers)
        if size is None:
            raise OriginProtocolError(
                f"origin '{host_of(response.url)}' did not say how long blob '{blob_id}' is"
            )
        return self._version(blob_id, response.headers, size)

    @override
    def digest_of(self, blob_id: str) -> str | None:
        return None

    @override
    def reconfigure(self, config: BackendConfig) -> None:
        self._config = config
        self._exchange.reconfigure(
            connect_timeout_seconds=config.connect_timeout_seconds,
            timeout_seconds=config.timeout_seconds,
        )
        self._manners.reconfigure(
            retry_limit=config.retry_limit, bytes_per_second_limit=config.bytes_per_second_limit
        )

    @override
    async def shutdown(self) -> None:
        await self._exchange.close()
