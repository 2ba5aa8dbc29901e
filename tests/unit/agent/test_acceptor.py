"""Accepting where descriptors run out, and who may have how many of them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
import structlog
from tests.unit.data.wire import until

from blobcache_agent.acceptor import Acceptor, listening_socket
from blobcache_agent.descriptors import RESERVED, Shares


class ShortSocket:
    """A listening socket whose `accept` fails as often as it is told."""

    def __init__(self, real: socket.socket, failures: int, error: int) -> None:
        self._real = real
        self.failures = failures
        self._error = error
        self.tries = 0

    def fileno(self) -> int:
        """Return the real one's."""
        return self._real.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        """Fail, or accept."""
        self.tries += 1
        if self.failures:
            self.failures -= 1
            raise OSError(self._error, "no")
        return self._real.accept()

    def close(self) -> None:
        """Close the real one."""
        self._real.close()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket of loopback."""
    sock = listening_socket("127.0.0.1", 0, 16)
    yield sock
    sock.close()


async def test_a_shortage_is_a_pause(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One try, one line, then later again; nothing is lost."""
    short = ShortSocket(listening, 3, errno.EMFILE)
    taken: list[socket.socket] = []
    shortages: list[int] = []
    acceptor = Acceptor(short, taken.append, lambda: shortages.append(short.tries))  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr("blobcache_agent.acceptor.log", structlog.get_logger())
        acceptor.start()
        client = socket.create_connection(listening.getsockname())
        await until(lambda: taken)
    acceptor.stop()
    acceptor.stop()
    assert shortages == [1, 2, 3]
    assert [line["log_level"] for line in lines] == ["warning"]
    for sock in (client, *taken):
        sock.close()


async def test_a_client_that_has_gone_is_passed_over(listening: socket.socket) -> None:
    """Errors of one connection are no shortage."""
    short = ShortSocket(listening, 5, errno.ECONNABORTED)
    taken: list[socket.socket] = []
    acceptor = Acceptor(short, taken.append, lambda: pytest.fail("no shortage"))  # type: ignore[arg-type]
    acceptor.start()
    client = socket.create_connection(listening.getsockname())
    await until(lambda: taken)
    acceptor.stop()
    for sock in (client, *taken):
        sock.close()


async def test_it_does_not_go_on_after_the_end(listening: socket.socket) -> None:
    """A pause that is under way ends with it."""
    short = ShortSocket(listening, 1000, errno.ENFILE)
    shortages: list[int] = []
    acceptor = Acceptor(short, lambda _: None, lambda: shortages.append(1))  # type: ignore[arg-type]
    acceptor.start()
    client = socket.create_connection(listening.getsockname())
    await until(lambda: shortages)
    acceptor.stop()
    client.close()
    assert acceptor._pausing is None or acceptor._pausing.cancelled()


@pytest.mark.parametrize("limit", [256, 1024, 4096, 20_000, 1 << 20])
def test_shares_leave_room(limit: int) -> None:
    """All of them together, a fetch for each reader, and the reserve stay within the limit."""
    shares = Shares.of(limit, connections_max=4096, refusing_max=256)
    wanted = 2 * shares.readers + shares.refusals + 2 * shares.busy_blobs
    assert min(shares.readers, shares.refusals, shares.open_blobs, shares.busy_blobs) >= 1
    assert shares.open_blobs <= shares.busy_blobs
    if limit >= 1024:
        assert wanted + 64 <= limit
    if limit >= 20_000:
        assert (shares.readers, shares.refusals) == (4096, 256)
    assert Shares.of(limit, connections_max=10, refusing_max=256).readers <= 10
    assert RESERVED < 1024
