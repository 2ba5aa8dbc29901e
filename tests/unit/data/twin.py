"""A catalogue and blobs in memory or in real files: twins of the interfaces, for tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blobcache_agent.data.catalog import (
    Catalog,
    Entry,
    NotReady,
    Observer,
    ReaderAuth,
    Readers,
    ResponseRecord,
    UnknownConfig,
)
from blobcache_agent.data.limits import Limits
from blobcache_agent.data.server import DataServer
from blobcache_agent.data.tokens import AllowAll
from blobcache_storage.cache.base import BlobCache, BlobRead, CacheStatus, FileSpan, Hit, Piece
from blobcache_storage.device import (
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
    Validator,
)
from blobcache_storage.errors import BlobNotFound

ETAG = '"v1"'
LAST_MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"
PIECE_BYTES = 300_000


def content(length: int, seed: int = 7) -> bytes:
    """Return bytes without a short period, so that a shifted or repeated piece shows."""
    period = min(length, 65521)
    block = bytes((i * i * 31 + i * seed + (i >> 8) * 131) & 0xFF for i in range(period))
    return (block * (length // max(1, len(block)) + 1))[:length]


@dataclass
class TwinBlob:
    """One blob; how it is read can be set by a test."""

    data: bytes
    etag: str | None = ETAG
    last_modified: str | None = LAST_MODIFIED
    status: CacheStatus = CacheStatus.HIT
    file: int | None = None
    """A descriptor of a file with the same bytes: pieces are then spans of it."""
    piece_bytes: int = PIECE_BYTES
    read_error: BaseException | None = None
    fail_after: int | None = None
    """Raise `piece_error` once so many bytes were yielded."""
    piece_error: BaseException = field(default_factory=lambda: RuntimeError("the twin's failure"))
    extra: bytes = b""
    """Yielded after the end: a bug of the engine."""
    head_gate: asyncio.Event | None = None
    """`read` waits for it."""
    piece_gate: asyncio.Event | None = None
    """Each piece but the first waits for it."""
    open_reads: int = 0
    total_reads: int = 0
    open_handles: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a read ended, or was cancelled before it began."""

    @property
    def version(self) -> BlobVersion:
        """The only version."""
        validator = Validator.ETAG if self.etag else Validator.NONE
        return BlobVersion(
            len(self.data), validator, self.etag or "", self.etag, self.last_modified
        )


class TwinRead(BlobRead):
    """A read of a TwinBlob."""

    def __init__(self, blob: TwinBlob, span: ByteRange) -> None:
        self.version = blob.version
        self.span = span
        self.status = blob.status
        self._blob = blob
        self._is_open = True
        self._position = span.start
        blob.open_reads += 1
        blob.total_reads += 1

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces of the blob's piece size."""
        blob = self._blob
        while (position := self._position) < self.span.end:
            if position > self.span.start and blob.piece_gate is not None:
                await blob.piece_gate.wait()
            if blob.fail_after is not None and position - self.span.start >= blob.fail_after:
                raise blob.piece_error
            end = self._position = min(position + blob.piece_bytes, self.span.end)
            if blob.file is not None:
                yield FileSpan(blob.file, position, end - position)
            else:
                yield memoryview(blob.data)[position:end]
        if blob.extra:
            yield blob.extra

    def resume(self, position: int) -> None:
        """Go on from there, from memory."""
        self._position, self._blob.file = position, None

    async def aclose(self) -> None:
        """Count."""
        if self._is_open:
            self._is_open = False
            self._blob.open_reads -= 1
            self._blob.closed.set()


class TwinCache(BlobCache):
    """A handle on a TwinBlob, or on none."""

    def __init__(self, blob_id: str, blob: TwinBlob | None) -> None:
        self.blob_id = blob_id
        self._blob = blob
        self._is_open = True
        if blob is not None:
            blob.open_handles += 1

    async def _wait(self) -> TwinBlob:
        blob = self._blob
        if blob is None:
            raise BlobNotFound("the origin has no such blob", status=404)
        if blob.head_gate is not None:
            try:
                await blob.head_gate.wait()
            except asyncio.CancelledError:
                blob.closed.set()
                raise
        if blob.read_error is not None:
            raise blob.read_error
        return blob

    async def read(
        self, request: RangeRequest, *, source: RequestSource = RequestSource.ON_DEMAND
    ) -> BlobRead:
        """Begin a read."""
        blob = await self._wait()
        return TwinRead(blob, request.resolve(len(blob.data)))

    async def stat(self) -> tuple[BlobVersion, CacheStatus]:
        """Return the version."""
        blob = await self._wait()
        return blob.version, blob.status

    def close(self) -> None:
        """Count."""
        if self._is_open and self._blob is not None:
            self._blob.open_handles -= 1
        self._is_open = False


@dataclass
class TwinEntry:
    """One configuration; conforms to Entry."""

    namespace: str = "team"
    name: str = "models"
    readers: Readers = "Namespace"
    blobs: dict[str, TwinBlob] = field(default_factory=dict)

    def open(self, blob_id: str) -> BlobCache:
        """Return a handle."""
        return TwinCache(blob_id, self.blobs.get(blob_id))

    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        """Leave all to reads."""
        return None


@dataclass
class TwinCatalog:
    """Conforms to Catalog."""

    entries: list[TwinEntry] = field(default_factory=list)
    not_ready: NotReady | None = None

    def resolve(self, namespace: str, name: str) -> Entry:
        """Find an entry."""
        if self.not_ready is not None:
            raise self.not_ready
        for entry in self.entries:
            if (entry.namespace, entry.name) == (namespace, name):
                return entry
        raise UnknownConfig


@dataclass
class TwinObserver:
    """Conforms to Observer; remembers."""

    records: list[ResponseRecord] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_response(self, record: ResponseRecord) -> None:
        """Remember."""
        self.records.append(record)
        self._changed.set()

    def on_error(self, error: BaseException) -> None:
        """Remember."""
        self.errors.append(error)

    async def wait_for_records(self, count: int) -> list[ResponseRecord]:
        """Return the records once there are so many."""
        while len(self.records) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.records


@dataclass
class Twin:
    """A running server and what it serves: blobs of team/models."""

    server: DataServer
    entry: TwinEntry
    catalog: TwinCatalog
    observer: TwinObserver
    host: str
    port: int

    def add(self, blob_id: str, blob: TwinBlob) -> TwinBlob:
        """Add a blob."""
        self.entry.blobs[blob_id] = blob
        return blob


@asynccontextmanager
async def running(
    *, auth: ReaderAuth | None = None, limits: Limits | None = None
) -> AsyncIterator[Twin]:
    """Run a server on a free port of loopback; afterwards nothing is left open, or it fails."""
    entry, observer = TwinEntry(), TwinObserver()
    catalog = TwinCatalog([entry])
    _check_conformance(catalog, observer)
    server = DataServer(catalog, auth or AllowAll(), observer, limits or Limits())
    host, port = await server.start("127.0.0.1", 0)
    try:
        yield Twin(server, entry, catalog, observer, host, port)
    finally:
        await server.stop(grace_seconds=0)
    assert server.connections == 0
    for blob_id, blob in entry.blobs.items():
        assert (blob.open_reads, blob.open_handles) == (0, 0), f"{blob_id} was not closed"


def _check_conformance(catalog: Catalog, observer: Observer) -> None:
    """Have mypy compare the twins with the protocols."""


@contextmanager
def file_of(data: bytes, folder: Path) -> Iterator[int]:
    """Yield a descriptor of a file with these bytes."""
    path = folder / "data"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


LIMITS_SHORT = Limits(
    head_timeout_seconds=0.3,
    idle_timeout_seconds=0.6,
    progress_timeout_seconds=0.4,
    half_close_grace_seconds=0.3,
    linger_seconds=0.3,
)
"""Time-outs that a test can wait for; none is a bound on how fast the machine must be."""
