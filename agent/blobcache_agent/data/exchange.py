"""One request and its answer, from the parsed head to the last byte of the body."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from blobcache_agent.data import conditions
from blobcache_agent.data.answer import DocumentAnswer, Service, document_head
from blobcache_agent.data.blob_path import parse_blob_path
from blobcache_agent.data.catalog import Catalog, Observer, ReaderAuth, ResponseRecord
from blobcache_agent.data.conditions import Verdict
from blobcache_agent.data.dates import DateClock
from blobcache_agent.data.lane import Begun
from blobcache_agent.data.outlet import Outlet, ReaderGone, piece_bytes
from blobcache_agent.data.ranges import parse_range
from blobcache_agent.data.rejection import Rejection
from blobcache_agent.data.request import Request, parse_head
from blobcache_agent.data.responses import INTERNAL_ERROR, blob_head, error_response, failure_of
from blobcache_storage.cache.base import BlobCache, BlobRead, CacheStatus, FileSpan
from blobcache_storage.device import BlobVersion, ByteRange, RangeRequest
from blobcache_storage.errors import DiskError, RangeNotSatisfiable

READER_GONE_STATUS = 499
"""In records only: the reader left before a head could be sent."""
READER_GONE = "ReaderGone"


Head = bytes | Rejection | Begun
"""What an answer is wanted for: a request, what should have been one, or one half answered."""


@dataclass(frozen=True, slots=True)
class Services:
    """What all connections of a server share."""

    catalog: Catalog
    auth: ReaderAuth
    observer: Observer
    clock: DateClock
    service: Service | None = None
    """Answers what is not below `/v1/blobs`, if anybody does."""


class ShortRead(Exception):
    """A read yielded more or fewer bytes than its span has: a bug, and never to be padded."""


class Exchange:
    """One request and its answer. `run` is called once; afterwards `keep_alive` is known."""

    def __init__(self, services: Services, outlet: Outlet) -> None:
        self._services = services
        self._outlet = outlet
        self._start_time = time.monotonic()
        self._method: Literal["GET", "HEAD", ""] = ""
        self._is_http_1_0 = False
        self._namespace = ""
        self._name = ""
        self._blob_id = ""
        self._cache_status = ""
        self._status = READER_GONE_STATUS
        """Of the head that is being sent; means nothing before `has_begun`."""
        self._sent_before_bytes = outlet.sent_bytes
        self._reason = ""
        self._body_bytes = 0
        self._service: Service | None = None
        """Set where it answers instead of us."""
        self._more_headers = ""
        self._aborted = False
        self.keep_alive = False
        self.abort_reason = ""
        """Set by who cancels `run`: why the answer was cut short."""

    @property
    def has_begun(self) -> bool:
        """Whether a head was handed to the socket, at least in part."""
        return self._outlet.sent_bytes > self._sent_before_bytes

    async def run(self, head: Head, *, may_keep_alive: bool) -> None:
        """Answer a head, or the rejection of what should have been one, or end what was begun.

        Returns when the answer was sent, cut short or given up; `is_aborted` tells.

        Args:
            head: Up to and with the empty line.
            may_keep_alive: Whether the server would answer another request.
        """
        try:
            await self._answer(head, may_keep_alive)
        except asyncio.CancelledError:
            self._cut_short(self.abort_reason or READER_GONE)
            raise
        except ReaderGone:
            self._cut_short(READER_GONE)
        finally:
            self._record()

    @property
    def is_aborted(self) -> bool:
        """Whether the connection must end here and now, without another byte."""
        return self._aborted

    async def _answer(self, head: Head, may_keep_alive: bool) -> None:
        """Answer, turning errors into error answers as long as no head was sent."""
        try:
            if isinstance(head, Begun):
                self.keep_alive = may_keep_alive
                await self._go_on(head)
                return
            request = _request_of(head)
            self._method = "HEAD" if request.method == "HEAD" else "GET"
            self._is_http_1_0 = request.is_http_1_0
            self.keep_alive = request.keep_alive and may_keep_alive
            await self._serve(request)
        except ReaderGone:
            raise
        except Exception as error:
            self._service = self._service or self._owner_of(head)
            await self._fail(error)

    async def _serve(self, request: Request) -> None:
        """Find the blob, check the reader, send."""
        services = self._services
        if services.service is not None and services.service.owns(request.path):
            await self._serve_for(services.service, request)
            return
        path = parse_blob_path(request.path)
        authorization = request.headers.get(b"authorization")
        services.auth.admit(authorization)
        entry = services.catalog.resolve(path.namespace, path.name)
        self._namespace, self._name = path.namespace, path.name
        services.auth.check(authorization, entry)
        self._blob_id = path.blob_id
        with entry.open(path.blob_id) as cache:
            if request.method == "HEAD":
                await self._answer_head(request, cache)
            else:
                await self._answer_get(request, cache)

    async def _go_on(self, begun: Begun) -> None:
        """Send the rest of an answer."""
        self._method, self._cache_status = "GET", begun.read.status.value
        self._namespace, self._name = begun.path.namespace, begun.path.name
        self._blob_id = begun.path.blob_id
        self._start_time = begun.start_time
        self._sent_before_bytes -= begun.taken_bytes
        self._body_bytes = begun.body_bytes
        self._status = begun.status
        async with begun.read as read:
            await self._send_body(read, (begun.status, begun.head_left))

    def _owner_of(self, head: Head) -> Service | None:
        """Return whose words say what is wrong with a request that could not be parsed."""
        service = self._services.service
        if service is None or not isinstance(head, bytes):
            return None
        target = head.partition(b" ")[2].partition(b" ")[0]
        return service if service.owns(target.decode("latin-1")) else None

    async def _serve_for(self, service: Service, request: Request) -> None:
        """Send what another service answers; who may read is its business."""
        self._service = service
        async with service.answering(request) as answer:
            self._more_headers = answer.headers
            if isinstance(answer, DocumentAnswer):
                self._namespace, self._name = answer.namespace, answer.name
                self._blob_id = answer.blob_id
                await self._send_document(request, answer)
                return
            self._namespace, self._name = answer.entry.namespace, answer.entry.name
            self._blob_id = answer.blob_id
            with answer.entry.open(answer.blob_id) as cache:
                if request.method == "HEAD":
                    await self._answer_head(request, cache)
                else:
                    await self._answer_get(request, cache)

    async def _send_document(self, request: Request, answer: DocumentAnswer) -> None:
        """Send a body from memory; a Range is ignored, as section 14.2 permits."""
        if answer.version is not None and answer.cache_status is not None:
            verdict = conditions.evaluate(request.headers, answer.version)
            if verdict is not Verdict.PROCEED:
                await self._send_verdict(verdict, answer.version, answer.cache_status)
                return
            self._cache_status = answer.cache_status.value
        self._status = 200
        head = document_head(
            answer, date=self._services.clock.now(), connection=self._connection_header()
        )
        body = b"" if request.method == "HEAD" else answer.body
        before = self._outlet.sent_bytes
        try:
            await self._outlet.send(body, head)
        finally:
            self._body_bytes = max(0, self._outlet.sent_bytes - before - len(head))

    async def _answer_head(self, request: Request, cache: BlobCache) -> None:
        """HEAD: what a GET without Range would say (RFC 9110 section 14.2)."""
        version, cache_status = await cache.stat()
        verdict = conditions.evaluate(request.headers, version)
        if verdict is not Verdict.PROCEED:
            await self._send_verdict(verdict, version, cache_status)
            return
        whole = ByteRange(0, version.size_bytes)
        await self._send_head(self._blob_head(200, version, cache_status, whole))

    async def _answer_get(self, request: Request, cache: BlobCache) -> None:
        """GET, with the precedence of RFC 9110 section 13.2.2: conditions, If-Range, Range."""
        wanted = parse_range(request.headers.get(b"range"))
        if wanted is not None:
            try:
                read = await cache.read(wanted)
            except RangeNotSatisfiable as error:
                if await self._answer_unsatisfiable(request, cache, error):
                    return
            else:
                async with read:
                    if await self._send_read(request, read, is_ranged=True):
                        return
        async with await cache.read(RangeRequest()) as read:
            await self._send_read(request, read, is_ranged=False)

    async def _answer_unsatisfiable(
        self, request: Request, cache: BlobCache, error: RangeNotSatisfiable
    ) -> bool:
        """Handle an unsatisfiable Range, which counts only if the conditions let it.

        Returns:
            False if the whole blob is to be sent, since If-Range does not match.

        Raises:
            RangeNotSatisfiable: It does count.
        """
        if conditions.is_conditional(request.headers):
            version, cache_status = await cache.stat()
            verdict = conditions.evaluate(request.headers, version)
            if verdict is not Verdict.PROCEED:
                await self._send_verdict(verdict, version, cache_status)
                return True
            if not conditions.range_applies(request.headers, version):
                return False
        raise error

    async def _send_read(self, request: Request, read: BlobRead, *, is_ranged: bool) -> bool:
        """Send a read, or what the conditions say of its version.

        Returns:
            False, with nothing sent, if If-Range asks for the whole blob instead.
        """
        verdict = conditions.evaluate(request.headers, read.version)
        if verdict is not Verdict.PROCEED:
            await self._send_verdict(verdict, read.version, read.status)
            return True
        if is_ranged and not conditions.range_applies(request.headers, read.version):
            return False
        head = self._blob_head(206 if is_ranged else 200, read.version, read.status, read.span)
        if read.span.length == 0:
            await self._send_head(head)
        else:
            await self._send_body(read, head)
        return True

    async def _send_body(self, read: BlobRead, head: tuple[int, bytes]) -> None:
        """Send head and body. The head waits for the first piece: until then a read may fail
        with a proper error, and small answers leave in one write."""
        status, head_bytes = head
        left = read.span.length
        async for piece in read.pieces():
            if piece_bytes(piece) > left:
                raise ShortRead("a read yielded more bytes than its span has")
            self._status = status
            before, sent = self._outlet.sent_bytes, 0
            try:
                await self._outlet.send(piece, head_bytes)
            except DiskError:
                sent = max(0, self._outlet.sent_bytes - before - len(head_bytes))
                if not isinstance(piece, FileSpan) or not read.span_failed(piece, sent):
                    raise
            else:
                sent = piece_bytes(piece)
            finally:
                taken = self._outlet.sent_bytes - before
                self._body_bytes += max(0, taken - len(head_bytes))
            left -= sent
            head_bytes = head_bytes[taken:]
        if left:
            raise ShortRead("a read ended before its span did")

    async def _send_verdict(
        self, verdict: Verdict, version: BlobVersion, cache_status: CacheStatus
    ) -> None:
        """Send a 304 or 412, which have no body."""
        if verdict is Verdict.FAILED:
            self._reason = "PreconditionFailed"
        await self._send_head(self._blob_head(verdict.value, version, cache_status, None))

    async def _send_head(self, head: tuple[int, bytes]) -> None:
        """Send an answer that is all head."""
        self._status, head_bytes = head
        await self._outlet.send(head_bytes)

    async def _fail(self, error: Exception) -> None:
        """Say what went wrong; if a head was sent already, cut the body short instead."""
        failure = failure_of(error)
        if failure is None:
            self._services.observer.on_error(error)
            failure = INTERNAL_ERROR
        self._reason = failure.reason
        if self.has_begun:
            self._cut_short(failure.reason)
            return
        if failure.close:
            self.keep_alive = False
        head, body = error_response(
            failure,
            date=self._services.clock.now(),
            connection=self._connection_header(),
            document=None if self._service is None else self._service.error_document(failure),
        )
        self._status = failure.status
        if self._method == "HEAD":
            body = b""
        await self._outlet.send(body, head)
        self._body_bytes = len(body)

    def _blob_head(
        self, status: int, version: BlobVersion, cache_status: CacheStatus, span: ByteRange | None
    ) -> tuple[int, bytes]:
        """Return status and head."""
        self._cache_status = cache_status.value
        return status, blob_head(
            status,
            version,
            cache_status,
            span,
            date=self._services.clock.now(),
            connection=self._more_headers + self._connection_header(),
        )

    def _connection_header(self) -> str:
        """Say what happens to the connection, where the version's default does not."""
        if not self.keep_alive:
            return "Connection: close\r\n"
        return "Connection: keep-alive\r\n" if self._is_http_1_0 else ""

    def _cut_short(self, reason: str) -> None:
        """Note that the answer ends early, or never begins."""
        self._aborted = True
        self.keep_alive = False
        self._reason = reason

    def _record(self) -> None:
        """Tell the observer."""
        self._services.observer.on_response(
            ResponseRecord(
                method=self._method,
                status=self._status if self.has_begun else READER_GONE_STATUS,
                reason=self._reason,
                namespace=self._namespace,
                name=self._name,
                blob_id=self._blob_id,
                cache_status=self._cache_status,
                bytes_sent=self._body_bytes,
                duration_seconds=time.monotonic() - self._start_time,
                aborted=self._aborted,
            )
        )


def _request_of(head: bytes | Rejection) -> Request:
    """Parse a head, or raise why there is none."""
    if isinstance(head, Rejection):
        raise head
    return parse_head(head)
