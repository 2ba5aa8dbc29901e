"""The data server: a listener, its connections, their bounds, and an orderly end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from blobcache_agent.data.catalog import Catalog, Observer, ReaderAuth
from blobcache_agent.data.connection import SHUTTING_DOWN, Connection
from blobcache_agent.data.dates import DateClock
from blobcache_agent.data.exchange import Services
from blobcache_agent.data.limits import INPUT_BYTES_PER_RECEIVE, Limits
from blobcache_agent.data.outlet import BLOCK_BYTES
from blobcache_agent.data.rejection import Rejection

BACKLOG = 1024
CUT_GRACE_SECONDS = 2.0
"""For reads to close after their connections were cut."""


class DataServer:
    """Serves `GET|HEAD /v1/blobs/{namespace}/{name}/{blob-id}`; see the package's docstring.

    All methods are called in one event loop. `start` once, then `stop` once.
    """

    def __init__(
        self, catalog: Catalog, auth: ReaderAuth, observer: Observer, limits: Limits
    ) -> None:
        self.limits = limits
        self.services = Services(catalog, auth, observer, DateClock())
        self.receive_buffer = memoryview(bytearray(INPUT_BYTES_PER_RECEIVE))
        self.scratch = memoryview(bytearray(BLOCK_BYTES))
        self.threads = ThreadPoolExecutor(limits.file_threads, thread_name_prefix="data-read")
        self.is_stopping = False
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    @property
    def connections(self) -> int:
        """How many connections are open, those being refused included."""
        return len(self._connections)

    async def start(self, host: str | None, port: int) -> tuple[str, int]:
        """Listen.

        Args:
            host: An address to bind, or None for all.
            port: 0 for any free one.

        Returns:
            Address and port of the first listening socket.

        Raises:
            OSError: The address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            self._new_connection, host or None, port, backlog=BACKLOG
        )
        self._sweeping = loop.call_later(self.limits.sweep_seconds, self._sweep)
        address = self._listener.sockets[0].getsockname()
        return address[0], address[1]

    async def stop(self, grace_seconds: float = 25.0) -> None:
        """Stop accepting, close idle connections, finish answers, then cut what is left."""
        self.is_stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        if not await self._wait_until_empty(grace_seconds):
            for connection in list(self._connections):
                connection.cut(SHUTTING_DOWN)
            await self._wait_until_empty(CUT_GRACE_SECONDS)
        if self._sweeping is not None:
            self._sweeping.cancel()
        self.threads.shutdown(wait=False, cancel_futures=True)

    # For the connections.

    def add(self, connection: Connection) -> None:
        """Count a connection."""
        self._connections.add(connection)

    def discard(self, connection: Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self._changed.set()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run work in a task, and hold the task until it is done."""
        loop = asyncio.get_running_loop()
        if sys.version_info >= (3, 12):
            # Most hits are answered without one wait: they need no turn of the loop either.
            task = asyncio.Task(work, loop=loop, eager_start=True)
        else:
            task = loop.create_task(work)
        if not task.done():
            self._tasks.add(task)
            task.add_done_callback(self._forget_task)
        return task

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        """Let go of a task that is done."""
        self._tasks.discard(task)
        self._changed.set()

    def _new_connection(self) -> asyncio.BaseProtocol:
        """Return the protocol of a connection that was just accepted."""
        surplus = len(self._connections) - self.limits.connections_max
        if surplus < 0:
            return Connection(self)
        if surplus >= self.limits.connections_refusing_max:
            return _Closed()
        message = f"the cache serves {self.limits.connections_max} connections already"
        return Connection(
            self,
            Rejection(503, "TooManyConnections", message, close=True, headers="Retry-After: 1\r\n"),
        )

    def _sweep(self) -> None:
        """Have all connections look at the clock: cheaper than a timer for each request."""
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(self.limits.sweep_seconds, self._sweep)
        now = loop.time()
        for connection in list(self._connections):
            connection.sweep(now)

    async def _wait_until_empty(self, seconds: float) -> bool:
        """Return whether all connections and tasks ended in time."""
        try:
            async with asyncio.timeout(seconds):
                while self._connections or self._tasks:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


class _Closed(asyncio.Protocol):
    """A connection too many even to be refused politely."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close at once."""
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
