"""
The API server over plain REST: what the operator needs of it and no more.

Every method may raise any `KubeError`. Answers are JSON as the server sent it; callers validate.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import structlog

from blobcache_operator import errors, metrics
from blobcache_operator.kubeauth import TOKEN_REFRESH_SECONDS, KubeAccess

REQUEST_TIMEOUT_SECONDS = 30.0
# aiohttp closes TLS connections behind one's back; its manual says to leave the loop so long to it
# ("Graceful shutdown" of its client), else they stay open until their memory is collected.
TLS_CLOSE_SECONDS = 0.25
CONNECTIONS_MAX = 16
PAGE_OBJECTS = 500
PAGES_MAX = 400  # 200,000 objects; a server that never ends its pages must not fill our memory
RELISTS_MAX = 3
THROTTLED_RETRIES_MAX = 3
THROTTLED_DELAY_SECONDS_MAX = 10.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024
WATCH_LINE_BYTES_MAX = 4 * 1024 * 1024

PARTIAL_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
TABLE = "application/json;as=Table;g=meta.k8s.io;v=v1"
MERGE_PATCH = "application/merge-patch+json"

log = structlog.get_logger(__name__)

JSONObject = dict[str, Any]


class Kube:
    """
    A client of one API server; use as an async context manager.

    Args:
        access: Where the server is and how to log in.
    """

    def __init__(self, access: KubeAccess) -> None:
        self.access = access
        self._session: aiohttp.ClientSession | None = None
        self._token: str | None = None
        self._token_time = float("-inf")

    async def __aenter__(self) -> Self:
        context = await asyncio.to_thread(self.access.ssl_context)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS_MAX),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS),
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
            await asyncio.sleep(TLS_CLOSE_SECONDS)

    async def get(
        self, path: str, *, accept: str = "application/json", **parameters: str
    ) -> JSONObject:
        """Return one object."""
        return await self._request("GET", path, parameters=parameters, accept=accept)

    async def create(self, path: str, body: JSONObject) -> JSONObject:
        """Create an object in a collection; an existing one is a `Conflict`."""
        return await self._request("POST", path, body=body)

    async def replace(self, path: str, body: JSONObject) -> JSONObject:
        """Replace an object; with a resourceVersion in the body it is a compare-and-swap."""
        return await self._request("PUT", path, body=body)

    async def merge_patch(self, path: str, body: JSONObject) -> JSONObject:
        """Apply a JSON merge patch: a null removes, a list replaces the whole list."""
        return await self._request("PATCH", path, body=body, content_type=MERGE_PATCH)

    async def delete(self, path: str, *, uid: str | None = None) -> None:
        """Delete an object, only if it still has this uid when one is given."""
        body = {"preconditions": {"uid": uid}} if uid else None
        await self._request("DELETE", path, body=body)

    async def list_all(
        self, path: str, *, accept: str = "application/json", **parameters: str
    ) -> list[JSONObject]:
        """
        Return a whole collection, page by page, as of one resource version.

        A Table's rows are returned with its column names beside them, see `list_table`.
        """
        pages = await self._list_pages(path, accept, parameters)
        return [item for page in pages for item in page.get("items") or []]

    async def list_table(self, path: str, **parameters: str) -> list[tuple[JSONObject, JSONObject]]:
        """Return (metadata, {column: cell}) of every object: what kubectl prints, and no more."""
        parameters = {**parameters, "includeObject": "Metadata"}
        rows: list[tuple[JSONObject, JSONObject]] = []
        names: list[str] = []
        for page in await self._list_pages(path, TABLE, parameters):
            # Later pages may leave the columns out.
            names = [column["name"] for column in page.get("columnDefinitions") or []] or names
            for row in page.get("rows") or []:
                cells = dict(zip(names, row.get("cells") or [], strict=False))
                rows.append(((row.get("object") or {}).get("metadata") or {}, cells))
        return rows

    async def watch_metadata(self, path: str, *, timeout_seconds: int) -> AsyncGenerator[str, None]:
        """
        Yield the type of each change from now on, until the server ends the watch.

        For wake-ups only: what changed is not told, so nothing can be built on it.
        """
        listed = await self._request(
            "GET", path, parameters={"limit": "1"}, accept=PARTIAL_METADATA
        )
        parameters = {
            "watch": "1",
            "resourceVersion": str(listed["metadata"]["resourceVersion"]),
            "timeoutSeconds": str(timeout_seconds),
        }
        headers = await self._headers(
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
        )
        timeout = aiohttp.ClientTimeout(total=timeout_seconds + REQUEST_TIMEOUT_SECONDS)
        try:
            async with self._open().get(
                self.access.server + path,
                params=parameters,
                headers=headers,
                timeout=timeout,
                server_hostname=self.access.server_name,
            ) as answer:
                if answer.status != 200:
                    raise _error_of(answer.status, await answer.content.read(WATCH_LINE_BYTES_MAX))
                async for line in answer.content:
                    yield str(json.loads(line).get("type"))
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise errors.KubeUnavailable(0, "Unreachable", _describe(error)) from error

    async def _list_pages(
        self, path: str, accept: str, parameters: Mapping[str, str]
    ) -> list[JSONObject]:
        for _attempt in range(RELISTS_MAX):
            try:
                return await self._list_once(path, accept, parameters)
            except errors.Gone:
                # The continue token outlived the server's history; half a list is no list.
                log.info("List expired between pages, starting again", path=path)
        raise errors.KubeUnavailable(410, "Expired", f"the list of {path} expired {RELISTS_MAX}x")

    async def _list_once(
        self, path: str, accept: str, parameters: Mapping[str, str]
    ) -> list[JSONObject]:
        pages: list[JSONObject] = []
        token = ""
        for _page in range(PAGES_MAX):
            asked = {**parameters, "limit": str(PAGE_OBJECTS)}
            if token:
                asked["continue"] = token
            page = await self._request("GET", path, parameters=asked, accept=accept)
            pages.append(page)
            token = str((page.get("metadata") or {}).get("continue") or "")
            if not token:
                return pages
        raise errors.KubeError(0, "ListTooLong", f"{path} has more than {PAGES_MAX} pages")

    async def _request(
        self,
        method: str,
        path: str,
        *,
        parameters: Mapping[str, str] | None = None,
        body: JSONObject | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> JSONObject:
        for attempt in range(THROTTLED_RETRIES_MAX + 1):
            status, headers, raw = await self._send(
                method, path, parameters, body, content_type, accept
            )
            metrics.KUBE_REQUESTS.labels(method=method, code=str(status)).inc()
            if status == 401:
                self._token_time = float("-inf")  # the token may have been replaced meanwhile
            if status != 429 or attempt == THROTTLED_RETRIES_MAX:
                break
            await asyncio.sleep(_retry_after(headers, attempt))
        if status >= 300:
            raise _error_of(status, raw)
        try:
            decoded = (
                await asyncio.to_thread(json.loads, raw)
                if len(raw) > 2**20
                else json.loads(raw or b"{}")
            )
        except ValueError as error:
            raise errors.KubeUnavailable(status, "NotJSON", f"{method} {path}") from error
        if not isinstance(decoded, dict):
            raise errors.KubeUnavailable(status, "NotJSON", f"{method} {path}: not an object")
        return decoded

    async def _send(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None,
        body: JSONObject | None,
        content_type: str,
        accept: str,
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers = await self._headers(accept)
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            async with self._open().request(
                method,
                self.access.server + path,
                params=dict(parameters or {}),
                data=None if body is None else json.dumps(body).encode(),
                headers=headers,
                allow_redirects=False,
                server_hostname=self.access.server_name,
            ) as answer:
                # The server's pages end; this bound is for whatever pretends to be the server.
                raw = bytearray()
                async for piece in answer.content.iter_chunked(2**18):
                    raw += piece
                    if len(raw) > ANSWER_BYTES_MAX:
                        raise errors.KubeError(0, "AnswerTooLarge", f"{method} {path}")
                return answer.status, answer.headers, bytes(raw)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            metrics.KUBE_REQUESTS.labels(method=method, code="0").inc()
            raise errors.KubeUnavailable(0, "Unreachable", _describe(error)) from error

    async def _headers(self, accept: str) -> dict[str, str]:
        now = asyncio.get_running_loop().time()
        if now - self._token_time > TOKEN_REFRESH_SECONDS:
            self._token = await self.access.read_token()
            self._token_time = now
        headers = {"Accept": accept, "User-Agent": "blobcache-operator"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use `async with Kube(...)`"
        return self._session


def _retry_after(headers: Mapping[str, str], attempt: int) -> float:
    """Return the server's own delay in seconds, bounded, else an exponential one."""
    try:
        asked = float(headers.get("Retry-After", ""))
    except ValueError:
        asked = 2.0**attempt
    return min(max(asked, 0.1), THROTTLED_DELAY_SECONDS_MAX)


def _error_of(status: int, raw: bytes) -> errors.KubeError:
    """Turn a Status object, or whatever came instead, into an exception."""
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    reason = str(body.get("reason") or "Unknown")
    message = str(body.get("message") or raw[:200].decode(errors="replace"))
    if status == 403:
        return errors.Forbidden(status, reason, message)
    if status == 404:
        return errors.NotFound(status, reason, message)
    if status == 409:
        return errors.Conflict(status, reason, message)
    if status == 410:
        return errors.Gone(status, reason, message)
    # 401 is about our token, not about what was asked for: nothing may be concluded from it.
    if status in (401, 429) or status >= 500:
        return errors.KubeUnavailable(status, reason, message)
    return errors.KubeError(status, reason, message)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
