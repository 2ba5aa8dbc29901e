"""The mutual-TLS listener of the control API.

It accepts by itself, rather than through asyncio's server, for three reasons: each connection
takes the certificates that are in force when it comes, so that a rotation drops nobody;
handshakes under way and connections are bounded; and a client that never finishes its handshake
is dropped in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from blobcache_agent.errors import StartError
from blobcache_agent.logs import get_logger
from blobcache_agent.settings import ListenAddress

HANDSHAKES_MAX = 32
CONNECTIONS_MAX = 64
"""The operator and its successor need two or three."""
HANDSHAKE_TIMEOUT_SECONDS = 10.0
RELOAD_SECONDS = 2.0
"""How often the certificate files should be looked at."""
BACKLOG = 128
_ACCEPT_PAUSE_SECONDS = 0.5
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
        if not address.host and socket.has_dualstack_ipv6():
            sock = socket.create_server(
                ("", address.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        else:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            sock = socket.create_server(
                (address.host, address.port), family=family, backlog=BACKLOG
            )
    except OSError as error:
        raise listen_error(address, flag, error) from error
    sock.setblocking(False)
    return sock


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
        self._sock = sock
        self._certificates = certificates
        self._protocol_factory = protocol_factory
        self._connection_count = connection_count
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.create_task(self._accept(), name="control-accept")

    async def stop(self) -> None:
        """Accept no more and end handshakes under way; connections go on."""
        tasks = list(self._handshakes)
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    # Descriptors or memory ran out: waiting helps, ending would not.
                    log.warning("Control connections could not be accepted", error=str(error))
                    await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            if (
                len(self._handshakes) >= HANDSHAKES_MAX
                or len(self._handshakes) + self._connection_count() >= CONNECTIONS_MAX
            ):
                connection.close()
                continue
            task = asyncio.create_task(self._handshake(connection), name="control-handshake")
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

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
