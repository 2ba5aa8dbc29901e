"""The readers: wrk for throughput, and a plain socket where single answers are timed."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.process import BenchError

READ_BYTES = 512 * 1024
TIMEOUT_SECONDS = 120.0
WRK_CONNECTIONS = 8

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CACHE_STATUS = re.compile(rb"\r\ncache-status: *([^\r]*)", re.IGNORECASE)

_SCRIPT = """
local requests, at = {}, 0
init = function(args)
  local offsets = {OFFSETS}
  for i, first in ipairs(offsets) do
    requests[i] = wrk.format("GET", nil, {["Range"] = string.format(
      "bytes=%d-%d", first, first + LENGTH - 1)})
  end
end
request = function()
  at = at % #requests + 1
  return requests[at]
end
done = function(summary, latency, _)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %d, "bytes": %d, "microseconds": %d, "errors": %d, '
    .. '"p50": %d, "p99": %d}\\n',
    summary.requests, summary.bytes, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk measured."""

    requests_per_second: float
    bytes: int
    p50_ms: float
    p99_ms: float


def wrk(
    url: str,
    offsets: Sequence[int],
    length: int,
    seconds: int,
    folder: Path,
    *,
    connections: int = WRK_CONNECTIONS,
) -> Load:
    """Read ranges as fast as the server lets us, on keep-alive connections.

    Raises:
        BenchError: Any answer was an error, so the figure would mean nothing.
    """
    script = folder / "wrk.lua"
    text = _SCRIPT.replace("OFFSETS", ", ".join(map(str, offsets)))
    script.write_text(text.replace("LENGTH", str(length)))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    ended = subprocess.run(
        [*command, "-s", str(script), url],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    line = next((x for x in ended.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise BenchError(f"wrk failed: {ended.stderr.strip() or ended.stdout.strip()}")
    result = json.loads(line.removeprefix("RESULT "))
    if result["errors"] or not result["requests"]:
        raise BenchError(f"wrk met errors at {url}: {result}")
    return Load(
        result["requests"] / (result["microseconds"] / 1e6),
        result["bytes"],
        result["p50"] / 1000,
        result["p99"] / 1000,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, its body read and thrown away."""

    status: int
    cache_status: str
    length: int
    first_byte_seconds: float
    """From sending the request to the first byte of the body."""
    seconds: float
    body: bytes
    """Only where it was to be kept."""


class Reader:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._room = memoryview(bytearray(READ_BYTES))

    def __enter__(self) -> Reader:
        """Return the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._socket.close()

    def get(
        self, path: str, span: tuple[int, int] | None = None, *, keep_body: bool = False
    ) -> Answer:
        """Read a blob, or the bytes `[start, end)` of it.

        Raises:
            BenchError: The answer is an error, or ends early.
        """
        wanted = f"Range: bytes={span[0]}-{span[1] - 1}\r\n" if span else ""
        begun = time.perf_counter()
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n{wanted}\r\n".encode())
        inbox = b""
        while not inbox.partition(b"\r\n\r\n")[2]:
            received = self._socket.recv(65536)
            if not received:
                raise BenchError(f"the connection to port {self._port} was closed in a head")
            inbox += received
        first_byte = time.perf_counter() - begun
        head, _, start = inbox.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = _LENGTH.search(head)
        cache_status = _CACHE_STATUS.search(head)
        if status not in (200, 206) or length is None:
            raise BenchError(f"GET {path} was answered {head.decode('latin-1')}{start!r}")
        kept = bytearray(start) if keep_body else None
        self._drain(int(length[1]) - len(start), kept)
        return Answer(
            status,
            cache_status[1].decode("latin-1") if cache_status else "",
            int(length[1]),
            first_byte,
            time.perf_counter() - begun,
            bytes(kept or b""),
        )

    def _drain(self, left: int, kept: bytearray | None) -> None:
        while left:
            count = self._socket.recv_into(self._room[: min(left, READ_BYTES)])
            if not count:
                raise BenchError(f"an answer ended {left} bytes early")
            left -= count
            if kept is not None:
                kept += self._room[:count]
