"""Many readers at once: a herd on one cold blob, and healthy readers beside slow ones."""

from __future__ import annotations

import contextlib
import mmap
import re
import selectors
import socket
import threading
import time
from collections import defaultdict
from pathlib import Path

from crc32c import crc32c

from bench.client import wrk
from bench.hits import BLOB, BLOB_BYTES
from bench.process import MIB, BenchError
from bench.ratios import Row, at_most, figure_of, ratio_of, turns
from bench.servers import DATA_NAME, PREFIX, Bench, Server, agent, nginx, origin, require, warm

HERDS = ((100, 256 * MIB), (1000, 64 * MIB))
HERD_GOAL = 1.02
HERD_SECONDS_MAX = 300.0
HERD_BYTES_PER_SECOND = 200e6
SLOW_READERS = 500
SLOW_READ_BYTES = 4096
SLOW_PAUSE_SECONDS = 0.2
SETTLE_SECONDS = 2.0
"""Until the kernel's buffers of the slow readers are full: about a megabyte each."""
HEALTHY_CONNECTIONS = 4
HEALTHY_BYTES = 64 * 1024
HEAD_BYTES_MAX = 4096

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class HerdReader:
    """One reader that checks what it gets."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        self.socket.setblocking(False)
        self._head: bytes | None = b""
        self.left = -1
        self.crc = 0

    def take(self, piece: memoryview) -> None:
        """Take bytes as they come."""
        if self._head is not None:
            self._head += piece
            head, found, rest = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            length = _LENGTH.search(head)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                raise BenchError(f"a reader of the herd was answered {head.decode('latin-1')}")
            self._head, self.left, piece = None, int(length[1]), memoryview(rest)
        self.crc = crc32c(piece, self.crc)
        self.left -= len(piece)


def measure_herd(bench: Bench) -> list[Row]:
    """Have many readers ask for one cold blob at the same time."""
    return [_herd(bench, readers, length) for readers, length in HERDS]


def _herd(bench: Bench, count: int, length: int) -> Row:
    expected = _crc_of(bench.data, length)
    with (
        origin(bench, latency_seconds=0.02, bytes_per_second=HERD_BYTES_PER_SECOND) as source,
        agent(bench, source.port) as server,
    ):
        begun = time.monotonic()
        wrong = _stampede(server.port, f"{PREFIX}herd-{length}", count, expected)
        seconds = time.monotonic() - begun
        requests, sent = source.counters()
        peak = server.process.memory_mib("VmHWM")
    note = (
        f"{count} readers of {length // MIB} MiB in {seconds:.1f} s, {wrong} of them wrong;"
        f" {requests} requests; peak RSS {peak:.0f} MiB"
    )
    details = {"seconds": seconds, "wrong": wrong, "requests": requests, "peak_mib": peak}
    figure = figure_of([sent / length])
    title = f"herd of {count:,}, origin's bytes"
    if wrong:
        raise BenchError(f"WRONG BYTES: {note}")
    return Row(f"herd-{count}", title, figure, "x blob", at_most(HERD_GOAL), note, details)


def _crc_of(path: Path, length: int) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ) as mapped:
        value: int = crc32c(mapped)
    return value


def _stampede(port: int, path: str, count: int, expected_crc: int) -> int:
    """Return how many readers got other bytes than there are.

    Raises:
        BenchError: A reader was refused or cut short, or it takes too long.
    """
    room = memoryview(bytearray(MIB))
    deadline = time.monotonic() + HERD_SECONDS_MAX
    wrong = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(count):
            reader = HerdReader(port, path)
            stack.callback(reader.socket.close)
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        while selector.get_map():
            if time.monotonic() > deadline:
                raise BenchError(f"the herd was not served in {HERD_SECONDS_MAX:g} s")
            for key, _ in selector.select(timeout=1):
                reader = key.data
                got = reader.socket.recv_into(room)
                if not got:
                    raise BenchError(f"a reader of the herd was cut short, {reader.left} missing")
                reader.take(room[:got])
                if not reader.left:
                    selector.unregister(reader.socket)
                    reader.socket.close()
                    wrong += reader.crc != expected_crc
    return wrong


class SlowReaders:
    """Connections that ask for much and take little, for as long as the block lasts."""

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sip, daemon=True)
        self.dropped = 0

    def __enter__(self) -> SlowReaders:
        """Connect and begin to read slowly."""
        for _ in range(SLOW_READERS):
            sock = socket.socket()
            self._sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            sock.connect(("127.0.0.1", self._port))
            sock.sendall(self._request)
            sock.setblocking(False)
        self._thread.start()
        time.sleep(SETTLE_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self._ended.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def _sip(self) -> None:
        """Have each take a little in turn, all of them once in a pause."""
        pause = SLOW_PAUSE_SECONDS / SLOW_READERS * 25
        while not self._ended.is_set():
            for number, sock in enumerate(self._sockets):
                try:
                    if not sock.recv(SLOW_READ_BYTES):
                        self.dropped += 1
                except BlockingIOError:
                    pass
                except OSError:
                    self.dropped += 1
                if number % 25 == 0 and self._ended.wait(pause):
                    return


def measure_slow_readers(bench: Bench) -> list[Row]:
    """Compare the p99 of healthy readers with and without 500 slow ones, also at nginx."""
    require("wrk")
    offsets = [number * 1024 * 1024 for number in range(BLOB_BYTES // MIB)]
    p99: dict[str, list[float]] = defaultdict(list)
    with origin(bench) as source, nginx(bench) as floor, agent(bench, source.port) as mine:
        warm(mine, PREFIX + BLOB)
        servers = {"nginx": (floor, "/" + DATA_NAME), "blobcache": (mine, PREFIX + BLOB)}
        for _, name in turns(list(servers), bench.rounds):
            server, path = servers[name]
            p99[f"{name} alone"].append(_healthy(bench, server, path, offsets))
            with SlowReaders(server.port, path):
                p99[f"{name} beside"].append(_healthy(bench, server, path, offsets))
    medians = {name: figure_of(values).value for name, values in p99.items()}
    nginx_ratio = ratio_of(p99["nginx beside"], p99["nginx alone"]).value
    mine_ratio = ratio_of(p99["blobcache beside"], p99["blobcache alone"]).value
    note = (
        f"{medians['blobcache alone']:.2f} ms alone, {medians['blobcache beside']:.2f} ms beside"
        f" them ({mine_ratio:.2f}x); nginx {medians['nginx alone']:.2f} and"
        f" {medians['nginx beside']:.2f} ms ({nginx_ratio:.2f}x);"
        f" {HEALTHY_CONNECTIONS} connections without pause, ranges of 64 KiB"
    )
    figure = ratio_of(p99["blobcache beside"], p99["nginx beside"])
    title = f"p99 of healthy readers beside {SLOW_READERS} slow ones"
    return [Row("slow-readers", title, figure, "x nginx", None, note, medians)]


def _healthy(bench: Bench, server: Server, path: str, offsets: list[int]) -> float:
    load = wrk(
        server.url(path),
        offsets,
        HEALTHY_BYTES,
        bench.seconds,
        bench.folder,
        connections=HEALTHY_CONNECTIONS,
    )
    return load.p99_ms
