"""The body of an answer: counted, timed, paid for, and given up cleanly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final

import aiohttp
from typing_extensions import override

from blobcache_storage.backend.base import FetchStream
from blobcache_storage.backend.exchange import host_of, translate
from blobcache_storage.backend.manners import ByteRate
from blobcache_storage.device import BlobVersion, ByteRange, RequestSource
from blobcache_storage.errors import OriginProtocolError, OriginTimeout, OriginUnreachable

PROGRESS_BYTES: Final = 64 * 1024
"""So many further bytes must come within each `timeout_seconds` spent waiting for them."""


class HTTPStream(FetchStream):
    """An answer's body.

    Args:
        on_end: Called once, with whether the origin failed in the body.
        timeout_seconds: Waiting for each further `PROGRESS_BYTES`; the time the consumer takes
            between pieces does not count.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        version: BlobVersion,
        span: ByteRange,
        *,
        rate: ByteRate,
        source: RequestSource,
        timeout_seconds: float,
        on_end: Callable[[bool], None],
    ) -> None:
        self.version = version
        self.span = span
        self._response = response
        self._rate = rate
        self._source = source
        self._timeout_seconds = timeout_seconds
        self._on_end: Callable[[bool], None] | None = on_end
        self._pieces_left: AsyncGenerator[bytes, None] | None = None
        self._host = host_of(response.url)

    @override
    def promote(self) -> None:
        self._source = RequestSource.ON_DEMAND

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._pieces_left is None:
            self._pieces_left = self._pieces()
        return self._pieces_left

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(self._counted()) as pieces:
                async for piece in pieces:
                    yield piece
        except (OriginUnreachable, OriginTimeout):
            self._end(origin_failed=True)
            raise
        except BaseException:
            self._end(origin_failed=False)
            raise
        self._end(origin_failed=False)

    async def _counted(self) -> AsyncGenerator[bytes, None]:
        left = self.span.length
        loop = asyncio.get_running_loop()
        patience, progress = self._timeout_seconds, 0
        while True:
            started = loop.time()
            piece = await self._read(patience)
            patience -= loop.time() - started
            progress += len(piece)
            if progress >= PROGRESS_BYTES:
                patience, progress = self._timeout_seconds, 0
            if not piece:
                break
            if len(piece) > left:
                raise OriginProtocolError(f"origin '{self._host}' sent more than it announced")
            left -= len(piece)
            await self._rate.take(len(piece), lambda: self._source)
            yield piece
        if left:
            raise OriginUnreachable(f"origin '{self._host}' ended the body {left} bytes early")

    async def _read(self, patience_seconds: float) -> bytes:
        """Return the next bytes, or none at the body's end."""
        content = self._response.content
        if content.at_eof():
            return b""
        try:
            async with asyncio.timeout(max(0.0, patience_seconds)):
                return await content.readany()
        except TimeoutError:
            raise OriginTimeout(
                f"origin '{self._host}' sent less than {PROGRESS_BYTES} bytes"
                f" in {self._timeout_seconds:g} seconds"
            ) from None
        except aiohttp.ClientPayloadError:
            raise OriginUnreachable(f"origin '{self._host}' broke off in the body") from None
        except (aiohttp.ClientError, OSError) as error:
            raise translate(error, self._host) from None
        except RuntimeError:
            # How aiohttp says that this side closed the connection, as a shutdown does.
            raise OriginUnreachable(f"the connection to origin '{self._host}' was closed") from None

    def _end(self, *, origin_failed: bool) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            # Closes the connection unless the body was read to its end, which already gave it back.
            self._response.close()
            on_end(origin_failed)

    @override
    async def aclose(self) -> None:
        if self._pieces_left is not None:
            await self._pieces_left.aclose()
        self._end(origin_failed=False)


class PartOfStream(FetchStream):
    """A part of an answer that is whole, where an origin knows no ranges; for small bodies.

    Args:
        whole: From the blob's first byte to its last; ended with this one.
        span: The part.
    """

    def __init__(self, whole: FetchStream, span: ByteRange) -> None:
        self.version = whole.version
        self.span = span
        self._whole = whole
        self._pieces_left: AsyncGenerator[bytes, None] | None = None

    @override
    def promote(self) -> None:
        self._whole.promote()

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._pieces_left is None:
            self._pieces_left = self._pieces()
        return self._pieces_left

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        # To the end of the whole, also past the part: a body of another length is an error.
        offset = 0
        async for piece in self._whole:
            part = piece[max(0, self.span.start - offset) : max(0, self.span.end - offset)]
            offset += len(piece)
            if part:
                yield part

    @override
    async def aclose(self) -> None:
        if self._pieces_left is not None:
            await self._pieces_left.aclose()
        await self._whole.aclose()
