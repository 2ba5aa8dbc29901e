"""Crowds of unfair clients, in a process of its own: `python -m tests.faults.crowds --help`.

It says `{"connected": N}` once the crowd is there, stays until its standard input ends, and then
prints what it saw. Every byte of a body is compared with the oracle's; an answer other than a right
one, a refusal that says so, or a closed connection is a problem.

    slow    asks for a large blob and takes a few hundred bytes at a time
    drip    sends a request's head one byte at a time and begins anew when it is cut off
    idle    reads a small blob, then holds its connection, the next time another blob
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

from blobcache_storage.testing.oracle import ByteOracle
from tests.faults.loop_volume import die_with_parent

CONFIG = "default/crowd"
TICK_SECONDS = 0.1
SLOW_RECEIVE_BYTES = 512
SLOW_EACH_SECONDS = 0.3
SLOW_SOCKET_BYTES = 4096
DRIP_EACH_SECONDS = 1.0
CONNECTS_PER_TICK = 250
COMES_AGAIN_SECONDS = 1.0
DESCRIPTORS_SPARE = 64
PROBLEMS_MAX = 20

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Member:
    """One client; it is told of input and of time, and says what happened in `tally`."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.crowd = crowd
        self.number = number
        self.socket = socket.socket()
        self.due_time = 0.0
        self.waits_for_input = True
        self._head = b""
        self._left = -1
        self._position = 0
        self.blob_id = ""

    def connect(self, port: int) -> None:
        """Begin; loopback accepts at once or refuses at once."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.crowd.receive_bytes)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)

    def ask(self, blob_id: str) -> bytes:
        """Return a request and expect its answer."""
        self.blob_id, self._head, self._left, self._position = blob_id, b"", -1, 0
        return f"GET /v1/blobs/{CONFIG}/{blob_id} HTTP/1.1\r\nHost: crowd\r\n\r\n".encode()

    def take(self, data: bytes) -> bool:
        """Check what came; return whether the answer is complete."""
        if self._left < 0:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return False
            length = _LENGTH.search(head)
            status = int(head[9:12])
            self.crowd.tally[f"answered {status}"] += 1
            if length is None or status not in (200, 408, 503):
                self.crowd.complain(f"{self.blob_id}: answered {head[:200]!r}")
            if status == 503 and b"\r\nretry-after:" not in head.lower():
                self.crowd.complain("a 503 without Retry-After")
            self._left = int(length[1]) if length else 0
            self.is_served = status == 200
        if self.is_served:
            wrong = self.crowd.oracle.first_wrong(self.blob_id, 1, self._position, data)
            if wrong is not None:
                self.crowd.complain(f"{self.blob_id}: WRONG BYTE at {wrong}")
            self.crowd.tally["bytes checked"] += len(data)
        self._position += len(data)
        self._left -= len(data)
        return self._left <= 0

    def start(self) -> None:
        """Act once connected."""

    def on_time(self, now: float) -> None:
        """Act when `due_time` is there."""

    def on_input(self, data: bytes) -> None:
        """Act on input; b"" is the end."""


class SlowReader(Member):
    """See the module."""

    def start(self) -> None:
        """Ask."""
        self.waits_for_input = False
        self.socket.send(self.ask(self.crowd.blob_ids[self.number % len(self.crowd.blob_ids)]))
        self.due_time = time.monotonic() + SLOW_EACH_SECONDS

    def on_time(self, now: float) -> None:
        """Sip."""
        self.due_time = now + SLOW_EACH_SECONDS
        with contextlib.suppress(BlockingIOError):
            data = self.socket.recv(SLOW_RECEIVE_BYTES)
            if data and not self.take(data):
                self.crowd.tally["sips"] += 1
            else:
                self.crowd.leave(self, "slow reader ended")


class Dripper(Member):
    """See the module."""

    def start(self) -> None:
        """Have something to say."""
        self._unsent = self.ask("none")[:-4] + b"\r\nX-Padding: " + b"x" * 4096
        # Not all in one moment.
        self.due_time = time.monotonic() + DRIP_EACH_SECONDS * (self.number % 100) / 100

    def on_time(self, now: float) -> None:
        """Drip."""
        self.due_time = now + DRIP_EACH_SECONDS
        self.socket.send(self._unsent[:1])
        self._unsent = self._unsent[1:]
        self.crowd.tally["drips"] += 1

    def on_input(self, data: bytes) -> None:
        """Note how it was cut off."""
        if data and not self.take(data):
            return
        self.crowd.leave(self, "dripper cut off")


class Idler(Member):
    """See the module."""

    def start(self) -> None:
        """Ask for a blob that nobody else asks for."""
        self.due_time = float("inf")
        self.socket.send(self.ask(self.crowd.blob_ids[self.number % len(self.crowd.blob_ids)]))
        self._is_done = False

    def on_input(self, data: bytes) -> None:
        """Be content, and stay."""
        if not data:
            what = "idler closed after its answer" if self._is_done else "idler closed unanswered"
            self.crowd.leave(self, what)
        elif self.take(data):
            self._is_done = self.is_served


KINDS: dict[str, Callable[[Crowd, int], Member]] = {
    "slow": SlowReader,
    "drip": Dripper,
    "idle": Idler,
}


class Crowd:
    """All members, and what they saw.

    Args:
        kind: One of KINDS.
        comes_again: Whether who is cut off begins anew.
    """

    def __init__(
        self, kind: str, port: int, count: int, blob_ids: list[str], seed: int, *, comes_again: bool
    ) -> None:
        self._make = KINDS[kind]
        self._port = port
        self._count = count
        self._comes_again = comes_again
        self.receive_bytes = SLOW_SOCKET_BYTES if kind == "slow" else 65536
        self.blob_ids = blob_ids
        self.oracle = ByteOracle(seed)
        self.tally: Counter[str] = Counter()
        self.problems: list[str] = []
        self._selector = selectors.EpollSelector()
        self._members: dict[int, Member] = {}
        self._missing = [(0.0, number) for number in range(count)]
        """Who must connect, and from when on; in that order."""

    def complain(self, problem: str) -> None:
        """Note what must not be."""
        self.tally["problems"] += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

    def leave(self, member: Member, why: str) -> None:
        """A member's connection has ended."""
        self.tally[why] += 1
        if member.waits_for_input:
            self._selector.unregister(member.socket)
        del self._members[member.number]
        member.socket.close()
        if self._comes_again:
            self._missing.append((time.monotonic() + COMES_AGAIN_SECONDS, member.number))

    def _fill_up(self) -> None:
        now = time.monotonic()
        due = [number for time_, number in self._missing[:CONNECTS_PER_TICK] if time_ <= now]
        del self._missing[: len(due)]
        for number in due:
            self.tally["tries"] += 1
            member = self._make(self, number)
            try:
                member.connect(self._port)
                member.start()
            except OSError as error:
                member.socket.close()
                self.tally[f"not connected: {type(error).__name__}"] += 1
                continue
            self.tally["connections"] += 1
            self._members[number] = member
            if member.waits_for_input:
                self._selector.register(member.socket, selectors.EVENT_READ, member)

    def run(self) -> None:
        """Stay until standard input ends."""
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        said = False
        while True:
            self._fill_up()
            if not said and self.tally["tries"] >= self._count:
                said = True
                print(json.dumps({"connected": len(self._members)}), flush=True)  # noqa: T201
            for key, _ in self._selector.select(TICK_SECONDS if said else 0):
                if key.data is None:
                    self._end()
                    return
                self._receive(key.data)
            now = time.monotonic()
            for member in [m for m in self._members.values() if m.due_time <= now]:
                try:
                    member.on_time(now)
                except OSError as error:
                    self.leave(member, f"cut off: {type(error).__name__}")
            self.tally["members at most"] = max(self.tally["members at most"], len(self._members))

    def _receive(self, member: Member) -> None:
        try:
            member.on_input(member.socket.recv(65536))
        except BlockingIOError:
            return
        except OSError as error:
            self.leave(member, f"cut off: {type(error).__name__}")

    def _end(self) -> None:
        self.tally["members at the end"] = len(self._members)
        for member in self._members.values():
            member.socket.close()


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Is a crowd of unfair clients.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blobs", type=int, required=True, help="named PREFIX0, PREFIX1, …")
    parser.add_argument("--prefix", default="large-")
    parser.add_argument("--come-again", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    needed = arguments.count + DESCRIPTORS_SPARE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < needed:
        print(json.dumps({"cannot": f"{needed} open files are needed, {hard} are allowed"}))  # noqa: T201
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    blob_ids = [f"{arguments.prefix}{number}" for number in range(arguments.blobs)]
    crowd = Crowd(
        arguments.kind,
        arguments.port,
        arguments.count,
        blob_ids,
        arguments.seed,
        comes_again=arguments.come_again,
    )
    crowd.run()
    print(json.dumps({**crowd.tally, "problems found": crowd.problems}))  # noqa: T201


if __name__ == "__main__":
    main()
