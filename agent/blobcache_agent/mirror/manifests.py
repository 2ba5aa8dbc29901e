"""Manifests: read whole, checked, and told apart by what they say they are.

A manifest's media type is part of its answer and not of its bytes, yet every kind of manifest
can be told by its content: so it needs not be kept, and is right also from a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from blobcache_storage.backend.registry import MANIFEST_BYTES_MAX, MANIFEST_TYPES
from blobcache_storage.cache.base import BlobCache, CacheStatus, FileSpan, Piece
from blobcache_storage.device import BlobVersion, RangeRequest
from blobcache_storage.errors import (
    CacheBusy,
    DigestMismatch,
    DiskError,
    OriginProtocolError,
)

HELD_BYTES_MAX = 64 * 1024 * 1024
"""Manifests in memory at a time, those being sent included; beyond that: busy."""
INLINE_BYTES_MAX = 256 * 1024
"""Larger ones are hashed and parsed by a thread."""

_INDEX, _MANIFEST = MANIFEST_TYPES[:2]
_SCHEMA1_SIGNED, _SCHEMA1 = MANIFEST_TYPES[-2:]
_MEDIA_TYPE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
)
_UNKNOWN = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose digest was compared."""

    body: bytes
    media_type: str
    version: BlobVersion
    cache_status: CacheStatus


def media_type_of(body: bytes) -> str:
    """Return a manifest's media type: what it says, else what only that kind has.

    OCI image-spec: `mediaType` is recommended; an index has `manifests`, an image `config` and
    `layers`. Docker schema 1 has neither, but a schemaVersion of 1.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return _UNKNOWN
    if not isinstance(document, dict):
        return _UNKNOWN
    said = document.get("mediaType")
    if isinstance(said, str) and _MEDIA_TYPE.fullmatch(said):
        return said
    if isinstance(document.get("manifests"), list):
        return _INDEX
    if "layers" in document and "config" in document:
        return _MANIFEST
    if document.get("schemaVersion") == 1:
        return _SCHEMA1_SIGNED if "signatures" in document else _SCHEMA1
    return _UNKNOWN


class ManifestReader:
    """Reads manifests through the cache into memory, which is bounded."""

    def __init__(self, held_bytes_max: int = HELD_BYTES_MAX) -> None:
        self._held_bytes = 0
        self._held_bytes_max = held_bytes_max

    @asynccontextmanager
    async def reading(self, cache: BlobCache, digest: str) -> AsyncIterator[Manifest]:
        """Read and check a manifest; its memory counts until the context ends.

        Raises:
            OriginProtocolError: It is too large.
            DigestMismatch: It has another digest.
            CacheBusy: Too many are in memory.
            StorageError: It cannot be read.
        """
        async with await cache.read(RangeRequest()) as read:
            size_bytes = read.version.size_bytes
            if size_bytes > MANIFEST_BYTES_MAX:
                raise OriginProtocolError(
                    f"a manifest must have at most {MANIFEST_BYTES_MAX} bytes"
                )
            with self._holding(size_bytes):
                body = bytearray()
                async for piece in read.pieces():
                    try:
                        body += await _bytes_of(piece)
                    except DiskError:
                        if not isinstance(piece, FileSpan) or not read.span_failed(piece, 0):
                            raise
                version, status = read.version, read.status
                await read.aclose()
                found, media_type = await _inspect(bytes(body))
                if found != digest:
                    raise DigestMismatch(
                        "the manifest's bytes do not have the digest it is named by"
                    )
                yield Manifest(bytes(body), media_type, version, status)

    @contextmanager
    def _holding(self, size_bytes: int) -> Iterator[None]:
        if self._held_bytes + size_bytes > self._held_bytes_max:
            raise CacheBusy("too many manifests are being sent at a time")
        self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes


async def _inspect(body: bytes) -> tuple[str, str]:
    """Return digest and media type."""
    if len(body) <= INLINE_BYTES_MAX:
        return _digest_of(body), media_type_of(body)
    return await asyncio.to_thread(lambda: (_digest_of(body), media_type_of(body)))


def _digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


async def _bytes_of(piece: Piece) -> bytes:
    """Return a piece's bytes; the disk is waited for by a thread."""
    if not isinstance(piece, FileSpan):
        return bytes(piece)
    loop = asyncio.get_running_loop()
    reading = loop.run_in_executor(None, os.pread, piece.fd, piece.length, piece.offset)
    try:
        data = await asyncio.shield(reading)
    except asyncio.CancelledError:
        # The descriptor may be closed, and its number given away, only after the thread is done.
        await asyncio.wait([reading])
        raise
    except OSError as error:
        raise DiskError(f"reading the cache failed: {error.strerror}") from error
    if len(data) != piece.length:
        raise DiskError("a file of the cache is shorter than it was")
    return data
