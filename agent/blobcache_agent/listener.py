"""The listeners of the control API, by mutual TLS, and of health and metrics.

They accept by themselves, rather than through asyncio's server: connections are bounded so that
a crowd keeps neither the operator nor a probe out, and a shortage of descriptors is survived.
Those of the control API take the certificates in force when they come, so that a rotation drops
nobody, and have seconds for their handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from blobcache_agent.acceptor import Acceptor, listening_socket
from blobcache_agent.errors import StartError
from blobcache_agent.logs import get_logger
from blobcache_agent.settings import ListenAddress

HANDSHAKES_MAX = 32
CONNECTIONS_MAX = 64
"""The operator and its successor need two or three."""
HEALTH_CONNECTIONS_MAX = 64
"""A kubelet and a Prometheus need two or three."""
HANDSHAKE_TIMEOUT_SECONDS = 10.0
RELOAD_SECONDS = 2.0
"""How often the certificate files should be looked at."""
BACKLOG = 128
_FILES = ("ca.crt", "tls.crt", "tls.key")

log = get_logger(__name__)
Stamp = tuple[tuple[int, int, int], ...]


def load_context(tls_dir: Path) -> ssl.SSLContext:
    """Return a server context that demands a client certificate of `ca.crt`.

    Raises:
        OSError: A file cannot be read.
        ssl.SSLError: A file is not a certificate or key, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=str(tls_dir / "ca.crt"))
    context.load_cert_chain(tls_dir / "tls.crt", tls_dir / "tls.key")
    # A resumed session would bring a client past a rotation of the authority.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _stamp(tls_dir: Path) -> Stamp:
    """Return what changes when a file does; Kubernetes swaps a symlink, so inodes change."""
    states = [(tls_dir / name).stat() for name in _FILES]
    return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)


class Certificates:
    """The context in force, read again when its files change and are sound.

    Args:
        tls_dir: Holds ca.crt, tls.crt and tls.key.

    Raises:
        StartError: They cannot be used.
    """

    def __init__(self, tls_dir: Path) -> None:
        self._tls_dir = tls_dir
        self._bad_stamp: Stamp | None = None
        try:
            self._stamp = _stamp(tls_dir)
            self.context = load_context(tls_dir)
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"--tls-dir {tls_dir}: ca.crt, tls.crt and tls.key must be readable PEM files "
                f"that belong together ({error})"
            ) from error

    def reload(self) -> bool:
        """Take changed files into force; return whether it did. Blocking.

        Unsound files (a rotation half done) change nothing and are logged once.
        """
        stamp: Stamp | None = None
        try:
            stamp = _stamp(self._tls_dir)
            if stamp in (self._stamp, self._bad_stamp):
                return False
            context = load_context(self._tls_dir)
        except (OSError, ssl.SSLError) as error:
            if stamp is None or stamp != self._bad_stamp:
                log.warning("Certificates could not be read again", error=str(error))
            self._bad_stamp = stamp
            return False
        self.context = context
        self._stamp = stamp
        self._bad_stamp = None
        log.info("Certificates were read again")
        return True


def bind(address: ListenAddress, flag: str) -> socket.socket:
    """Return a listening TCP socket; every interface, both families, for an empty host.

    Raises:
        StartError: The address cannot be had; the message names the flag.
    """
    try:
        return listening_socket(address.host, address.port, BACKLOG)
    except OSError as error:
        raise listen_error(address, flag, error) from error


def listen_error(address: ListenAddress, flag: str, error: OSError) -> StartError:
    """Return what to tell the user when an address cannot be listened on."""
    if error.errno == errno.EADDRINUSE:
        why = "another process listens there; choose another port or stop it"
    elif error.errno == errno.EACCES:
        why = "this user may not listen on that port; choose one above 1023"
    elif error.errno == errno.EADDRNOTAVAIL:
        why = "this machine has no such address"
    else:
        why = error.strerror or str(error)
    return StartError(f"{flag} {address}: {why} ({errno.errorcode.get(error.errno or 0, '')})")


class TLSListener:
    """Accepts connections for an HTTP server and hands them over once they are authenticated.

    Args:
        sock: Listening and non-blocking; closed by `stop`.
        certificates: Gives the context for each new connection.
        protocol_factory: Makes the HTTP protocol of one connection.
        connection_count: How many connections the HTTP server has now.
    """

    def __init__(
        self,
        sock: socket.socket,
        certificates: Certificates,
        protocol_factory: Callable[[], asyncio.Protocol],
        connection_count: Callable[[], int],
    ) -> None:
        self._certificates = certificates
        self._protocol_factory = protocol_factory
        self._connection_count = connection_count
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """In the order of their beginning."""
        self._acceptor = Acceptor(sock, self._take)

    def start(self) -> None:
        """Begin to accept."""
        self._acceptor.start()

    async def stop(self) -> None:
        """Accept no more and end handshakes under way; connections go on."""
        self._acceptor.stop()
        tasks = list(self._handshakes)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, connection: socket.socket) -> None:
        if self._connection_count() >= CONNECTIONS_MAX:
            connection.close()
            return
        if len(self._handshakes) >= HANDSHAKES_MAX:
            # Who says nothing must not keep the operator out, who is done in milliseconds.
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._handshake(connection), name="control-handshake")
        self._handshakes[task] = None
        task.add_done_callback(lambda done: self._handshakes.pop(done, None))

    async def _handshake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._protocol_factory,
                connection,
                ssl=self._certificates.context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_SECONDS,
            )
        except (OSError, ssl.SSLError) as error:
            with contextlib.suppress(OSError):
                connection.close()
            log.info("Control connection was refused", error=type(error).__name__)
        except BaseException:
            connection.close()
            raise


class PlainListener:
    """Accepts connections for an HTTP server that whoever reaches the port may ask.

    Args:
        sock: Listening and non-blocking; closed by `stop`.
        server: Of aiohttp.
    """

    def __init__(self, sock: socket.socket, server: web.Server) -> None:
        self._server = server
        self._opening: set[asyncio.Task[None]] = set()
        self._acceptor = Acceptor(sock, self._take)

    def start(self) -> None:
        """Begin to accept."""
        self._acceptor.start()

    async def stop(self) -> None:
        """Accept no more; connections go on."""
        self._acceptor.stop()
        await asyncio.gather(*self._opening)

    def _take(self, connection: socket.socket) -> None:
        known = self._server.connections
        if len(known) + len(self._opening) >= HEALTH_CONNECTIONS_MAX:
            if not known:
                connection.close()
                return
            # A probe is answered at once; who is here for longest is not one.
            known[0].force_close()
        task = asyncio.create_task(self._open(connection), name="health-open")
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._server, connection)
        except OSError:
            connection.close()
