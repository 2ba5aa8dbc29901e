"""Every byte served is compared with what it must be.

A response's bytes must be those of the one version which its head names, or it must fail visibly:
by an error, or by ending short as a `sendfile` does which the file cannot satisfy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from blobcache_storage.cache.base import BlobCache, BlobRead, CacheStatus, FileSpan, Piece
from blobcache_storage.device import RangeRequest, RequestSource
from blobcache_storage.errors import StorageError
from blobcache_storage.testing.oracle import ByteOracle


@dataclass(frozen=True, slots=True)
class Truth:
    """Where the oracle has the bytes of one version of a blob."""

    name: str
    number: int
    size_bytes: int


class ServedWrong(AssertionError):
    """A byte was served that is not the blob's."""


@dataclass(slots=True)
class ByteChecker:
    """Reads blobs and counts.

    Args:
        oracle: What the bytes are.
        strict: Raise at the first wrong byte rather than count it.
    """

    oracle: ByteOracle
    strict: bool = False
    truths: dict[tuple[str, str], Truth] = field(default_factory=dict)
    """By blob id and the version's token."""
    reads: int = 0
    bytes_checked: int = 0
    bytes_from_files: int = 0
    hits: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Reads that failed visibly."""

    def know(self, blob_id: str, token: str, truth: Truth) -> None:
        """Learn of a version."""
        self.truths[blob_id, token] = truth

    async def read(
        self,
        cache: BlobCache,
        request: RangeRequest | None = None,
        *,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> int:
        """Read a range as the data API does and check it.

        Returns:
            How many right bytes were served; fewer than asked for after a visible failure.
        """
        request, self.reads, done = request or RangeRequest(), self.reads + 1, 0
        try:
            async with await cache.read(request, source=source) as read:
                self.hits += read.status is CacheStatus.HIT
                truth = self.truths.get((cache.blob_id, read.version.token))
                if truth is None:
                    self._note_wrong(f"{cache.blob_id}: unknown version {read.version.token}")
                    return 0
                if read.span != request.resolve(truth.size_bytes):
                    self._note_wrong(f"{cache.blob_id}: span {read.span} of {request}")
                done = await self._check(read, truth)
        except StorageError as error:
            self.failed.append(f"{cache.blob_id}: {error.reason}: {error}")
        return done

    async def _check(self, read: BlobRead, truth: Truth) -> int:
        position, span = read.span.start, read.file_span()
        if span is not None:
            position += self._take(span, position, truth)
            sent = position - span.offset
            if sent < span.length and not read.span_failed(span, sent):
                self.failed.append(f"{truth.name}: sendfile: the file ended")
                return sent
        async for piece in read.pieces():
            taken = self._take(piece, position, truth)
            position += taken
            if not isinstance(piece, FileSpan) or taken == piece.length:
                continue
            if not read.span_failed(piece, taken):
                self.failed.append(f"{truth.name}: sendfile: the file ended")
                return position - read.span.start
        if position != read.span.end:
            self._note_wrong(f"{truth.name}: ended at {position} of {read.span} without an error")
        return position - read.span.start

    def _take(self, piece: Piece, position: int, truth: Truth) -> int:
        """Check a piece; returns its length, or less where a file could not satisfy it."""
        if not isinstance(piece, FileSpan):
            data = bytes(piece)
        else:
            try:
                data = os.pread(piece.fd, piece.length, piece.offset)
            except OSError:
                data = b""
            self.bytes_from_files += len(data)
            if piece.offset != position:
                self._note_wrong(f"{truth.name}: file offset {piece.offset}, not {position}")
        wrong = self.oracle.first_wrong(truth.name, truth.number, position, data)
        self.bytes_checked += len(data)
        if wrong is not None:
            self._note_wrong(f"{truth.name}: byte {wrong} of version {truth.number}")
        return len(data)

    def _note_wrong(self, what: str) -> None:
        self.wrong.append(what)
        if self.strict:
            raise ServedWrong(what)
