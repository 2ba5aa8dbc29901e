"""The interfaces of caches and their managers.

Nydus: `BlobCache`, `BlobCacheMgr` (storage/src/cache/mod.rs).
"""

from __future__ import annotations

import abc
import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blobcache_storage.config import ConfigV2
from blobcache_storage.device import BlobInfo, BlobVersion, ByteRange, RangeRequest, RequestSource


class CacheStatus(enum.Enum):
    """How a read was answered, in the words of RFC 9211; the value is the header's parameters."""

    HIT = "hit"
    MISS_STORED = "fwd=miss; stored"
    MISS = "fwd=miss"
    PARTIAL_STORED = "fwd=partial; stored"
    BYPASS = "fwd=bypass"


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Verified, durable bytes of an open data file, ready for `sendfile`.

    The descriptor stays open until the read is closed. It must not be written or closed.
    """

    fd: int
    offset: int
    length: int


Piece = bytes | memoryview | FileSpan
"""What a read yields: bytes that were checked for this serve, or a span of a verified file."""


class BlobRead(abc.ABC):
    """One read under way. Its head is known; `pieces` yields the bytes, in order, once.

    Use as an async context manager. While it is open its blob is in use and not evicted.
    """

    version: BlobVersion
    span: ByteRange
    status: CacheStatus

    @abc.abstractmethod
    def pieces(self) -> AsyncIterator[Piece]:
        """Yield exactly `span.length` bytes, in order.

        Raises:
            StorageError: The rest cannot be had. What was yielded is right; the answer must be
                closed short, never padded.
        """

    def file_span(self) -> FileSpan | None:
        """Return the whole read as one span of a verified file, if it is all there, or None.

        A short cut for hits, taken before `pieces` and instead of it: after a span was returned
        `pieces` yields nothing more. Never waits.
        """
        return None

    def span_failed(self, span: FileSpan, sent_bytes: int) -> bool:
        """Tell that the last span yielded could not be read from its file to the end.

        Args:
            sent_bytes: How many of its bytes were sent all the same.

        Returns:
            Whether `pieces` goes on with the first byte that was not; else the answer must be
            closed short.
        """
        del span, sent_bytes
        return False

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release the blob; fetches nobody else waits for end. Safe to call twice."""

    async def __aenter__(self) -> Self:
        """Return the read."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the blob."""
        await self.aclose()


class Hit(abc.ABC):
    """Verified bytes of a file, found without a wait and without a handle.

    It holds nothing: `fd` is good until whoever found it gives the loop its turn. By then one of
    `done` and `rest` has been called, once, or none if nothing was sent: then nothing was read.
    """

    __slots__ = ("end", "fd", "start", "version")

    version: BlobVersion
    fd: int
    """The blob's bytes, at their own offsets."""
    start: int
    end: int
    """Exclusive."""

    @abc.abstractmethod
    def done(self) -> None:
        """Count a read all of whose bytes were sent."""

    @abc.abstractmethod
    def rest(self, sent_bytes: int) -> BlobRead:
        """Count a read and return what is left of it after so many bytes, at least one."""


class BlobCache(abc.ABC):
    """One blob through one manager: a counted handle, to be closed by who asked for it."""

    blob_id: str

    @abc.abstractmethod
    async def read(
        self, request: RangeRequest, *, source: RequestSource = RequestSource.ON_DEMAND
    ) -> BlobRead:
        """Begin a read and return once its head (version, span, status) is known.

        Raises:
            RangeNotSatisfiable: No byte of the range exists.
            StorageError: The blob cannot be read.
        """

    @abc.abstractmethod
    async def stat(self) -> tuple[BlobVersion, CacheStatus]:
        """Return the version a read would get, asking the origin only if none is cached."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give the handle back; idempotent."""

    def __enter__(self) -> Self:
        """Return the handle."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the handle back."""
        self.close()


@dataclass(frozen=True, slots=True)
class BlobUsage:
    """One cached blob as eviction sees it."""

    blob_id: str
    version: str
    """Opaque name of the cached version (its generation): eviction names it back."""
    bytes: int
    """On disk: present chunks and the map."""
    last_read_time: float
    """Unix seconds of the last read."""
    in_use: bool
    pinned: bool
    wanted: bool
    """On the prefetch list."""
    complete: bool


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """What a manager holds and did since the process started. Byte counts, never ratios."""

    bytes: int = 0
    blobs: int = 0
    requests: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    origin_bytes: int = 0
    origin_requests: int = 0
    origin_errors: int = 0
    evicted_bytes: int = 0
    evicted_blobs: int = 0
    prefetch_blobs: int = 0
    prefetch_blobs_ready: int = 0
    prefetch_bytes: int = 0
    prefetch_bytes_ready: int = 0
    prefetch_problem: str = ""
    """"" or a reason such as PrefetchExceedsCapacity, with a message after a colon."""
    degraded_reason: str = ""
    """"" or the reason of the latest failure not followed by a success."""
    degraded_message: str = ""


@dataclass(frozen=True, slots=True)
class Victim:
    """A blob to evict, if it is still the one that was decided on."""

    blob_id: str
    version: str
    last_read_before: float
    """Spare it if it was read at or after this time (unix seconds)."""
    reason: str = ""


class EvictionOutcome(enum.Enum):
    """What became of a victim."""

    EVICTED = "evicted"
    IN_USE = "inUse"
    PINNED = "pinned"
    CHANGED = "changed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class EvictionResult:
    """A victim's outcome, with the bytes freed (0 unless evicted)."""

    blob_id: str
    outcome: EvictionOutcome
    bytes: int = 0


class BlobCacheMgr(abc.ABC):
    """All blobs of one configuration."""

    @abc.abstractmethod
    def init(self) -> None:
        """Start background work (prefetch); called once, by the factory."""

    @abc.abstractmethod
    def get_blob_cache(self, blob_info: BlobInfo) -> BlobCache:
        """Return a handle on a blob. No network, no disk: the blob is opened when it is read.

        Raises:
            InvalidBlobId: The backend can have no such blob.
        """

    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        """Return bytes that `read` would answer as a hit from the file, if it can be told at once.

        Args:
            blob_id: As a reader names it.
            first: Offset of the first byte.
            last: Offset of the last one, which may lie beyond the blob's end; None for all.

        Returns:
            None where there is anything to wait for, to fetch or to refuse: `read` does it.
        """
        del blob_id, first, last
        return None

    @abc.abstractmethod
    def gc(self, blob_id: str | None) -> bool:
        """Close and drop what nobody uses (one blob, or all); delete nothing from disk.

        Returns:
            Whether the manager now holds no blob, so that the factory may drop it. Always
            False while it is retained (`retain`).
        """

    @abc.abstractmethod
    def check_stat(self) -> None:
        """Look after itself; called every 5 s by the factory's checker."""

    @abc.abstractmethod
    def reconfigure(self, config: ConfigV2) -> None:
        """Take what may change in place: credentials, limits, capacity, prefetch, pins."""

    @abc.abstractmethod
    def stats(self) -> ManagerStats:
        """Return what it holds and did."""

    @abc.abstractmethod
    def usage(self) -> Sequence[BlobUsage]:
        """Return every cached blob, in no order."""

    @abc.abstractmethod
    async def evict(self, victims: Sequence[Victim]) -> list[EvictionResult]:
        """Delete data of victims that are still unused, unpinned and of that version."""

    @abc.abstractmethod
    async def destroy(self) -> None:
        """Stop background work, finish writing, close files and the backend; idempotent."""
