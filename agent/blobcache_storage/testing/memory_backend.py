"""A backend in memory: the twin that cache tests fetch from, faulty on command."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from typing_extensions import override

from blobcache_storage.backend.base import (
    BlobBackend,
    FetchStream,
    check_expected,
    resolve_span,
)
from blobcache_storage.backend.blob_id import canonical_digest, check_path_id
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import Pending
from blobcache_storage.device import (
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
    Validator,
)
from blobcache_storage.errors import (
    BackendError,
    BlobNotFound,
    CredentialsPending,
    OriginUnreachable,
    StorageError,
)

PIECE_SIZE_BYTES_DEFAULT = 64 * 1024


@dataclass(slots=True)
class Fault:
    """What goes wrong with one fetch; the default goes wrong in nothing."""

    error: StorageError | None = None
    """Raised in place of a head."""
    latency_seconds: float = 0.0
    """Before the head."""
    hold_head: asyncio.Event | None = None
    """Waited for before the head: a latency that a test ends itself."""
    cut_after_bytes: int | None = None
    """The body breaks off with `cut_error` after so many bytes."""
    cut_error: BackendError = field(
        default_factory=lambda: OriginUnreachable("the connection was reset in the body")
    )
    hold_body: asyncio.Event | None = None
    """Waited for once `hold_after_bytes` bytes of the body were sent."""
    hold_after_bytes: int = 0
    corrupt_at: int | None = None
    """Blob offset of a byte sent with its bits turned."""
    replace_with: tuple[bytes, str] | None = None
    """New data and entity tag which the blob has from just before this answer."""
    whole: bool = False
    """Answer a range from offset 0 with the whole blob, as a 200 does."""


@dataclass(frozen=True, slots=True)
class FetchRecord:
    """One fetch that reached the origin."""

    blob_id: str
    request: RangeRequest
    expect: BlobVersion | None
    source: RequestSource


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    version: BlobVersion


class MemoryStream(FetchStream):
    """A body in memory, sent in pieces, counted as they leave."""

    def __init__(self, backend: MemoryBackend, stored: _Object, span: ByteRange, fault: Fault):
        self.version = stored.version
        self.span = span
        self._backend = backend
        self._data = stored.data
        self._fault = fault
        self._body: AsyncGenerator[bytes, None] | None = None
        self.closed = False
        self.promoted = False
        backend.open_streams += 1

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._body is None:
            self._body = self._pieces()
        return self._body

    @override
    def promote(self) -> None:
        self.promoted = True

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        fault, sent = self._fault, 0
        stops = sorted(
            stop
            for stop in (fault.cut_after_bytes, fault.hold_after_bytes if fault.hold_body else None)
            if stop is not None and stop <= self.span.length
        )
        while True:
            if fault.hold_body is not None and sent >= fault.hold_after_bytes:
                await fault.hold_body.wait()
            if fault.cut_after_bytes is not None and sent >= fault.cut_after_bytes:
                raise fault.cut_error
            if sent == self.span.length:
                return
            await asyncio.sleep(0)
            until = min(sent + self._backend.piece_size_bytes, self.span.length)
            until = min([until, *(stop for stop in stops if stop > sent)])
            piece = self._piece(self.span.start + sent, self.span.start + until)
            self._backend.bytes_sent += len(piece)
            sent = until
            yield piece

    def _piece(self, start: int, end: int) -> bytes:
        piece, at = self._data[start:end], self._fault.corrupt_at
        if at is not None and start <= at < end:
            wrong = bytearray(piece)
            wrong[at - start] ^= 0xFF
            return bytes(wrong)
        return piece

    @override
    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            self._backend.open_streams -= 1
            if self._body is not None:
                await self._body.aclose()


class MemoryBackend(BlobBackend):
    """Blobs in a dict, with the contract of a real origin.

    Args:
        digest_ids: Blob ids are `sha256:<hex>` or bare hex and name their bytes, as a registry's.
        piece_size_bytes: Largest piece a body is yielded in.
    """

    def __init__(
        self, *, digest_ids: bool = False, piece_size_bytes: int = PIECE_SIZE_BYTES_DEFAULT
    ) -> None:
        self.digest_ids = digest_ids
        self.piece_size_bytes = piece_size_bytes
        self.latency_seconds = 0.0
        self.pending = False
        """Whether misses fail with CredentialsPending."""
        self.down: StorageError | None = None
        """While set, every request fails with it."""
        self.requests = 0
        """Fetches and stats that reached the origin."""
        self.bytes_sent = 0
        self.stats_asked = 0
        self.open_streams = 0
        self.fetches: list[FetchRecord] = []
        self.reconfigured: list[BackendConfig] = []
        self.is_shut_down = False
        self._objects: dict[str, _Object] = {}
        self._next: deque[Fault] = deque()
        self._by_number: dict[int, Fault] = {}

    def put(
        self,
        blob_id: str,
        data: bytes,
        etag: str | None = "auto",
        *,
        last_modified: str | None = None,
    ) -> BlobVersion:
        """Store a blob, replacing any.

        Args:
            etag: Strong tag with its quotes; "auto" derives one from the bytes; None has none.
            last_modified: The validator where there is no tag; with neither, not cacheable.
        """
        digest = hashlib.sha256(data).hexdigest()
        if self.digest_ids:
            tag = f'"sha256:{digest}"'
            named = canonical_digest(blob_id)
            version = BlobVersion(len(data), Validator.DIGEST, named, tag, last_modified)
        else:
            tag_or_none = f'"{digest[:32]}"' if etag == "auto" else etag
            if tag_or_none is not None:
                found = (Validator.ETAG, tag_or_none)
            elif last_modified is not None:
                found = (Validator.LAST_MODIFIED, last_modified)
            else:
                found = (Validator.NONE, "")
            version = BlobVersion(len(data), *found, tag_or_none, last_modified)
        self._objects[self.check_blob_id(blob_id)] = _Object(data, version)
        return version

    def remove(self, blob_id: str) -> None:
        """Delete a blob."""
        del self._objects[self.check_blob_id(blob_id)]

    def fail_next(self, *faults: Fault | StorageError) -> None:
        """Apply one fault to each of the next fetches, in order."""
        self._next.extend(f if isinstance(f, Fault) else Fault(error=f) for f in faults)

    def fail_on(self, number: int, fault: Fault | StorageError) -> None:
        """Apply a fault to the `number`-th request of this backend's life, from 1."""
        self._by_number[number] = fault if isinstance(fault, Fault) else Fault(error=fault)

    def _take_fault(self) -> Fault:
        self.requests += 1
        if self.requests in self._by_number:
            return self._by_number.pop(self.requests)
        return self._next.popleft() if self._next else Fault()

    async def _head(self, blob_id: str, fault: Fault) -> _Object:
        delay = self.latency_seconds + fault.latency_seconds
        await asyncio.sleep(delay)
        if fault.hold_head is not None:
            await fault.hold_head.wait()
        if self.down is not None:
            raise self.down
        if fault.error is not None:
            raise fault.error
        if fault.replace_with is not None:
            self.put(blob_id, *fault.replace_with)
        if blob_id not in self._objects:
            raise BlobNotFound(f"the origin has no blob '{blob_id}'", status=404)
        return self._objects[blob_id]

    @override
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        blob_id = self.check_blob_id(blob_id)
        if self.pending:
            raise CredentialsPending("the credentials have not arrived yet")
        fault = self._take_fault()
        self.fetches.append(FetchRecord(blob_id, request, expect, source))
        stored = await self._head(blob_id, fault)
        check_expected(blob_id, stored.version, expect)
        span = resolve_span(request, stored.version.size_bytes)
        if fault.whole and span.start == 0:
            span = ByteRange(0, stored.version.size_bytes)
        return MemoryStream(self, stored, span, fault)

    @override
    async def stat(self, blob_id: str) -> BlobVersion:
        blob_id = self.check_blob_id(blob_id)
        if self.pending:
            raise CredentialsPending("the credentials have not arrived yet")
        fault = self._take_fault()
        self.stats_asked += 1
        return (await self._head(blob_id, fault)).version

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return canonical_digest(blob_id) if self.digest_ids else check_path_id(blob_id)

    @override
    def digest_of(self, blob_id: str) -> str | None:
        return canonical_digest(blob_id) if self.digest_ids else None

    @override
    def reconfigure(self, config: BackendConfig) -> None:
        self.pending = isinstance(config.credentials, Pending)
        self.reconfigured.append(config)

    @override
    async def shutdown(self) -> None:
        self.is_shut_down = True
