"""The errors of the engine.

The tree (each class has a `reason`, used alike in conditions, metrics, logs and HTTP bodies)::

    StorageError
    ├── ConfigError               InvalidConfig        a configuration that cannot be used
    ├── InvalidBlobId             InvalidBlobId        an id that may not be asked for
    ├── RangeNotSatisfiable       RangeNotSatisfiable  the range lies beyond the blob's end
    ├── BlobChanged               BlobChanged          the origin now has another version
    ├── DigestMismatch            DigestMismatch       a digest-named blob has other bytes
    ├── CacheError
    │   ├── CacheBusy             CacheBusy            the buffer pool and its queue are full
    │   ├── DiskFull              DiskFull             ENOSPC, EDQUOT or the floor of free space
    │   └── DiskError             DiskError            any other error of the cache's disk
    └── BackendError
        ├── BlobNotFound          BlobNotFound         404
        ├── OriginDenied          OriginDenied         401 or 403
        ├── OriginThrottled       OriginThrottled      429 or 503
        ├── OriginServerError     OriginServerError    any other 5xx
        ├── OriginTimeout         OriginTimeout        no answer or no progress in time
        ├── OriginUnreachable     OriginUnreachable    name, connection or TLS failed
        ├── OriginRefused         OriginRefused        an address the administrator does not permit
        ├── OriginProtocolError   OriginProtocolError  an answer that breaks the fetch's contract
        ├── CircuitOpen           CircuitOpen          the breaker of this origin is open
        └── CredentialsPending    CredentialsPending   the credentials have not arrived yet
"""

from __future__ import annotations

from typing import ClassVar


class StorageError(Exception):
    """Base of all engine errors; the message never holds a secret or a signed URL."""

    reason: ClassVar[str] = "StorageError"
    retryable: ClassVar[bool] = False


class ConfigError(StorageError):
    """A configuration that cannot be used; the message names the field and the remedy."""

    reason = "InvalidConfig"


class InvalidBlobId(StorageError):
    """A blob id that may not be asked for: empty, dot segments, controls, too long."""

    reason = "InvalidBlobId"


class RangeNotSatisfiable(StorageError):
    """The asked range has no byte inside a blob of `size_bytes`."""

    reason = "RangeNotSatisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the range has no byte within the blob's {size_bytes} bytes")
        self.size_bytes = size_bytes


class BlobChanged(StorageError):
    """The origin has another version of the blob than the one being read."""

    reason = "BlobChanged"


class DigestMismatch(StorageError):
    """The bytes of a digest-named blob do not have that digest; the blob is quarantined."""

    reason = "DigestMismatch"


class CacheError(StorageError):
    """Base of what goes wrong on this node."""

    reason = "CacheError"


class CacheBusy(CacheError):
    """The buffer pool and its waiting queue are full; try again after `retry_after_seconds`."""

    reason = "CacheBusy"
    retryable = True
    retry_after_seconds: float = 1.0


class DiskFull(CacheError):
    """ENOSPC, EDQUOT, or the floor of free space was reached."""

    reason = "DiskFull"


class DiskError(CacheError):
    """Any other error of the cache's disk."""

    reason = "DiskError"


class BackendError(StorageError):
    """Base of what an origin answers, or does not; `status` is its HTTP status, if any."""

    reason = "OriginError"

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class BlobNotFound(BackendError):
    """The origin has no such blob (404); remembered for at most 5 s."""

    reason = "BlobNotFound"


class OriginDenied(BackendError):
    """The origin refused the credentials (401, 403); never remembered."""

    reason = "OriginDenied"


class OriginThrottled(BackendError):
    """The origin is busy (429, 503); `retry_after_seconds` is what it asked for, if anything."""

    reason = "OriginThrottled"
    retryable = True


class OriginServerError(BackendError):
    """The origin failed (5xx other than 503)."""

    reason = "OriginServerError"
    retryable = True


class OriginTimeout(BackendError):
    """No answer, or no progress, within the configured time."""

    reason = "OriginTimeout"
    retryable = True


class OriginUnreachable(BackendError):
    """The name did not resolve, the connection or TLS failed, or it broke mid-body."""

    reason = "OriginUnreachable"
    retryable = True


class OriginRefused(BackendError):
    """The origin's address is one that the administrator does not permit."""

    reason = "OriginRefused"


class OriginProtocolError(BackendError):
    """The answer breaks the fetch's contract (length, Content-Range, encoding, a 200 mid-blob)."""

    reason = "OriginProtocolError"


class CircuitOpen(BackendError):
    """The breaker of this (origin, credential) is open; nothing was sent."""

    reason = "CircuitOpen"


class CredentialsPending(BackendError):
    """The configuration has credentials which have not reached this process yet."""

    reason = "CredentialsPending"
