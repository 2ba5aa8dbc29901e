"""One reader's connection: input into heads, heads into exchanges, one at a time.

States, of which exactly one holds::

    receiving   no task, waiting for a head (a fresh or a kept connection)    deadline: head, idle
    answering   a task runs exchanges, one after the other                    watched for progress
    lingering   the last answer was sent; what still comes is discarded       deadline: linger
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import struct
from typing import TYPE_CHECKING

from blobcache_agent.data.exchange import READER_GONE, Exchange, Head
from blobcache_agent.data.lane import HitLane
from blobcache_agent.data.limits import HEAD_BYTES_MAX, LINGER_BYTES_MAX
from blobcache_agent.data.outlet import Outlet
from blobcache_agent.data.rejection import Rejection, bad_request, head_too_large
from blobcache_agent.data.request import HEAD_END

if TYPE_CHECKING:
    from blobcache_agent.data.server import DataServer

SLOW_READER = "SlowReader"
SHUTTING_DOWN = "ShuttingDown"

_HOPELESS = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z\r-]|\r[^\n]")
"""No request begins like this; TLS, for one, does."""
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_LINGER_NOT = struct.pack("ii", 1, 0)


class Connection(asyncio.BufferedProtocol):
    """The protocol of one connection.

    Args:
        server: Whose it is.
        refusal: What to say at once instead of serving, if anything.
    """

    def __init__(self, server: DataServer, refusal: Rejection | None = None) -> None:
        self._server = server
        self._limits = server.limits
        self._refusal = refusal
        self._loop = asyncio.get_running_loop()
        self._inbox = bytearray()
        self._is_answering = False
        self._task: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None
        self._deadline = 0.0
        self._is_idle = False
        """Between two requests, with no byte of the next."""
        self._is_paused = False
        self._is_cut = False
        self._is_lingering = False
        self._discarded_bytes = 0
        self._end_of_input_time: float | None = None
        self._acknowledged_bytes = 0
        self._progress_time = 0.0

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._outlet = Outlet(
            transport,
            self._server.scratch,
            self._server.threads,
            self._limits.write_buffer_bytes,
        )
        self._lane = HitLane(self._server.services, self._outlet)
        self._deadline = self._loop.time() + self._limits.head_timeout_seconds
        self._server.add(self)
        if self._refusal is not None:
            self._start(self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """End; a reader who leaves ends its read."""
        self._server.discard(self)
        self._cancel(READER_GONE)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the server's receive buffer: it is emptied before the next connection's turn."""
        return self._server.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take input; stop listening while a head's worth of it waits for an answer to end."""
        if self._is_lingering:
            self._discarded_bytes += nbytes
            if self._discarded_bytes > LINGER_BYTES_MAX:
                self._transport.abort()
            return
        received = self._server.receive_buffer[:nbytes]
        if not (self._is_answering or self._inbox) and self._answer_at_once(bytes(received)):
            return
        self._inbox += received
        if not self._is_answering:
            self._advance()
        elif len(self._inbox) >= HEAD_BYTES_MAX:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Let an answer under way reach a reader who has shut only its sending side."""
        self._end_of_input_time = self._loop.time()
        return self._is_answering

    def pause_writing(self) -> None:
        """The transport holds bytes."""
        self._outlet.hold()

    def resume_writing(self) -> None:
        """The transport is empty."""
        self._outlet.release()

    # What the server calls.

    @property
    def waiting_since(self) -> float | None:
        """Since when it waits for a head, by the loop's clock; None if it does not wait."""
        if self._is_answering or self._is_lingering or self._transport.is_closing():
            return None
        limits = self._limits
        return self._deadline - (
            limits.idle_timeout_seconds if self._is_idle else limits.head_timeout_seconds
        )

    def sweep(self, now: float) -> None:
        """Enforce the time-outs; called every `Limits.sweep_seconds`."""
        if self._is_answering:
            self._watch_answer(now)
        elif now >= self._deadline:
            self._expire()

    def close_if_idle(self) -> None:
        """Close unless an answer is under way; after that one it closes by itself."""
        if not self._is_answering:
            self._transport.close()

    def close_if_silent(self) -> bool:
        """Close if it waits for a head and has sent nothing that is unread; return whether so."""
        if self.waiting_since is None:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        if poll.poll(0):
            return False
        self._transport.close()
        return True

    def cut(self, reason: str) -> None:
        """End now, whatever is under way."""
        self._cancel(reason)
        self._transport.abort()

    # Receiving.

    def _advance(self) -> None:
        """Answer the next head if it is there, else wait for it, but not for ever."""
        head = self._next_head()
        if head is not None:
            self._start(head)
        elif self._is_idle and self._inbox:
            self._is_idle = False
            self._deadline = self._loop.time() + self._limits.head_timeout_seconds

    def _next_head(self) -> bytes | Rejection | None:
        """Return the next head, why there can be none, or None if it is not complete yet."""
        inbox = self._inbox
        if inbox.startswith(b"\r\n"):
            # Some old clients end a request with one line too many (RFC 9112 section 2.2).
            del inbox[:2]
        end = inbox.find(HEAD_END) + len(HEAD_END)
        if len(HEAD_END) <= end <= HEAD_BYTES_MAX:
            head = bytes(memoryview(inbox)[:end])
            del inbox[:end]
            return head
        if len(inbox) >= HEAD_BYTES_MAX:
            return head_too_large(f"a request's head may have {HEAD_BYTES_MAX} bytes")
        if _HOPELESS.match(inbox) or _BARE_LINE_FEED.search(inbox):
            return bad_request("this is not HTTP/1.1")
        return None

    def _expire(self) -> None:
        """End a connection whose reader did not do its part in time."""
        if self._is_lingering:
            self._transport.abort()
        elif self._inbox:
            message = f"the head must arrive within {self._limits.head_timeout_seconds:g} s"
            self._start(Rejection(408, "RequestTimeout", message, close=True))
        else:
            self._transport.close()

    # Answering.

    def _answer_at_once(self, received: bytes) -> bool:
        """Answer, or begin to answer, a hit that can be; whether it is."""
        if self._server.is_stopping:
            return False
        try:
            begun = self._lane.answer(received)
        except Exception as error:
            self._server.services.observer.on_error(error)
            self._transport.abort()
            return True
        if begun is True:
            self._await_request()
        elif begun is not False:
            self._start(begun)
        return begun is not False

    def _start(self, head: Head) -> None:
        """Begin to answer."""
        self._is_idle = False
        self._progress_time = self._loop.time()
        self._is_answering = True
        self._task = self._server.spawn(self._answer_all(head))

    async def _answer_all(self, head: Head | None) -> None:
        """Answer heads, one after the other, as long as complete ones are there."""
        try:
            while head is not None:
                exchange = self._exchange = Exchange(self._server.services, self._outlet)
                await exchange.run(head, may_keep_alive=not self._server.is_stopping)
                if exchange.is_aborted:
                    self._transport.abort()
                    return
                if not exchange.keep_alive or self._server.is_stopping:
                    self._linger()
                    return
                head = self._next_head()
                self._listen_again()
                if head is not None:
                    # A pipeline of hits must not take the loop for itself.
                    await asyncio.sleep(0)
            self._await_request()
        except Exception as error:
            # Whatever it is, it must not leave a reader waiting for the rest of an answer.
            self._server.services.observer.on_error(error)
            self._transport.abort()
        finally:
            self._is_answering = False
            self._exchange = None

    def _listen_again(self) -> None:
        """Resume reading if there is room."""
        if self._is_paused and len(self._inbox) < HEAD_BYTES_MAX:
            self._is_paused = False
            self._transport.resume_reading()

    def _await_request(self) -> None:
        """Keep the connection for another request, whose first bytes may be there."""
        if self._end_of_input_time is not None:
            self._transport.close()
            return
        self._is_idle = not self._inbox
        limits = self._limits
        self._deadline = self._loop.time() + (
            limits.idle_timeout_seconds if self._is_idle else limits.head_timeout_seconds
        )

    def _linger(self) -> None:
        """Close without destroying what was just sent.

        Closing a socket with unread input resets the connection, and a reset makes the reader's
        kernel drop an answer it has not delivered (RFC 9112 section 9.6). So: end the output,
        discard input for a while, then close.
        """
        if self._end_of_input_time is not None:
            self._transport.close()
            return
        self._is_lingering = True
        self._inbox.clear()
        self._deadline = self._loop.time() + self._limits.linger_seconds
        self._transport.write_eof()
        self._listen_again()

    def _watch_answer(self, now: float) -> None:
        """Cut off a reader that takes nothing, and give up for one that has probably gone.

        Progress is what the reader's machine acknowledges: the kernel's send buffer grows to
        megabytes, and asks for more only when a third of it is free.
        """
        outlet, exchange = self._outlet, self._exchange
        if not outlet.is_waiting or self._transport.is_closing():
            self._progress_time = now
            is_silent = exchange is not None and not exchange.has_begun
            shut_time = self._end_of_input_time if is_silent else None
            grace = self._limits.half_close_grace_seconds
            if shut_time is not None and now - shut_time >= grace:
                self.cut(READER_GONE)
            return
        acknowledged = outlet.sent_bytes - outlet.unacknowledged_bytes()
        if acknowledged > self._acknowledged_bytes:
            self._acknowledged_bytes = acknowledged
            self._progress_time = now
        elif now - self._progress_time >= self._limits.progress_timeout_seconds:
            # A reset frees the kernel's buffer too, which a reader that never reads would keep.
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT
            )
            self.cut(SLOW_READER)

    def _cancel(self, reason: str) -> None:
        """Cancel the answer, once: a second time would interrupt the closing of its read."""
        if not self._is_answering or self._task is None or self._is_cut:
            return
        self._is_cut = True
        if self._exchange is not None:
            self._exchange.abort_reason = reason
        # Not before its first step: a task that never ran releases nothing.
        self._loop.call_soon(self._task.cancel)
