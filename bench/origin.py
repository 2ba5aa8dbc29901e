"""The origin: an HTTP server of blobs with a set latency and speed, that counts what it sends.

A blob is named `NAME-SIZE` and holds the first SIZE bytes of one data file, so that there are as
many blobs as one likes. Latency passes before each answer's head; the speed is one line's, shared
by all connections. Threads and `sendfile`: it sustains what the loopback does.

    python bench/origin.py FILE PORT LATENCY_SECONDS BYTES_PER_SECOND    (0: no limit)

`GET /counters` answers with two numbers: requests, and bytes of bodies sent.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time

SLICE_BYTES = 128 * 1024
"""Sent at a time where the speed is limited."""
UNLIMITED_SLICE_BYTES = 8 * 1024 * 1024
CREDIT_SECONDS = 0.005
"""How far the line may catch up after a thread slept too long."""
CONNECTIONS_MAX = 256

_HEAD = re.compile(rb"GET /([^ ]*) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nrange: *bytes=([0-9]+)-([0-9]*)\r\n", re.IGNORECASE)


class Line:
    """One line of a set speed, on which all who send queue up."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def is_limited(self) -> bool:
        """Whether there is a speed at all."""
        return self._bytes_per_second > 0

    def wait(self, length: int) -> None:
        """Wait until so many bytes have passed."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - CREDIT_SECONDS)
            self._free_at += length / self._bytes_per_second
            due = self._free_at
        if due > now:
            time.sleep(due - now)


class Origin:
    """See the module."""

    def __init__(self, path: str, latency_seconds: float, bytes_per_second: float) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._file_bytes = os.fstat(self._fd).st_size
        self._latency_seconds = latency_seconds
        self._line = Line(bytes_per_second)
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(CONNECTIONS_MAX)
        self._requests = self._sent_bytes = 0

    def serve(self, port: int) -> None:
        """Accept for ever."""
        with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
            while True:
                self._slots.acquire()
                connection, _ = listener.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        inbox = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), connection:
            while True:
                while b"\r\n\r\n" not in inbox:
                    received = connection.recv(65536)
                    if not received:
                        break
                    inbox += received
                head, found, inbox = inbox.partition(b"\r\n\r\n")
                if not found:
                    break
                self._answer(connection, head + b"\r\n")
        self._slots.release()

    def _answer(self, connection: socket.socket, head: bytes) -> None:
        match = _HEAD.match(head)
        name = match[1].decode("latin-1") if match else ""
        if name == "counters":
            with self._lock:
                body = f"{self._requests} {self._sent_bytes}".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        size_text = name.rpartition("-")[2]
        if not size_text.isdigit() or int(size_text) > self._file_bytes:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        size = int(size_text)
        start, end, status = 0, size, "200 OK"
        wanted = _RANGE.search(head)
        extra = ""
        if wanted:
            start = int(wanted[1])
            end = min(size, int(wanted[2]) + 1 if wanted[2] else size)
            if start >= end:
                answer = f"HTTP/1.1 416 Out\r\nContent-Range: bytes */{size}\r\n"
                connection.sendall(answer.encode() + b"Content-Length: 0\r\n\r\n")
                return
            status, extra = (
                "206 Partial Content",
                f"Content-Range: bytes {start}-{end - 1}/{size}\r\n",
            )
        if self._latency_seconds:
            time.sleep(self._latency_seconds)
        with self._lock:
            self._requests += 1
        connection.sendall(
            f'HTTP/1.1 {status}\r\nETag: "{name}"\r\nAccept-Ranges: bytes\r\n{extra}'
            f"Content-Length: {end - start}\r\n\r\n".encode()
        )
        self._send(connection, start, end)

    def _send(self, connection: socket.socket, offset: int, end: int) -> None:
        most = SLICE_BYTES if self._line.is_limited else UNLIMITED_SLICE_BYTES
        while offset < end:
            length = min(most, end - offset)
            if self._line.is_limited:
                self._line.wait(length)
            stop = offset + length
            while offset < stop:
                sent = os.sendfile(connection.fileno(), self._fd, offset, stop - offset)
                if not sent:
                    raise ConnectionError("the reader left")
                offset += sent
                with self._lock:
                    self._sent_bytes += sent


def main() -> None:
    """Serve until a signal."""
    path, port, latency_seconds, bytes_per_second = sys.argv[1:]
    Origin(path, float(latency_seconds), float(bytes_per_second)).serve(int(port))


if __name__ == "__main__":
    main()
