"""Connections: pipelining, time-outs, slow and vanishing readers, bounds, an orderly end."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from tests.unit.data.twin import LIMITS_SHORT, TwinBlob, content, file_of, running
from tests.unit.data.wire import connected, request, until

from blobcache_agent.data.connection import Connection
from blobcache_agent.data.limits import HEAD_BYTES_MAX, Limits
from blobcache_agent.data.server import DataServer

MIB = 1024 * 1024
UNTAKEN_BYTES = 64 * MIB
"""More than the kernel buffers of both ends take."""
SLOW_PATH = "/v1/blobs/team/models/slow"


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Many requests in one packet get their answers in their order, errors included."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(1000)))
        batch = b""
        for index in range(100):
            batch += request(headers={"Range": f"bytes={index}-{index}"})
            batch += request("HEAD") if index % 2 else request(path="/none")
        await wire.send(batch)
        for index in range(100):
            assert (await wire.answer()).body == blob.data[index : index + 1]
            answer = await wire.answer(is_head=bool(index % 2))
            assert answer.status == (200 if index % 2 else 404)


async def test_input_is_bounded_while_an_answer_is_under_way() -> None:
    """Who goes on sending while being answered fills the kernel's buffer, not the server's."""
    gate = asyncio.Event()
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(10), head_gate=gate))
        flood = request() * (16 * MIB // len(request()))
        sending = asyncio.ensure_future(wire.send(flood))
        (connection,) = await _connections(twin.server, 1)
        await until(lambda: connection._is_paused)
        assert len(connection._inbox) <= 2 * HEAD_BYTES_MAX
        gate.set()
        for _ in range(1000):
            assert (await wire.answer()).status == 200
        sending.cancel()
        await asyncio.wait([sending])


async def _connections(server: DataServer, count: int) -> list[Connection]:
    """Return the server's connections once there are so many."""
    await until(lambda: server.connections == count)
    return list(server._connections)


async def test_a_half_closed_reader_is_answered() -> None:
    """A reader may shut its sending side and still wants all its answers (RFC 9112 9.6)."""
    data = content(8 * MIB)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        twin.add("blob", TwinBlob(data))
        await wire.send(request() + request())
        wire.shut()
        assert (await wire.answer()).body == data
        assert (await wire.answer()).body == data
        assert await wire.rest() == b""


async def test_a_half_closed_reader_of_a_slow_origin_is_given_up() -> None:
    """Shutting and silence most often mean that the reader is gone: its fetch must end."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(10), head_gate=asyncio.Event()))
        await wire.send(request())
        wire.shut()
        await blob.closed.wait()
        (record,) = await twin.observer.wait_for_records(1)
        assert (record.status, record.reason, record.aborted) == (499, "ReaderGone", True)


@pytest.mark.parametrize("stage", ["head", "body"])
async def test_a_reader_who_leaves_ends_its_read(stage: str) -> None:
    """A lost connection cancels the read at once: nobody waits for it any more."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        never = asyncio.Event()
        blob = twin.add(
            "blob",
            TwinBlob(
                content(1000),
                piece_bytes=500,
                head_gate=never if stage == "head" else None,
                piece_gate=never if stage == "body" else None,
            ),
        )
        await wire.send(request())
        if stage == "body":
            await wire.head()
            await wire.reader.readexactly(500)
        else:
            await until(lambda: blob.open_handles)
        sock = wire.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        wire.reset()
        await blob.closed.wait()
        (record,) = await twin.observer.wait_for_records(1)
        assert (record.reason, record.aborted) == ("ReaderGone", True)
        assert record.status == (200 if stage == "body" else 499)
        assert record.bytes_sent == (500 if stage == "body" else 0)


@pytest.mark.parametrize("file", [False, True])
async def test_a_reader_who_takes_nothing_is_cut_off(file: bool, tmp_path: Path) -> None:
    """A reader that stops reading loses its connection, and held next to nothing meanwhile."""
    data = content(UNTAKEN_BYTES)
    async with running(limits=LIMITS_SHORT) as twin:
        with file_of(data, tmp_path) as fd:
            blob = twin.add("blob", TwinBlob(data, file=fd if file else None, piece_bytes=4 * MIB))
            async with connected(twin.host, twin.port) as wire:
                wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await wire.send(request())
                (connection,) = await _connections(twin.server, 1)
                transport = connection._transport
                await until(transport.get_write_buffer_size)
                assert transport.get_write_buffer_size() <= LIMITS_SHORT.write_buffer_bytes
                await blob.closed.wait()
                (record,) = await twin.observer.wait_for_records(1)
                assert (record.reason, record.aborted) == ("SlowReader", True)
                assert record.bytes_sent < len(data)


async def test_a_slow_reader_who_goes_on_is_not_cut_off() -> None:
    """Any byte acknowledged is progress, also while the kernel's buffer takes nothing more."""
    data = content(UNTAKEN_BYTES)
    async with running(limits=LIMITS_SHORT) as twin:
        twin.add("blob", TwinBlob(data, piece_bytes=4 * MIB))
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            # A small window, so that each bite is acknowledged.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            sock.setblocking(False)
            await loop.sock_connect(sock, (twin.host, twin.port))
            await loop.sock_sendall(sock, request())
            deadline = loop.time() + 4 * LIMITS_SHORT.progress_timeout_seconds
            received = 0
            while loop.time() < deadline:
                received += len(await loop.sock_recv(sock, 64 * 1024))
                await asyncio.sleep(LIMITS_SHORT.progress_timeout_seconds / 8)
            assert twin.observer.records == [], "it was cut off"
            assert 0 < received < len(data)


async def test_a_slow_pipeliner_is_cut_off() -> None:
    """Small answers nobody reads are bounded like large ones."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(60_000)))
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.writer.write(request() * 5000)
        await until(lambda: any(record.aborted for record in twin.observer.records))
        assert twin.observer.records[-1].reason == "SlowReader"


TIMED_OUT = [
    ("nothing", b"", False),
    ("half a line", b"GET /v1", True),
    ("half a head", b"GET /v1/blobs/a/b/c HTTP/1.1\r\nHost: a\r\n", True),
]


@pytest.mark.parametrize(("name", "data", "is_told"), TIMED_OUT, ids=[row[0] for row in TIMED_OUT])
async def test_a_head_that_does_not_come(name: str, data: bytes, is_told: bool) -> None:
    """A connection without a whole head ends after the head's time-out."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:
        await wire.send(data)
        if is_told:
            answer = await wire.answer()
            assert (answer.status, answer["Connection"]) == (408, "close")
        assert await wire.rest() == b""


async def test_a_dripping_head_ends_in_time() -> None:
    """Each byte does not buy more time."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:

        async def drip() -> None:
            await wire.send(b"GET /v1/blobs/a/b/c HTTP/1.1\r\nX: ")
            while True:
                await wire.send(b"x")
                await asyncio.sleep(LIMITS_SHORT.head_timeout_seconds / 10)

        dripping = asyncio.ensure_future(drip())
        assert (await wire.answer()).status == 408
        dripping.cancel()
        await asyncio.wait([dripping])


@pytest.mark.parametrize("start_next", [False, True])
async def test_a_kept_connection_ends(start_next: bool) -> None:
    """Keep-alive ends when idle; a second request's head has the head's time-out."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(10)))
        assert (await wire.ask()).status == 200
        if start_next:
            await wire.send(b"GET ")
            assert (await wire.answer()).status == 408
        assert await wire.rest() == b""


async def test_too_many_connections() -> None:
    """Beyond the limit a connection is told so and closed; a freed place is used again."""
    limits = Limits(connections_max=2, connections_refusing_max=1, linger_seconds=30)
    gate = asyncio.Event()
    async with running(limits=limits) as twin:
        twin.add("blob", TwinBlob(content(10)))
        slow = twin.add("slow", TwinBlob(content(10), head_gate=gate))
        async with (
            connected(twin.host, twin.port) as first,
            connected(twin.host, twin.port) as second,
        ):
            for busy in (first, second):
                await busy.send(request(path=SLOW_PATH))
            await until(lambda: slow.open_handles == 2)
            async with connected(twin.host, twin.port) as third:
                answer = await third.ask()
                assert (answer.status, answer["Connection"]) == (503, "close")
                assert answer["Retry-After"] == "1"
                assert json.loads(answer.body)["code"] == "TooManyConnections"
                async with connected(twin.host, twin.port) as fourth:
                    answer = await fourth.answer()
                    assert (answer.status, answer["Retry-After"]) == (503, "1")
                    assert json.loads(answer.body)["code"] == "TooManyConnections"
                    assert await fourth.rest() == b""
                gate.set()
                assert (await first.answer()).status == 200
                assert (await second.answer()).status == 200
        await _connections(twin.server, 0)
        async with connected(twin.host, twin.port) as wire:
            assert (await wire.ask()).status == 200


async def test_who_waits_longest_yields_to_a_newcomer() -> None:
    """Unused connections and unfinished heads keep nobody out; what is being answered stays."""
    limits = Limits(connections_max=3, head_timeout_seconds=300, idle_timeout_seconds=600)
    gate = asyncio.Event()
    async with running(limits=limits) as twin:
        twin.add("blob", TwinBlob(content(10)))
        slow = twin.add("slow", TwinBlob(content(10), head_gate=gate))
        async with (
            connected(twin.host, twin.port) as busy,
            connected(twin.host, twin.port) as dripping,
            connected(twin.host, twin.port) as idle,
        ):
            await busy.send(request(path=SLOW_PATH))
            await until(lambda: slow.open_handles == 1)
            await dripping.send(b"GET /v1/blo")
            assert (await idle.ask()).status == 200
            async with (
                connected(twin.host, twin.port) as newcomer,
                connected(twin.host, twin.port) as latecomer,
            ):
                assert (await newcomer.ask()).status == 200
                assert await dripping.rest() == b""
                assert (await latecomer.ask()).status == 200
                assert await idle.rest() == b""
                gate.set()
                assert (await busy.answer()).status == 200


async def test_lingering_ends() -> None:
    """After its last word the server discards input, but neither for ever nor without bound."""
    async with running(limits=LIMITS_SHORT) as twin, connected(twin.host, twin.port) as wire:
        await wire.send(b"nonsense\r\n\r\n" + b"x" * 100_000)
        assert (await wire.answer()).status == 400
        await _connections(twin.server, 0)
    patient = Limits(linger_seconds=30)
    async with running(limits=patient) as twin, connected(twin.host, twin.port) as wire:
        await wire.send(b"nonsense\r\n\r\n")
        assert (await wire.answer()).status == 400
        wire.writer.write(b"x" * MIB)
        await _connections(twin.server, 0)


async def test_stop_finishes_answers_and_closes_the_rest() -> None:
    """An orderly end: no new connection, idle ones close, what is under way is finished."""
    gate = asyncio.Event()
    async with running() as twin:
        slow = twin.add("blob", TwinBlob(content(1000), piece_bytes=500, piece_gate=gate))
        twin.add("quick", TwinBlob(content(5)))
        async with (
            connected(twin.host, twin.port) as idle,
            connected(twin.host, twin.port) as busy,
        ):
            assert (await idle.ask(path="/v1/blobs/team/models/quick")).status == 200
            await busy.send(request() + request())
            await busy.head()
            first = await busy.reader.readexactly(500)
            stopping = asyncio.ensure_future(twin.server.stop(grace_seconds=30))
            assert await idle.rest() == b""
            with pytest.raises(OSError, match=r"refused|Connect"):
                await asyncio.open_connection(twin.host, twin.port)
            assert not stopping.done()
            gate.set()
            assert first + await busy.rest() == slow.data, "and not the pipelined one"
        await stopping
        assert slow.total_reads == 1


async def test_stop_cuts_what_does_not_end() -> None:
    """After the grace a read that never ends is cancelled and closed."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(10), head_gate=asyncio.Event()))
        await wire.send(request())
        await until(lambda: blob.open_handles)
        await twin.server.stop(grace_seconds=0.05)
        assert twin.server.connections == 0
        assert blob.open_handles == 0
        (record,) = twin.observer.records
        assert (record.status, record.reason) == (499, "ShuttingDown")
