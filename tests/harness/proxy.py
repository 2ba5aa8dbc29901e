"""A reverse proxy that passes everything on unchanged and remembers what went by."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

LOOPBACK = "127.0.0.1"
PIECE_BYTES = 64 * 1024
START_TIMEOUT_SECONDS = 10.0

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"}
    | {"upgrade"}
)
_ADDED_BY_CLIENT = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Exchange:
    """One request that arrived and what has been answered so far; never its credentials."""

    method: str
    path: str
    """As sent: percent-encoded, without the query."""
    query: str
    range: str | None
    """The `Range` header."""
    status: int | None
    """None until the origin answered; 502 when it did not."""
    body_bytes: int
    """Body bytes passed to the client."""


class CountingProxy:
    """
    An HTTP/1.1 reverse proxy on a free port, in a thread of its own.

    Method, target, headers (`Host` included, so signatures stay valid), status and body pass
    unchanged; encodings are not touched.

    Args:
        upstream: Base URL of the origin, without a path.
        listen: The address of this machine that clients reach it at.
    """

    def __init__(self, upstream: str, *, listen: str = LOOPBACK) -> None:
        self._upstream = upstream.rstrip("/")
        self._listen = listen
        self._lock = threading.Lock()
        self._exchanges: dict[int, Exchange] = {}
        self._next_id = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="counting-proxy", daemon=True)
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.ServerRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The proxy's base URL."""
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        """The proxy's host and port."""
        return f"{self._listen}:{self._port}"

    def start(self) -> None:
        """Listen on a free port."""
        self._thread.start()
        self._port = self._call(self._open())

    def stop(self) -> None:
        """Close all connections and end the thread; harmless when repeated."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_TIMEOUT_SECONDS)
        self._loop.close()

    def exchanges(
        self, *, method: str | None = None, path_prefix: str = "", status: int | None = None
    ) -> list[Exchange]:
        """Return the exchanges since the last `clear()`, oldest first, that match what is given."""
        with self._lock:
            seen = list(self._exchanges.values())
        return [
            exchange
            for exchange in seen
            if method in (None, exchange.method)
            and exchange.path.startswith(path_prefix)
            and status in (None, exchange.status)
        ]

    def count(
        self, *, method: str | None = None, path_prefix: str = "", status: int | None = None
    ) -> int:
        """Return how many requests arrived that match."""
        return len(self.exchanges(method=method, path_prefix=path_prefix, status=status))

    def body_bytes(self, *, method: str | None = None, path_prefix: str = "") -> int:
        """Return how many body bytes clients were given for requests that match."""
        seen = self.exchanges(method=method, path_prefix=path_prefix)
        return sum(exchange.body_bytes for exchange in seen)

    def clear(self) -> None:
        """Forget all exchanges; those under way are not counted any more."""
        with self._lock:
            self._exchanges.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(START_TIMEOUT_SECONDS)

    async def _open(self) -> int:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            skip_auto_headers=_ADDED_BY_CLIENT,
        )
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._listen, 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        number = self._arrived(request)
        try:
            async with self._ask(request) as answer:
                self._note(number, status=answer.status)
                return await self._pass_on(number, request, answer)
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as error:
            self._note(number, status=502)
            return web.Response(status=502, text=f"The origin did not answer: {error}")

    @asynccontextmanager
    async def _ask(self, request: web.BaseRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        async with self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=_end_to_end(request.headers.items()),
            data=request.content.iter_chunked(PIECE_BYTES) if request.body_exists else None,
            allow_redirects=False,
        ) as answer:
            yield answer

    async def _pass_on(
        self, number: int, request: web.BaseRequest, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            status=answer.status,
            reason=answer.reason,
            headers=_end_to_end(answer.headers.items()),
        )
        await response.prepare(request)
        # A client may hang up at any time, for it has what it wanted: no error of anybody's.
        with contextlib.suppress(ConnectionError):
            async for piece in answer.content.iter_chunked(PIECE_BYTES):
                await response.write(piece)
                self._note(number, more_bytes=len(piece))
            await response.write_eof()
        return response

    def _arrived(self, request: web.BaseRequest) -> int:
        path, _, query = request.raw_path.partition("?")
        exchange = Exchange(request.method, path, query, request.headers.get("Range"), None, 0)
        with self._lock:
            self._next_id += 1
            self._exchanges[self._next_id] = exchange
            return self._next_id

    def _note(self, number: int, *, status: int | None = None, more_bytes: int = 0) -> None:
        with self._lock:
            if (known := self._exchanges.get(number)) is not None:
                self._exchanges[number] = replace(
                    known,
                    status=known.status if status is None else status,
                    body_bytes=known.body_bytes + more_bytes,
                )


def _end_to_end(headers: Any) -> CIMultiDict[str]:
    """Return the headers without those that concern one connection only."""
    return CIMultiDict((name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP)
