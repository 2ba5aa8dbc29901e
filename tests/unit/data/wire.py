"""A client that says exactly what a test wants, byte for byte, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

PATH = "/v1/blobs/team/models/blob"
ANSWER_SECONDS_MAX = 30.0
"""A test that hangs fails; it is no bound on speed."""


async def until(condition: Callable[[], object]) -> None:
    """Return once it holds; for states that announce themselves to nobody."""
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Answer:
    """A response as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def __getitem__(self, name: str) -> str:
        return self.headers[name.lower()]


def request(
    method: str = "GET",
    path: str = PATH,
    headers: Mapping[str, str] | None = None,
    *,
    version: str = "1.1",
) -> bytes:
    """Return a request's bytes."""
    lines = [f"{method} {path} HTTP/{version}", "Host: node"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    def shut(self) -> None:
        """Send no more."""
        self.writer.write_eof()

    async def answer(self, *, is_head: bool = False) -> Answer:
        """Read one response, to its last byte."""
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            status, headers = await self.head()
            length = 0 if is_head or status == 304 else int(headers["content-length"])
            return Answer(status, headers, await self.reader.readexactly(length))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read one response's head."""
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head[:-4].split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers: dict[str, str] = {}
        for line in lines:
            name, value = line.split(": ", 1)
            assert name.lower() not in headers, f"{name} is there twice"
            headers[name.lower()] = value
        return int(status), headers

    async def ask(
        self,
        method: str = "GET",
        path: str = PATH,
        headers: Mapping[str, str] | None = None,
        *,
        version: str = "1.1",
    ) -> Answer:
        """Send one request and read its response."""
        await self.send(request(method, path, headers, version=version))
        return await self.answer(is_head=method == "HEAD")

    async def rest(self) -> bytes:
        """Read to the end of the stream; a reset counts as an end."""
        data = b""
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            while True:
                try:
                    more = await self.reader.read(65536)
                except ConnectionResetError:
                    return data
                if not more:
                    return data
                data += more

    def reset(self) -> None:
        """Leave without a word."""
        self.writer.transport.abort()


@asynccontextmanager
async def connected(host: str, port: int, *, limit: int = 2**16) -> AsyncIterator[Wire]:
    """Open a connection, and close it after use."""
    reader, writer = await asyncio.open_connection(host, port, limit=limit)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
        # The transport is closed one turn of the loop after it was aborted.
        await asyncio.sleep(0)
