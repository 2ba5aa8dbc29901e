"""A reader of the data API that keeps what it got, whole or not, and knows what it must be."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blobcache_storage.testing.oracle import ByteOracle

HEAD_BYTES_MAX: Final = 16 * 1024
READ_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reader was given."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    seconds: float

    @property
    def length(self) -> int:
        """How long the body was said to be."""
        return int(self.headers["content-length"])

    @property
    def is_whole(self) -> bool:
        """Whether all of the body came."""
        return len(self.body) == self.length

    @property
    def is_served(self) -> bool:
        """Whether this is a blob's answer, whole or not, and no error's."""
        return self.status in (200, 206)

    @property
    def cache_status(self) -> str:
        """What follows `blobcache; ` in Cache-Status."""
        return self.headers.get("cache-status", "").removeprefix("blobcache; ")

    @property
    def start(self) -> int:
        """Where in the blob the body begins."""
        if self.status != 206:
            return 0
        return int(self.headers["content-range"].removeprefix("bytes ").partition("-")[0])

    @property
    def code(self) -> str:
        """An error's reason."""
        return "" if self.is_served else str(json.loads(self.body)["code"])

    @property
    def message(self) -> str:
        """An error's sentence."""
        return "" if self.is_served else str(json.loads(self.body)["message"])

    def __str__(self) -> str:
        if not self.is_served:
            return f"{self.status} {self.code} ({self.message}) after {self.seconds:.1f} s"
        return (
            f"{self.status} {len(self.body)} of {self.length} bytes, {self.cache_status},"
            f" after {self.seconds:.1f} s"
        )


async def read_blob(
    port: int,
    path: str,
    *,
    token: str = "",
    first: int | None = None,
    last: int | None = None,
    timeout_seconds: float = 60.0,
) -> Outcome:
    """GET `/v1/blobs/{path}` and return the answer as far as it came.

    Raises:
        ConnectionError: The connection ended before a whole head.
        TimeoutError: The answer took longer.
    """
    begun = time.monotonic()
    lines = [f"GET /v1/blobs/{path} HTTP/1.1", "Host: agent", "Connection: close"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if first is not None:
        lines.append(f"Range: bytes={first}-{'' if last is None else last}")
    async with asyncio.timeout(timeout_seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=HEAD_BYTES_MAX)
        try:
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except asyncio.IncompleteReadError as error:
                raise ConnectionError(f"no head after {len(error.partial)} bytes") from None
            body = await _read_body(reader)
        finally:
            writer.close()
    status_line, *fields = head.rstrip("\r\n").split("\r\n")
    pairs = (field.partition(":")[::2] for field in fields)
    headers = {name.lower(): text.strip() for name, text in pairs}
    return Outcome(int(status_line.split(" ")[1]), headers, body, time.monotonic() - begun)


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the connection ends, in good order or not."""
    parts = []
    try:
        while part := await reader.read(READ_BYTES):
            parts.append(part)
    except ConnectionError:
        pass  # how an answer is cut short
    return b"".join(parts)


def first_wrong(outcome: Outcome, oracle: ByteOracle, name: str, version: int) -> int | None:
    """Return where the first byte lies that is not of this version, None if all are."""
    return oracle.first_wrong(name, version, outcome.start, outcome.body)
