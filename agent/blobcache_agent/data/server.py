"""The data server: a listener, its connections, their bounds, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import socket
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from blobcache_agent.acceptor import Acceptor, listening_socket
from blobcache_agent.data.answer import Service
from blobcache_agent.data.catalog import Catalog, Observer, ReaderAuth
from blobcache_agent.data.connection import SHUTTING_DOWN, Connection
from blobcache_agent.data.dates import DateClock
from blobcache_agent.data.exchange import Services
from blobcache_agent.data.limits import INPUT_BYTES_PER_RECEIVE, Limits
from blobcache_agent.data.outlet import BLOCK_BYTES
from blobcache_agent.data.rejection import Rejection

BACKLOG = 4096
YIELDING_PER_LOOK = 64
"""Waiting connections noted at one look at all of them, so that a crowd costs one look for many."""
YIELDING_LOOK_SECONDS = 0.1
"""Between two looks that find nobody."""
_REFUSAL_BODY = (
    b'{"code": "TooManyConnections", "message": "the cache has no room for more readers"}'
)
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)
CUT_GRACE_SECONDS = 2.0
"""For reads to close after their connections were cut."""


class DataServer:
    """Serves `GET|HEAD /v1/blobs/{namespace}/{name}/{blob-id}`; see the package's docstring.

    All methods are called in one event loop. `start` once, then `stop` once.
    """

    def __init__(
        self,
        catalog: Catalog,
        auth: ReaderAuth,
        observer: Observer,
        limits: Limits,
        service: Service | None = None,
    ) -> None:
        self.limits = limits
        self.services = Services(catalog, auth, observer, DateClock(), service)
        self.receive_buffer = memoryview(bytearray(INPUT_BYTES_PER_RECEIVE))
        self.scratch = memoryview(bytearray(BLOCK_BYTES))
        self.threads = ThreadPoolExecutor(limits.file_threads, thread_name_prefix="data-read")
        self.is_stopping = False
        self._connections: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._yielding: list[Connection] = []
        """Connections that wait, who must go first comes last."""
        self._yielding_look_time = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptor: Acceptor | None = None
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
            Address and port of the listening socket.

        Raises:
            OSError: The address cannot be bound.
        """
        sock = listening_socket(host or "", port, BACKLOG)
        address = sock.getsockname()
        self._acceptor = Acceptor(sock, self._take, self._on_shortage)
        self._acceptor.start()
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(self.limits.sweep_seconds, self._sweep)
        return address[0], address[1]

    async def stop(self, grace_seconds: float = 25.0) -> None:
        """Stop accepting, close idle connections, finish answers, then cut what is left."""
        self.is_stopping = True
        if self._acceptor is not None:
            self._acceptor.stop()
            await asyncio.gather(*self._opening)
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

    def _take(self, sock: socket.socket) -> None:
        """Serve a connection that was just accepted, or say that there is no room."""
        limits = self.limits
        surplus = len(self._connections) + len(self._opening) - limits.connections_max
        if surplus < 0 or self._make_place():
            connection = Connection(self)
        elif surplus < limits.connections_refusing_max:
            message = f"the cache serves {limits.connections_max} connections already"
            connection = Connection(
                self,
                Rejection(
                    503, "TooManyConnections", message, close=True, headers="Retry-After: 1\r\n"
                ),
            )
        else:
            self._refuse_at_once(sock)
            return
        opening = asyncio.get_running_loop().create_task(_open(connection, sock))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    def _refuse_at_once(self, sock: socket.socket) -> None:
        """Say that there is no room and close: mostly heard, and it costs no descriptor."""
        with contextlib.suppress(OSError), sock:
            sock.send(_REFUSAL)
            # What is unread at the close makes it a reset, and that may overtake the answer.
            sock.recv_into(self.receive_buffer)

    def _make_place(self) -> bool:
        """Close the connection that has been idle, or without a whole head, for longest.

        So who drips its requests, or holds connections that it does not use, keeps nobody out;
        returns False where all are being answered, or soon will be.
        """
        for look in (False, True):
            if look:
                self._look_for_yielding()
            while self._yielding:
                connection = self._yielding.pop()
                if connection in self._connections and connection.close_if_silent():
                    return True
        return False

    def _look_for_yielding(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._yielding_look_time:
            return
        waiting = [
            (since, id(connection), connection)
            for connection in self._connections
            if (since := connection.waiting_since) is not None
        ]
        first = heapq.nsmallest(YIELDING_PER_LOOK, waiting)
        self._yielding = [connection for _, _, connection in reversed(first)]
        if not first:
            self._yielding_look_time = now + YIELDING_LOOK_SECONDS

    def _on_shortage(self) -> None:
        """Free some descriptors."""
        for _ in range(YIELDING_PER_LOOK):
            if not self._make_place():
                return

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


async def _open(connection: Connection, sock: socket.socket) -> None:
    """Give a connection its transport."""
    try:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
    except OSError:
        # The reader has gone again.
        with contextlib.suppress(OSError):
            sock.close()
