"""Answers decided before a blob is looked at."""

from __future__ import annotations


class Rejection(Exception):
    """A request that gets an error and nothing else.

    Args:
        status: The HTTP status.
        reason: CamelCase, shown as `code`.
        message: Shown to the reader. Never quotes the request: what strangers send must not come
            back through us, nor reach a log.
        close: Whether the connection cannot be trusted any more (its framing is in doubt, or the
            reader would go on sending a body).
        headers: More header lines, each with its line end.
    """

    def __init__(
        self, status: int, reason: str, message: str, *, close: bool = False, headers: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.close = close
        self.headers = headers


def bad_request(message: str) -> Rejection:
    """Return a 400 that ends the connection."""
    return Rejection(400, "BadRequest", message, close=True)


def head_too_large(message: str) -> Rejection:
    """Return a 431 that ends the connection (RFC 6585 section 5)."""
    return Rejection(431, "HeadTooLarge", message, close=True)
