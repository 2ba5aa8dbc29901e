"""What is cached: blobs, their versions, and ranges of their bytes.

Pure values; nothing here does I/O. Nydus: `storage/src/device.rs` (`BlobInfo`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from blobcache_storage.errors import RangeNotSatisfiable


class RequestSource(enum.Enum):
    """Who asks: on-demand reads come before prefetch."""

    ON_DEMAND = "on_demand"
    PREFETCH = "prefetch"


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """A blob as a reader or a prefetch list names it."""

    id: str
    size_bytes: int | None = None
    digest: str | None = None
    """`sha256:<64 hex>` if the bytes are named by their digest (Registry ids, prefetch lists)."""


class Validator(enum.Enum):
    """What makes two answers of an origin the same version of a blob."""

    ETAG = "etag"
    """A strong entity tag, verbatim with its quotes."""
    LAST_MODIFIED = "last-modified"
    """The Last-Modified date, where there is no strong entity tag."""
    DIGEST = "digest"
    """The blob's own digest."""
    FILE = "file"
    """device:inode:size:mtime_ns:ctime_ns of a local file."""
    NONE = "none"
    """Nothing: such a blob is passed through and never cached."""


@dataclass(frozen=True, slots=True)
class BlobVersion:
    """One immutable version of a blob; equal versions have equal bytes."""

    size_bytes: int
    validator: Validator
    token: str
    """The validator's value: entity tag, date, digest or file identity; "" for NONE."""
    etag: str | None
    """The strong entity tag shown to readers, with its quotes; None if there is none."""
    last_modified: str | None = None
    """The origin's Last-Modified header verbatim, or None."""

    @property
    def is_cacheable(self) -> bool:
        """Whether two fetches of this version can be known to belong together."""
        return self.validator is not Validator.NONE


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Half-open range `[start, end)` of a blob's bytes."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """A range as asked for before the size is known (RFC 9110 section 14.1.2).

    Whole blob: `RangeRequest()`. `bytes=a-b`: `first=a, last=b` (inclusive, as on the wire).
    `bytes=a-`: `first=a`. `bytes=-n`: `suffix_length=n`.
    """

    first: int | None = None
    last: int | None = None
    suffix_length: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the whole blob is asked for."""
        return self.first is None and self.suffix_length is None

    def resolve(self, size_bytes: int) -> ByteRange:
        """Return the bytes meant, for a blob of `size_bytes`.

        Raises:
            RangeNotSatisfiable: Not one byte of the range exists.
        """
        if self.is_whole:
            return ByteRange(0, size_bytes)
        if self.suffix_length is not None:
            if self.suffix_length == 0 or size_bytes == 0:
                raise RangeNotSatisfiable(size_bytes)
            return ByteRange(max(0, size_bytes - self.suffix_length), size_bytes)
        assert self.first is not None
        if self.first >= size_bytes:
            raise RangeNotSatisfiable(size_bytes)
        end = size_bytes if self.last is None else min(self.last + 1, size_bytes)
        return ByteRange(self.first, end)
