"""Accepting connections, also where descriptors run out.

asyncio's own server, at its first EMFILE, tries again as often as its backlog is long, logs each
try, and starts as many such rounds a second later: the log grows by hundreds of thousands of lines
and the loop does nothing else. Here a shortage is a pause, and whoever listens is told once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from blobcache_agent.logs import get_logger

ACCEPTS_PER_TURN_MAX = 64
"""Then others have their turn in the loop; what waits stays in the kernel's queue."""
SHORTAGE_PAUSE_SECONDS = 0.1
SHORTAGE_LOG_SECONDS = 10.0
"""Between two lines that say so."""
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = get_logger(__name__)


def listening_socket(host: str, port: int, backlog: int) -> socket.socket:
    """Return a non-blocking listening TCP socket.

    Args:
        host: An address; "" for every interface, of both families where there are two.
        port: 0 for any free one.
        backlog: Connections that wait to be accepted; the kernel may allow fewer.

    Raises:
        OSError: The address cannot be bound.
    """
    if not host and socket.has_dualstack_ipv6():
        sock = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=backlog)
    sock.setblocking(False)
    return sock


class Acceptor:
    """Takes connections from a listening socket and hands each to its owner.

    Args:
        sock: Listening and non-blocking; closed by `stop`.
        take: Called with each connection, non-blocking, which is the callee's from then on.
        on_shortage: Called at most once in each `SHORTAGE_PAUSE_SECONDS` in which the process or
            the machine has no descriptor or memory for a connection; may free some.
    """

    def __init__(
        self,
        sock: socket.socket,
        take: Callable[[socket.socket], None],
        on_shortage: Callable[[], None] = lambda: None,
    ) -> None:
        self._sock = sock
        self._take = take
        self._on_shortage = on_shortage
        self._pausing: asyncio.TimerHandle | None = None
        self._log_time = -SHORTAGE_LOG_SECONDS
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin, or go on after a shortage."""
        self._pausing = None
        self._loop.add_reader(self._sock, self._accept)

    def stop(self) -> None:
        """Accept no more; idempotent. What waits in the kernel's queue is reset."""
        if self._sock.fileno() < 0:
            return
        if self._pausing is not None:
            self._pausing.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    continue  # that connection is gone already (accept(2): treat like EAGAIN)
                self._pause(error)
                return
            connection.setblocking(False)
            self._take(connection)

    def _pause(self, error: OSError) -> None:
        """Look away for a while: the socket stays readable, which would keep the loop busy."""
        self._loop.remove_reader(self._sock)
        self._pausing = self._loop.call_later(SHORTAGE_PAUSE_SECONDS, self.start)
        now = self._loop.time()
        if now - self._log_time >= SHORTAGE_LOG_SECONDS:
            self._log_time = now
            log.warning("Connections could not be accepted for a while", error=str(error))
        self._on_shortage()
