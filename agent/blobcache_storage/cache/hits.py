"""Hits that need no wait: the short way to bytes that are verified and lie in a file.

What is found here is what `FileCacheMgr.read` would find; whatever is not as plain is left to it.
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import override

from blobcache_storage.cache.base import BlobRead, CacheStatus, Hit
from blobcache_storage.cache.fill import Origin
from blobcache_storage.cache.generation import Generation
from blobcache_storage.cache.table import BlobTable
from blobcache_storage.device import ByteRange
from blobcache_storage.errors import InvalidBlobId


class HitOwner(Protocol):
    """What a hit needs of its manager."""

    origin: Origin
    table: BlobTable

    def canonical(self, blob_id: str) -> str:
        """Return the canonical form of an id, or raise InvalidBlobId."""

    def is_quarantined(self, blob_id: str) -> bool:
        """Whether a blob is refused."""

    def expected_sha256(self, blob_id: str) -> bytes | None:
        """Return the digest a blob must have, if any."""

    def ahead_end(self, generation: Generation, start: int, end: int) -> int:
        """Note a read of `[start, end)`; return up to which chunk to fetch if it must be."""

    def new_read(
        self, generation: Generation, span: ByteRange, status: CacheStatus, *, ahead_end: int
    ) -> BlobRead:
        """Return a read, which holds the generation from now on."""


def find_hit(owner: HitOwner, blob_id: str, first: int, last: int | None) -> Hit | None:
    """Return verified bytes of a blob; see `BlobCacheMgr.hit`."""
    generation = owner.table.current(blob_id) or _current(owner, blob_id)
    if generation is None or owner.is_quarantined(generation.entry.blob_id):
        return None
    size, chunk_size = generation.version.size_bytes, generation.chunk_size_bytes
    end = size if last is None or last >= size else last + 1
    if first >= end:
        return None
    chunks_end = (end - 1) // chunk_size + 1
    if generation.verified_end(first // chunk_size, chunks_end) != chunks_end:
        return None
    if end - first == size:
        sha256 = owner.expected_sha256(generation.entry.blob_id)
        if sha256 is not None and generation.whole_sha256 != sha256:
            return None
    return FileHit(owner, generation, first, end)


def _current(owner: HitOwner, blob_id: str) -> Generation | None:
    """Return the open generation of a blob that is named in another form than the canonical."""
    try:
        return owner.table.current(owner.canonical(blob_id))
    except InvalidBlobId:
        return None


class FileHit(Hit):
    """A span of chunks that are all verified."""

    __slots__ = ("_generation", "_owner")

    def __init__(self, owner: HitOwner, generation: Generation, start: int, end: int) -> None:
        self.version = generation.version
        self.fd = generation.files.data_fd
        self.start = start
        self.end = end
        self._owner = owner
        self._generation = generation

    @override
    def done(self) -> None:
        self._count(self.end - self.start)

    @override
    def rest(self, sent_bytes: int) -> BlobRead:
        ahead_end = self._count(sent_bytes)
        rest = ByteRange(self.start + sent_bytes, self.end)
        return self._owner.new_read(self._generation, rest, CacheStatus.HIT, ahead_end=ahead_end)

    def _count(self, sent_bytes: int) -> int:
        """Count a read, and those of its bytes that were sent."""
        owner, generation = self._owner, self._generation
        counters = owner.origin.counters
        counters.requests += 1
        counters.hit_bytes += sent_bytes
        owner.table.touch(generation)
        return owner.ahead_end(generation, self.start, self.end)
