"""The short way of a hit: from what a socket delivered to one write, in the same turn of the loop.

It answers what nearly all hits are: a plain GET of a blob, or of one range of it, whose bytes are
verified, on a connection that stays. Whatever else there may be in a head, or be the matter with
the blob, the reader or the configuration, is for the ordinary road (`exchange`), which judges it
all anew. So the lane refuses nobody: it answers as the ordinary road would, or not at all.

What makes it short:

* The heads of a connection mostly differ in the digits of a range. A head that is equal to one
  understood before but for these means the same but for these, and is not parsed.
* Nothing is held while nothing is waited for: no task, no handle, no read. Only if the socket does
  not take all of an answer is its rest made a read, for the ordinary road to send.

Who may read what is decided for each request, by the same objects as on the ordinary road.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blobcache_agent.data import conditions
from blobcache_agent.data.blob_path import PREFIX, BlobPath, parse_blob_path
from blobcache_agent.data.catalog import (
    Admission,
    Forbidden,
    NotReady,
    ResponseRecord,
    Unauthenticated,
    UnknownConfig,
)
from blobcache_agent.data.limits import HEAD_BYTES_MAX
from blobcache_agent.data.outlet import Outlet
from blobcache_agent.data.rejection import Rejection
from blobcache_agent.data.request import HEAD_END, Request, parse_head
from blobcache_agent.data.responses import HeadFrame, content_lines
from blobcache_storage.cache.base import BlobRead, CacheStatus, Hit
from blobcache_storage.device import BlobVersion

if TYPE_CHECKING:
    from blobcache_agent.data.exchange import Services

_BEGINNING = b"GET " + PREFIX.encode("ascii")
_RANGE_LINE = re.compile(rb"\r\nrange:[ \t]*bytes=([0-9]+-[0-9]*)[ \t]*\r\n", re.IGNORECASE)
_RANGE = re.compile(rb"([0-9]{1,18})-([0-9]{0,18})")


@dataclass(slots=True)
class _Meaning:
    """A head that was understood, and so every other that begins and ends like it.

    It holds the reader's token, as part of the head, for as long as the connection stays.
    """

    beginning: bytes
    """All of a head without a range; of one with a range what comes before its digits."""
    end: bytes
    """What comes after them."""
    is_ranged: bool
    path: BlobPath
    admission: Admission


@dataclass(slots=True)
class Begun:
    """An answer of which the lane sent the beginning; `Exchange.run` sends the rest."""

    path: BlobPath
    status: int
    read: BlobRead
    """The rest of the body; to be closed."""
    head_left: bytes
    """The rest of the head; empty if any of the body was sent."""
    taken_bytes: int
    """Of head and body, at least one."""
    body_bytes: int
    """Of the body alone."""
    start_time: float


class HitLane:
    """One connection's; see the module."""

    __slots__ = ("_frame", "_meaning", "_outlet", "_services")

    def __init__(self, services: Services, outlet: Outlet) -> None:
        self._services = services
        self._outlet = outlet
        self._meaning: _Meaning | None = None
        self._frame = _Frame()

    def answer(self, received: bytes) -> Begun | bool:
        """Answer what was received if it is a head, the whole head, and asks for a hit.

        The outlet must hold nothing. Never waits, and sends nothing but a right answer.

        Returns:
            True if it is answered, False if the ordinary road must do it, nothing having been
            sent; else what is left to do.
        """
        start_time = time.monotonic()
        try:
            meaning = self._meaning
            if meaning is None or not (
                received.startswith(meaning.beginning) and received.endswith(meaning.end)
            ):
                meaning = self._meaning = self._understand(received)
                if meaning is None:
                    return False
            hit = self._find(meaning, received)
        except (Unauthenticated, Forbidden, UnknownConfig, NotReady, Rejection):
            self._meaning = None
            return False
        return hit is not None and self._send(meaning, hit, start_time)

    def _understand(self, received: bytes) -> _Meaning | None:
        """Return what a head means; None if it is no head, or one for the ordinary road.

        Raises:
            Rejection: The head is malformed, or names no blob.
            Unauthenticated: Its token is not good.
        """
        is_one_head = received.find(HEAD_END) + len(HEAD_END) == len(received) <= HEAD_BYTES_MAX
        if not (is_one_head and received.startswith(_BEGINNING)):
            return None
        request = parse_head(received)
        if not _is_plain(request):
            return None
        beginning, end = received, b""
        wanted = request.headers.get(b"range")
        if wanted is not None:
            line = _RANGE_LINE.search(received)
            # If the whole value is those digits, then the line is the only one, and not folded.
            if line is None or wanted != f"bytes={line[1].decode('ascii')}":
                return None
            beginning, end = received[: line.start(1)], received[line.end(1) :]
        admission = self._services.auth.recognize(request.headers.get(b"authorization"))
        path = parse_blob_path(request.path)
        return _Meaning(beginning, end, wanted is not None, path, admission)

    def _find(self, meaning: _Meaning, received: bytes) -> Hit | None:
        """Return the hit, if it is one; the reader may read it.

        Raises:
            UnknownConfig, NotReady: There is no such configuration that can serve.
        """
        first, last = 0, None
        if meaning.is_ranged:
            digits = received[len(meaning.beginning) : len(received) - len(meaning.end)]
            wanted = _RANGE.fullmatch(digits)
            if wanted is None:
                return None
            first = int(wanted[1])
            last = int(wanted[2]) if wanted[2] else None
        elif len(received) != len(meaning.beginning):
            return None
        path = meaning.path
        entry = self._services.catalog.resolve(path.namespace, path.name)
        if not meaning.admission.opens(entry):
            # It may have run out: it is asked for again with the next head.
            self._meaning = None
            return None
        return entry.hit(path.blob_id, first, last)

    def _send(self, meaning: _Meaning, hit: Hit, start_time: float) -> Begun | bool:
        """Send head and bytes, as many as the socket takes at once."""
        services, path, start, end = self._services, meaning.path, hit.start, hit.end
        status = 206 if meaning.is_ranged else 200
        frame = self._frame.of(status, hit.version, services.clock.now())
        head = b"%b%b%b" % (
            frame.before,
            content_lines(status, start, end, hit.version.size_bytes),
            frame.after,
        )
        taken = self._outlet.send_now(hit.fd, start, end - start, head)
        if not taken:
            return False
        sent = taken - len(head)
        if sent < end - start:
            head_left, sent = head[taken:], max(sent, 0)
            rest = hit.rest(sent)
            return Begun(path, status, rest, head_left, taken, sent, start_time)
        hit.done()
        services.observer.on_response(
            ResponseRecord(
                "GET",
                status,
                "",
                path.namespace,
                path.name,
                path.blob_id,
                CacheStatus.HIT.value,
                sent,
                time.monotonic() - start_time,
                False,
            )
        )
        return True


class _Frame:
    """The last `HeadFrame` of a connection: most answers of a second have the same."""

    __slots__ = ("_date", "_frame", "_status", "_version")

    def __init__(self) -> None:
        self._date = ""
        self._status = 0
        self._version: BlobVersion | None = None
        self._frame = HeadFrame(b"", b"")

    def of(self, status: int, version: BlobVersion, date: str) -> HeadFrame:
        """Return the frame of a hit's head."""
        if version is not self._version or date is not self._date or status != self._status:
            self._status, self._version, self._date = status, version, date
            self._frame = HeadFrame.of(status, version, CacheStatus.HIT, date=date, connection="")
        return self._frame


def _is_plain(request: Request) -> bool:
    """Whether there is nothing in a head that this lane does not know."""
    return (
        request.method == "GET"
        and not request.is_http_1_0
        and request.keep_alive
        and not conditions.is_conditional(request.headers)
    )
