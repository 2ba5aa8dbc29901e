"""An HTTP origin that does right, and wrong on command.

Written on raw streams, so that it can send what no HTTP library would. Who may read is a guard's
business (`origin_guards`); what is there is a dict of paths.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qsl, unquote

HEAD_BYTES_MAX: Final = 64 * 1024
SEND_BYTES: Final = 64 * 1024
DEAF_FILLERS: Final = 4
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked; header names are lower-case."""

    method: str
    target: str
    headers: dict[str, str]

    @property
    def raw_path(self) -> str:
        """The path as it was sent."""
        return self.target.partition("?")[0]

    @property
    def path(self) -> str:
        """The path, percent-decoded."""
        return unquote(self.raw_path)

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters."""
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))


@dataclass(slots=True)
class Answer:
    """What is answered; Content-Length and Date are added."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """What is at a path."""

    data: bytes
    etag: str | None
    last_modified: str | None = None


@dataclass(slots=True)
class Misbehaviour:
    """What goes wrong with one request; the default goes wrong in nothing."""

    answer: Answer | None = None
    """Instead of the right one."""
    raw: bytes | None = None
    """Sent as it is in place of any answer, then the connection is closed."""
    latency_seconds: float = 0.0
    hold_head: asyncio.Event | None = None
    """Waited for before the head; an event never set is a hang."""
    close_before_head: bool = False
    reset_after: int | None = None
    """After so many bytes of the body the connection is reset."""
    truncate_after: int | None = None
    """After so many bytes of the body the connection is closed in good order."""
    hold_after: int | None = None
    """After so many bytes of the body nothing comes until `hold_body` is set."""
    hold_body: asyncio.Event = field(default_factory=asyncio.Event)
    drip_bytes: int | None = None
    """The body comes in pieces so small, `drip_seconds` apart."""
    drip_seconds: float = 0.01
    extra_body: bytes = b""
    """Follows the body; Content-Length counts it, Content-Range does not."""
    ignore_range: bool = False
    ignore_if_match: bool = False
    chunked: bool = False
    """Chunked, without Content-Length."""
    corrupt_at: int | None = None
    """Offset in the blob of a byte sent with its bits turned."""
    displace: int = 0
    """Content-Range says that the bytes lie so much further on, in a blob so much longer."""
    compress: bool = False
    """The body is sent gzipped, and says so."""
    headers: dict[str, str | None] = field(default_factory=dict)
    """Replace headers of the answer; None removes one."""
    replace_with: StoredBlob | None = None
    """The blob is replaced just before it is answered for."""


Guard = Callable[[Request], Answer | None]
"""Returns a refusal, an answer of its own (a token), or None to let the request through."""


def resolve_range(text: str, size: int) -> tuple[int, int] | None:
    """Return start and end of a Range header's bytes, None if it is unsatisfiable."""
    match = _RANGE.fullmatch(text)
    assert match is not None, f"a backend sent the range '{text}'"
    first, last = match.groups()
    if not first:
        count = int(last)
        return (max(0, size - count), size) if count and size else None
    end = min(size, int(last) + 1) if last else size
    return (int(first), end) if int(first) < size else None


class FaultOrigin:
    """The server; an async context manager.

    Args:
        guard: Asked about each request before anything else.
        tls: Makes it speak https; may be replaced while it does not listen.
        address: Of loopback; others than 127.0.0.1 stand for other hosts.
    """

    def __init__(
        self,
        guard: Guard | None = None,
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.guard = guard
        self.tls = tls
        self.blobs: dict[str, StoredBlob] = {}
        self.redirects: Callable[[Request], str | None] = lambda request: None
        """Returns where a request for a blob is sent on to, if anywhere."""
        self.requests: list[Request] = []
        self.body_bytes_sent = 0
        self.connections = 0
        self.clock_offset = timedelta(0)
        self.always: Misbehaviour | None = None
        """Goes for each request that has none of its own."""
        self.faults = 0
        """Requests met with a misbehaviour."""
        self._address = address
        self._reserved: socket.socket | None = None
        self._deaf: list[socket.socket] = []
        self._next: deque[Misbehaviour] = deque()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def host(self) -> str:
        """Address and port."""
        return f"{self._address}:{self.port}"

    @property
    def url(self) -> str:
        """Scheme and host."""
        return f"{'https' if self.tls else 'http'}://{self.host}"

    def put(
        self, path: str, data: bytes, etag: str | None = "auto", last_modified: str | None = None
    ) -> None:
        """Store a blob; the entity tag is derived from the data unless given, None has none."""
        tag = f'"{hashlib.md5(data).hexdigest()}"' if etag == "auto" else etag
        self.blobs[path] = StoredBlob(data, tag, last_modified)

    def misbehave(self, *faults: Misbehaviour) -> None:
        """Apply one fault to each of the next requests that pass the guard, in order."""
        self._next.extend(faults)

    def now(self) -> datetime:
        """Return the time as this origin has it."""
        return datetime.now(UTC) + self.clock_offset

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    async def start(self) -> None:
        """Listen, after a `stop` at the same port; no effect while it does."""
        if self._deaf:
            await self.stop()
        if self._server is not None:
            return
        if self._reserved is None:
            # Bound and never listening: while the server is stopped, nobody else gets its port.
            self._reserved = socket.socket()
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reserved.bind((self._address, self.port))
            self.port = self._reserved.getsockname()[1]
        self._server = await asyncio.start_server(
            self._accept, self._address, self.port, ssl=self.tls, limit=HEAD_BYTES_MAX
        )

    async def deafen(self) -> None:
        """Break all connections and let those to come hang: nobody answers their SYN."""
        await self.stop()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._address, self.port))
        listener.listen(0)
        self._deaf.append(listener)
        for _ in range(DEAF_FILLERS):  # the kernel drops a SYN while the queue is full
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((self._address, self.port))
            self._deaf.append(filler)

    def behave(self) -> None:
        """Do right by all requests to come."""
        self.always = None
        self._next.clear()

    async def stop(self) -> None:
        """Stop listening and break all connections; the port then refuses."""
        for deaf in self._deaf:
            deaf.close()
        self._deaf.clear()
        if self._server is None:
            return
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client went away, which is its right
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection may be used for another."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head[:-4].split("\r\n")
        method, target, _ = request_line.split(" ")
        headers = {}
        for line in lines:
            name, _, text = line.partition(":")
            headers[name.strip().lower()] = text.strip()
        request = Request(method, target, headers)
        self.requests.append(request)
        refusal = self.guard(request) if self.guard is not None else None
        if refusal is not None:
            await self._send(request, refusal, Misbehaviour(), writer)
            return True
        fault = self._next.popleft() if self._next else self.always
        self.faults += fault is not None
        return await self._answer(request, fault or Misbehaviour(), writer)

    async def _answer(
        self, request: Request, fault: Misbehaviour, writer: asyncio.StreamWriter
    ) -> bool:
        await asyncio.sleep(fault.latency_seconds)
        if fault.hold_head is not None:
            await fault.hold_head.wait()
        if fault.close_before_head:
            return False
        if fault.raw is not None:
            writer.write(fault.raw)
            await writer.drain()
            return False
        if fault.replace_with is not None:
            self.blobs[request.path] = fault.replace_with
        answer = fault.answer or self._right_answer(request, fault)
        return await self._send(request, answer, fault, writer)

    def _right_answer(self, request: Request, fault: Misbehaviour) -> Answer:
        to = self.redirects(request)
        if to is not None:
            return Answer(307, {"Location": to})
        blob = self.blobs.get(request.path)
        if blob is None:
            return Answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.etag is not None:
            headers["ETag"] = blob.etag
        if blob.last_modified is not None:
            headers["Last-Modified"] = blob.last_modified
        condition = request.headers.get("if-match")
        if condition is not None and condition != blob.etag and not fault.ignore_if_match:
            return Answer(412)
        data = bytearray(blob.data)
        if fault.corrupt_at is not None:
            data[fault.corrupt_at] ^= 0xFF
        wanted = request.headers.get("range")
        if wanted is None or fault.ignore_range or request.method == "HEAD":
            return Answer(200, headers, bytes(data))
        found = resolve_range(wanted, len(data))
        if found is None:
            return Answer(416, {"Content-Range": f"bytes */{len(data)}"})
        start, end = found
        first, last, size = (place + fault.displace for place in (start, end - 1, len(data)))
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Answer(206, headers, bytes(data[start:end]))

    async def _send(
        self, request: Request, answer: Answer, fault: Misbehaviour, writer: asyncio.StreamWriter
    ) -> bool:
        body = answer.body + fault.extra_body
        if fault.compress:
            body = gzip.compress(body)
        headers: dict[str, str | None] = {"Date": format_datetime(self.now(), usegmt=True)}
        if fault.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body))
        headers |= answer.headers
        if fault.compress:
            headers["Content-Encoding"] = "gzip"
        headers |= fault.headers
        lines = [f"HTTP/1.1 {answer.status} Answer"]
        lines += [f"{name}: {text}" for name, text in headers.items() if text is not None]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if request.method == "HEAD":
            await writer.drain()
            return True
        return await self._send_body(body, fault, writer)

    async def _send_body(
        self, body: bytes, fault: Misbehaviour, writer: asyncio.StreamWriter
    ) -> bool:
        marks = (fault.reset_after, fault.truncate_after, fault.hold_after)
        stops = sorted({mark for mark in marks if mark is not None} | {len(body)})
        sent = 0
        while True:
            if fault.reset_after == sent:
                await writer.drain()
                _reset(writer)
                return False
            if fault.truncate_after == sent:
                await writer.drain()
                return False
            if fault.hold_after == sent:
                await writer.drain()
                await fault.hold_body.wait()
            if sent == len(body):
                break
            step = fault.drip_bytes or SEND_BYTES
            until = min(sent + step, next(stop for stop in stops if stop > sent))
            piece = body[sent:until]
            frame = b"%x\r\n%s\r\n" % (len(piece), piece) if fault.chunked else piece
            writer.write(frame)
            await writer.drain()
            self.body_bytes_sent += len(piece)
            sent = until
            if fault.drip_bytes is not None:
                await asyncio.sleep(fault.drip_seconds)
        if fault.chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection so that the other end sees ECONNRESET, not an end of file."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        linger_now = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_now)
    writer.transport.abort()
