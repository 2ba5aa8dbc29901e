"""What the data API needs from the rest of the agent: configurations, a reader check, an observer.

The server knows only these protocols, so that the cluster mode, the standalone mode and tests
plug in alike.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from blobcache_storage.cache.base import BlobCache, Hit

Readers = Literal["Namespace", "Cluster"]
"""Whose pods may read: those of the configuration's namespace, or all of the cluster."""


class UnknownConfig(LookupError):
    """There is no such configuration: 404."""


class NotReady(Exception):
    """The configuration cannot serve now: 503. Also every lookup before a state was applied.

    Args:
        reason: CamelCase, shown to the reader as `code`.
        message: Says what to do; shown to the reader, so it holds no secret and no address.
        retry_after_seconds: Shown as Retry-After, rounded up to a whole second.
    """

    def __init__(self, reason: str, message: str, *, retry_after_seconds: float = 5.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class Unauthenticated(Exception):
    """The reader did not show a valid token: 401. The message says how to get one."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Forbidden(Exception):
    """The reader is known but may not read this configuration: 403, naming who may."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Entry(Protocol):
    """One configuration that can serve."""

    @property
    def namespace(self) -> str:
        """The configuration's namespace."""

    @property
    def name(self) -> str:
        """The configuration's name."""

    @property
    def readers(self) -> Readers:
        """Whose pods may read."""

    def open(self, blob_id: str) -> BlobCache:
        """Return a handle on a blob, which the server closes. No network, no disk.

        Raises:
            InvalidBlobId: The backend can have no such blob.
        """

    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        """Return verified bytes that can go out at once, if that is all there is to do.

        Args:
            blob_id: As for `open`.
            first: Offset of the first byte.
            last: Offset of the last one, which may lie beyond the blob's end; None for all.
        """


class Catalog(Protocol):
    """The configurations of this node. Called in the event loop, for each request: no I/O."""

    def resolve(self, namespace: str, name: str) -> Entry:
        """Return the configuration.

        Raises:
            UnknownConfig: There is none of that name.
            NotReady: There is, but it cannot serve; or no state has been applied yet.
        """


class Admission(Protocol):
    """A reader who was recognized, for the further requests with the same Authorization header."""

    def opens(self, entry: Entry) -> bool:
        """Whether `ReaderAuth.admit` and `check` would both let the reader pass now."""


class ReaderAuth(Protocol):
    """Decides who may read. Called in the event loop, for each request: no I/O."""

    def admit(self, authorization: str | None) -> None:
        """Refuse who may not even learn which configurations exist; called before `resolve`.

        Raises:
            Unauthenticated: There is no valid token.
        """

    def check(self, authorization: str | None, entry: Entry) -> None:
        """Return if the reader may read that configuration.

        Args:
            authorization: The Authorization header verbatim, None if there is none. It is a
                secret: never logged, never part of a message.
            entry: What is to be read.

        Raises:
            Unauthenticated: There is no valid token.
            Forbidden: The token is valid, but of a namespace that may not read this.
        """

    def recognize(self, authorization: str | None) -> Admission:
        """Return what need not be found out again for the reader's next request.

        Raises:
            Unauthenticated: There is no valid token.
            NotReady: Tokens cannot be judged yet.
        """


class ResponseRecord(NamedTuple):
    """What became of one request; exactly one per response, also of those cut short.

    `namespace` and `name` are set only if the configuration exists, so that strangers cannot
    make up label values. `method` is GET, HEAD or "" (anything else, or unreadable).
    """

    method: Literal["GET", "HEAD", ""]
    status: int
    """The status sent; 499 if the reader left before a head could be sent."""
    reason: str
    """"" on success, else the CamelCase reason, also that of a body cut short."""
    namespace: str
    name: str
    blob_id: str
    """As the reader asked, for logs only (never a label); "" if it was not valid."""
    cache_status: str
    """The parameters of Cache-Status (`CacheStatus.value`); "" if there was none."""
    bytes_sent: int
    """Bytes of the body handed to the kernel, or to the write buffer."""
    duration_seconds: float
    """From the last byte of the request's head to the last byte of the body."""
    aborted: bool
    """The body was cut short: the reader left, was too slow, or the read failed."""


class Observer(Protocol):
    """Is told of each response, in the event loop: it must not block and must not raise."""

    def on_response(self, record: ResponseRecord) -> None:
        """Count and log one response."""

    def on_error(self, error: BaseException) -> None:
        """Log, with its traceback, an error nobody foresaw; the reader sees InternalError."""
