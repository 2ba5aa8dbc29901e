"""Handles on blobs, counted by the manager they came from."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from typing_extensions import override

from blobcache_storage.cache.base import BlobCache, BlobRead, CacheStatus
from blobcache_storage.device import BlobVersion, RangeRequest, RequestSource


class HandleOwner(Protocol):
    """What a handle needs of its manager. Ids are canonical."""

    async def read(
        self, blob_id: str, digest: str | None, request: RangeRequest, source: RequestSource
    ) -> BlobRead:
        """See `BlobCache.read`; the digest is what a list says of the blob, if anything."""

    async def stat(self, blob_id: str) -> tuple[BlobVersion, CacheStatus]:
        """See `BlobCache.stat`."""


class Handles:
    """How many handles are open on each blob of a manager."""

    def __init__(self, owner: HandleOwner) -> None:
        self._owner = owner
        self._open: Counter[str] = Counter()

    def open(self, blob_id: str, digest: str | None) -> BlobCache:
        """Return a handle.

        Args:
            blob_id: The canonical id.
            digest: `sha256:<hex>` if a list names it.
        """
        self._open[blob_id] += 1
        return BlobHandle(self, self._owner, blob_id, digest)

    def close(self, blob_id: str) -> None:
        """Take a handle back."""
        self._open[blob_id] -= 1
        if not self._open[blob_id]:
            del self._open[blob_id]

    def __contains__(self, blob_id: str) -> bool:
        return blob_id in self._open

    def __bool__(self) -> bool:
        return bool(self._open)


class BlobHandle(BlobCache):
    """A handle; all state is the manager's."""

    __slots__ = ("_closed", "_digest", "_handles", "_owner", "blob_id")

    def __init__(
        self, handles: Handles, owner: HandleOwner, blob_id: str, digest: str | None
    ) -> None:
        self.blob_id = blob_id
        self._handles = handles
        self._owner = owner
        self._digest = digest
        self._closed = False

    @override
    async def read(
        self, request: RangeRequest, *, source: RequestSource = RequestSource.ON_DEMAND
    ) -> BlobRead:
        return await self._owner.read(self.blob_id, self._digest, request, source)

    @override
    async def stat(self) -> tuple[BlobVersion, CacheStatus]:
        return await self._owner.stat(self.blob_id)

    @override
    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._handles.close(self.blob_id)
