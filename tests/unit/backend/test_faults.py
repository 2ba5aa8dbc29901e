"""What a backend makes of an origin that misbehaves: the right bytes or a telling error."""

from __future__ import annotations

import asyncio
import gzip
import threading
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend.base import BlobBackend, FetchStream
from blobcache_storage.backend.manners import CONNECTIONS_MAX
from blobcache_storage.credentials import Pending
from blobcache_storage.device import ByteRange, RangeRequest, RequestSource, Validator
from blobcache_storage.errors import (
    BackendError,
    BlobChanged,
    BlobNotFound,
    CredentialsPending,
    OriginDenied,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
    RangeNotSatisfiable,
)
from blobcache_storage.testing.fault_origin import Answer, FaultOrigin, Misbehaviour, StoredBlob
from blobcache_storage.testing.oracle import ByteOracle

SIZE = 200_000
DATA = ByteOracle(3).blob("blob", 1, SIZE)
OTHER = ByteOracle(3).blob("blob", 2, SIZE)
MIDDLE = RangeRequest(first=1000, last=150_999)
DATE = "Mon, 23 Nov 2026 10:00:00 GMT"


async def read(stream: FetchStream) -> bytes:
    """Read a stream to its end."""
    async with stream:
        return b"".join([piece async for piece in stream])


async def read_until_error(stream: FetchStream, error: type[BackendError]) -> bytes:
    """Return what came before the error."""
    got = b""
    async with stream:
        pieces = aiter(stream)
        while True:
            try:
                got += await anext(pieces)
            except error:
                return got


@pytest.fixture
def backend(origin: FaultOrigin, open_proxy: OpenBackend) -> BlobBackend:
    """A backend that tries once and waits long."""
    origin.put("/blob", DATA)
    return open_proxy(origin.url)


WRONG_HEADS = {
    "answer  500": (Misbehaviour(answer=Answer(500)), OriginServerError),
    "answer  502": (Misbehaviour(answer=Answer(502)), OriginServerError),
    "answer  503": (Misbehaviour(answer=Answer(503)), OriginThrottled),
    "answer  429": (Misbehaviour(answer=Answer(429)), OriginThrottled),
    "answer  408": (Misbehaviour(answer=Answer(408)), OriginTimeout),
    "answer  401": (Misbehaviour(answer=Answer(401)), OriginDenied),
    "answer  403": (Misbehaviour(answer=Answer(403)), OriginDenied),
    "answer  404": (Misbehaviour(answer=Answer(404)), BlobNotFound),
    "answer  410": (Misbehaviour(answer=Answer(410)), BlobNotFound),
    "answer  412": (Misbehaviour(answer=Answer(412)), BlobChanged),
    "answer  400": (Misbehaviour(answer=Answer(400)), OriginProtocolError),
    "answer  204": (Misbehaviour(answer=Answer(204)), OriginProtocolError),
    "answer  304": (Misbehaviour(answer=Answer(304)), OriginProtocolError),
    "close before head True": (Misbehaviour(close_before_head=True), OriginUnreachable),
    "raw b SSH 2 0 OpenSSH 9 2 r n r n": (
        Misbehaviour(raw=b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        OriginProtocolError,
    ),
    "raw b HTTP 1 1 206 OK r nno colon r n r n": (
        Misbehaviour(raw=b"HTTP/1.1 206 OK\r\nno colon\r\n\r\n"),
        OriginProtocolError,
    ),
    "headers X Long x 20 000": (
        Misbehaviour(headers={"X-Long": "x" * 20_000}),
        OriginProtocolError,
    ),
    "headers f X n x for n in range 500": (
        Misbehaviour(headers={f"X-{n}": "x" for n in range(500)}),
        OriginProtocolError,
    ),
    "ignore range True": (Misbehaviour(ignore_range=True), OriginProtocolError),
    "headers Content Range None": (
        Misbehaviour(headers={"Content-Range": None}),
        OriginProtocolError,
    ),
    "headers Content Range bytes 0 149999 200000": (
        Misbehaviour(headers={"Content-Range": "bytes 0-149999/200000"}),
        OriginProtocolError,
    ),
    "headers Content Range bytes 1000 150999": (
        Misbehaviour(headers={"Content-Range": "bytes 1000-150999/*"}),
        OriginProtocolError,
    ),
    "headers Content Range bytes 1000 150998 200000": (
        Misbehaviour(headers={"Content-Range": "bytes 1000-150998/200000"}),
        OriginProtocolError,
    ),
    "headers Content Range bytes 1000 150999 150999": (
        Misbehaviour(headers={"Content-Range": "bytes 1000-150999/150999"}),
        OriginProtocolError,
    ),
    "headers Content Range items 1000 150999 200000": (
        Misbehaviour(headers={"Content-Range": "items 1000-150999/200000"}),
        OriginProtocolError,
    ),
    "headers Content Encoding gzip": (
        Misbehaviour(headers={"Content-Encoding": "gzip"}),
        OriginProtocolError,
    ),
    "extra body b more": (Misbehaviour(extra_body=b"more"), OriginProtocolError),
    "answer  302": (Misbehaviour(answer=Answer(302, {})), OriginProtocolError),
    "answer  302 Location ftp x": (
        Misbehaviour(answer=Answer(302, {"Location": "ftp://x/"})),
        OriginProtocolError,
    ),
    "answer  302 Location http u p x": (
        Misbehaviour(answer=Answer(302, {"Location": "http://u:p@x/"})),
        OriginProtocolError,
    ),
    "answer  302 Location http 1": (
        Misbehaviour(answer=Answer(302, {"Location": "http://[::1"})),
        OriginProtocolError,
    ),
    "answer  302 Location http x 99999": (
        Misbehaviour(answer=Answer(302, {"Location": "http://x:99999/"})),
        OriginProtocolError,
    ),
}


@pytest.mark.parametrize(("fault", "error"), WRONG_HEADS.values(), ids=WRONG_HEADS.keys())
async def test_a_wrong_head_is_the_right_error(
    origin: FaultOrigin, backend: BlobBackend, fault: Misbehaviour, error: type[Exception]
) -> None:
    """Each wrong answer fails the fetch before a byte, with the error that names it."""
    origin.always = fault
    with pytest.raises(error):
        await backend.fetch("blob", MIDDLE)
    # aiohttp asks once more by itself where a connection closed before any answer.
    assert len(origin.requests) == (2 if fault.close_before_head else 1)


async def test_the_backend_goes_on_after_faults(origin: FaultOrigin, backend: BlobBackend) -> None:
    """Failed fetches, in head and body, give their connections back."""
    for _ in range(CONNECTIONS_MAX):
        origin.misbehave(Misbehaviour(headers={"Content-Range": None}))
        with pytest.raises(OriginProtocolError):
            await backend.fetch("blob", MIDDLE)
        stream = await backend.fetch("blob", MIDDLE)
        await stream.aclose()
    assert await read(await backend.fetch("blob", MIDDLE)) == DATA[1000:151_000]


async def test_connections_are_reused(origin: FaultOrigin, backend: BlobBackend) -> None:
    """Answers read to their end, and short refusals, leave the connection for the next."""
    for _ in range(3):
        assert await read(await backend.fetch("blob", MIDDLE)) == DATA[1000:151_000]
        with pytest.raises(BlobNotFound):
            await backend.stat("missing")
    assert origin.connections == 1


async def test_nobody_listens(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """A refused connection is OriginUnreachable and says why."""
    await origin.stop()
    with pytest.raises(OriginUnreachable, match="refused"):
        await open_proxy(origin.url).fetch("blob", MIDDLE)


async def test_no_such_name(open_proxy: OpenBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve is OriginUnreachable."""

    def look_up(*_: object) -> None:
        raise OSError("no such name")

    monkeypatch.setattr("blobcache_storage.backend.connector._look_up", look_up)
    with pytest.raises(OriginUnreachable, match="did not resolve"):
        await open_proxy("http://nowhere.invalid").fetch("blob", MIDDLE)


async def test_a_hanging_origin_times_out(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """An origin that takes the request and says nothing is OriginTimeout."""
    origin.misbehave(Misbehaviour(hold_head=asyncio.Event()))
    with pytest.raises(OriginTimeout):
        await open_proxy(origin.url, timeout_seconds=0.05).fetch("blob", MIDDLE)


async def test_a_hang_in_the_body_times_out(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """A body that stops is OriginTimeout; what came before is right."""
    origin.put("/blob", DATA)
    origin.misbehave(Misbehaviour(hold_after=100_000))
    stream = await open_proxy(origin.url, timeout_seconds=0.2).fetch("blob", MIDDLE)
    assert await read_until_error(stream, OriginTimeout) == DATA[1000:101_000]


async def test_dripping_is_no_progress(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """A body that comes byte by byte is given up: what counts is 64 KiB, not a sign of life."""
    origin.put("/blob", DATA)
    origin.misbehave(Misbehaviour(drip_bytes=1, drip_seconds=0.001))
    stream = await open_proxy(origin.url, timeout_seconds=0.2).fetch("blob", MIDDLE)
    got = await read_until_error(stream, OriginTimeout)
    assert got == DATA[1000 : 1000 + len(got)]


async def test_a_slow_reader_is_not_a_slow_origin(
    origin: FaultOrigin, open_proxy: OpenBackend
) -> None:
    """Time the consumer takes between pieces does not count against the origin."""
    origin.put("/blob", DATA)
    stream = await open_proxy(origin.url, timeout_seconds=0.1).fetch("blob", MIDDLE)
    got = b""
    async with stream:
        async for piece in stream:
            got += piece
            await asyncio.sleep(0.15)
    assert got == DATA[1000:151_000]


@pytest.mark.parametrize("fault", ["reset_after", "truncate_after"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_breaks_off(
    origin: FaultOrigin, backend: BlobBackend, fault: str, chunked: bool
) -> None:
    """A connection lost in the body is OriginUnreachable, and every byte before it is right."""
    kwargs: dict[str, Any] = {fault: 70_000}
    origin.misbehave(Misbehaviour(chunked=chunked, **kwargs))
    got = await read_until_error(await backend.fetch("blob", MIDDLE), OriginUnreachable)
    assert got == DATA[1000 : 1000 + len(got)]


async def test_a_chunked_answer_of_the_right_length_is_fine(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """A 206 need not repeat its length in Content-Length."""
    origin.misbehave(Misbehaviour(chunked=True))
    assert await read(await backend.fetch("blob", MIDDLE)) == DATA[1000:151_000]


async def test_a_chunked_answer_that_is_too_long(origin: FaultOrigin, backend: BlobBackend) -> None:
    """Bytes beyond the range announced are OriginProtocolError and are not passed on."""
    origin.misbehave(Misbehaviour(chunked=True, extra_body=b"x" * 100_000))
    got = await read_until_error(await backend.fetch("blob", MIDDLE), OriginProtocolError)
    assert got == DATA[1000 : 1000 + len(got)]
    assert len(got) <= 150_000


async def test_a_clean_end_too_early(origin: FaultOrigin, backend: BlobBackend) -> None:
    """A chunked body that ends in good order but early is an error, not a short blob."""
    short = Answer(206, {"Content-Range": f"bytes 0-999/{SIZE}"}, DATA[:500])
    origin.misbehave(Misbehaviour(chunked=True, answer=short))
    stream = await backend.fetch("blob", RangeRequest(first=0, last=999))
    assert await read_until_error(stream, OriginUnreachable) == DATA[:500]


async def test_a_200_from_offset_0_is_the_whole_blob(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """An origin without ranges may answer a fetch from offset 0 with everything."""
    origin.always = Misbehaviour(ignore_range=True)
    for request in (RangeRequest(first=0, last=9), RangeRequest(suffix_length=SIZE)):
        stream = await backend.fetch("blob", request)
        assert stream.span == ByteRange(0, SIZE)
        assert await read(stream) == DATA


async def test_a_200_without_a_length_is_refused(origin: FaultOrigin, backend: BlobBackend) -> None:
    """Nobody could tell whether such a body is whole."""
    origin.always = Misbehaviour(ignore_range=True, chunked=True)
    for request in (RangeRequest(), RangeRequest(first=0, last=9)):
        with pytest.raises(OriginProtocolError):
            await backend.fetch("blob", request)


async def test_a_compressed_body_is_not_asked_for(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """Identity is asked for, and bytes that happen to be gzip are passed on as they are."""
    packed = gzip.compress(b"layer" * 1000)
    origin.put("/packed", packed)
    assert await read(await backend.fetch("packed", RangeRequest())) == packed
    assert origin.requests[0].headers["accept-encoding"] == "identity"


async def test_a_416_without_size_asks_for_it(origin: FaultOrigin, backend: BlobBackend) -> None:
    """Where a 416 does not name the size, a HEAD does."""
    origin.misbehave(Misbehaviour(answer=Answer(416)))
    with pytest.raises(RangeNotSatisfiable) as caught:
        await backend.fetch("blob", RangeRequest(first=SIZE))
    assert caught.value.size_bytes == SIZE


async def test_a_416_of_another_size_is_a_change(origin: FaultOrigin, backend: BlobBackend) -> None:
    """A blob that shrank below the range is another version, not a range beyond its end."""
    expect = await backend.stat("blob")
    origin.always = Misbehaviour(ignore_if_match=True)
    origin.put("/blob", b"short")
    with pytest.raises(BlobChanged):
        await backend.fetch("blob", MIDDLE, expect=expect)


async def test_a_name_that_hangs_times_out(
    open_proxy: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that does not return is OriginTimeout, whatever its thread does."""
    release = threading.Event()
    monkeypatch.setattr("blobcache_storage.backend.connector._look_up", lambda *_: release.wait(10))
    try:
        with pytest.raises(OriginTimeout):
            await open_proxy("http://slow.test", connect_timeout_seconds=0.05).stat("blob")
    finally:
        release.set()


async def test_if_match_and_the_tag_are_both_checked(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """The expected version goes out as If-Match; an origin that ignores it is found out."""
    expect = await backend.stat("blob")
    origin.put("/blob", OTHER)
    with pytest.raises(BlobChanged):
        await backend.fetch("blob", MIDDLE, expect=expect)
    assert origin.requests[-1].headers["if-match"] == expect.token
    origin.always = Misbehaviour(ignore_if_match=True)
    with pytest.raises(BlobChanged):
        await backend.fetch("blob", MIDDLE, expect=expect)


async def test_a_tag_that_vanishes_is_a_change(origin: FaultOrigin, backend: BlobBackend) -> None:
    """An answer that cannot show the expected tag does not belong to that version."""
    expect = await backend.stat("blob")
    origin.misbehave(Misbehaviour(headers={"ETag": None, "Last-Modified": DATE}))
    with pytest.raises(BlobChanged):
        await backend.fetch("blob", MIDDLE, expect=expect)


@pytest.mark.parametrize(
    ("etag", "modified", "validator"),
    [
        ('"a"', DATE, Validator.ETAG),
        ('W/"a"', DATE, Validator.LAST_MODIFIED),
        (None, DATE, Validator.LAST_MODIFIED),
        ("unquoted", DATE, Validator.LAST_MODIFIED),
        ('""', DATE, Validator.LAST_MODIFIED),
        ('W/"a"', None, Validator.NONE),
        (None, "yesterday", Validator.NONE),
        (None, None, Validator.NONE),
    ],
)
async def test_the_best_validator_is_taken(
    origin: FaultOrigin,
    backend: BlobBackend,
    etag: str | None,
    modified: str | None,
    validator: Validator,
) -> None:
    """A strong tag, else a date, else nothing: such a blob cannot be cached or expected."""
    origin.put("/plain", DATA, etag, modified)
    version = await backend.stat("plain")
    assert version.validator is validator
    if version.is_cacheable:
        expected = await backend.fetch("plain", MIDDLE, expect=version)
        assert await read(expected) == DATA[1000:151_000]
    else:
        with pytest.raises(BlobChanged):
            await backend.fetch("plain", MIDDLE, expect=version)


async def test_a_date_of_this_second_is_no_validator(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """A blob modified within the second of the answer may change again within it."""
    now = origin.now()
    dates = {"Date": format_datetime(now, usegmt=True)}
    origin.put("/fresh", DATA, None, dates["Date"])
    origin.misbehave(Misbehaviour(headers=dict(dates)))
    assert (await backend.stat("fresh")).validator is Validator.NONE
    later = format_datetime(now + timedelta(seconds=1), usegmt=True)
    origin.misbehave(Misbehaviour(headers={"Date": later}))
    assert (await backend.stat("fresh")).validator is Validator.LAST_MODIFIED


async def test_a_blob_replaced_between_two_ranges(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """Equal length and another tag: the second range is refused, never joined to the first."""
    first = await backend.fetch("blob", RangeRequest(first=0, last=99_999))
    origin.misbehave(Misbehaviour(replace_with=StoredBlob(OTHER, '"other"'), ignore_if_match=True))
    with pytest.raises(BlobChanged):
        await backend.fetch("blob", RangeRequest(first=100_000), expect=first.version)
    await first.aclose()


async def test_retries_end_with_the_limit(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """A failing request is repeated `retry_limit` times; a prefetch at most once."""
    origin.put("/blob", DATA)
    origin.always = Misbehaviour(answer=Answer(500))
    backend = open_proxy(origin.url, retry_limit=3)
    with pytest.raises(OriginServerError):
        await backend.fetch("blob", MIDDLE)
    assert len(origin.requests) == 4
    with pytest.raises(OriginServerError):
        await backend.fetch("blob", MIDDLE, source=RequestSource.PREFETCH)
    assert len(origin.requests) == 6


async def test_a_retry_that_works(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """One failure is not the reader's to see."""
    origin.put("/blob", DATA)
    origin.misbehave(Misbehaviour(answer=Answer(500)), Misbehaviour(close_before_head=True))
    backend = open_proxy(origin.url, retry_limit=3)
    assert await read(await backend.fetch("blob", MIDDLE)) == DATA[1000:151_000]


@pytest.mark.parametrize("status", [401, 403, 404, 400])
async def test_what_would_not_change_is_not_repeated(
    origin: FaultOrigin, open_proxy: OpenBackend, status: int
) -> None:
    """Refusals are answers, not failures."""
    origin.misbehave(Misbehaviour(answer=Answer(status)))
    with pytest.raises(BackendError):
        await open_proxy(origin.url, retry_limit=3).fetch("blob", MIDDLE)
    assert len(origin.requests) == 1


async def test_retry_after_goes_up(origin: FaultOrigin, open_proxy: OpenBackend) -> None:
    """A long Retry-After, as seconds or date, is the reader's: no retry here."""
    backend = open_proxy(origin.url, retry_limit=3)
    date = format_datetime(origin.now() + timedelta(seconds=90), usegmt=True)
    for text, low, high in (("77", 77, 77), (date, 60, 90), ("999999999", 3600, 3600)):
        origin.misbehave(Misbehaviour(answer=Answer(503, {"Retry-After": text})))
        with pytest.raises(OriginThrottled) as caught:
            await backend.fetch("blob", MIDDLE)
        assert caught.value.retry_after_seconds is not None
        assert low <= caught.value.retry_after_seconds <= high
    assert len(origin.requests) == 3


async def test_404_is_remembered_and_403_is_not(origin: FaultOrigin, backend: BlobBackend) -> None:
    """A missing blob is asked for once in a while, a forbidden one each time."""
    for _ in range(3):
        with pytest.raises(BlobNotFound):
            await backend.fetch("missing", MIDDLE)
    assert len(origin.requests) == 1
    origin.always = Misbehaviour(answer=Answer(403))
    for _ in range(3):
        with pytest.raises(OriginDenied):
            await backend.fetch("blob", MIDDLE)
    assert len(origin.requests) == 4


async def test_pending_credentials_ask_nothing(
    origin: FaultOrigin, open_proxy: OpenBackend
) -> None:
    """Without its credentials a backend does not try what only they permit."""
    backend = open_proxy(origin.url, credentials=Pending())
    for ask in (backend.fetch("blob", MIDDLE), backend.stat("blob")):
        with pytest.raises(CredentialsPending):
            await ask
    assert origin.requests == []


async def test_shutdown_breaks_off_what_is_under_way(
    origin: FaultOrigin, backend: BlobBackend
) -> None:
    """A stream whose backend is shut down ends with an error, not short."""
    origin.misbehave(Misbehaviour(hold_after=1000))
    stream = await backend.fetch("blob", MIDDLE)
    await backend.shutdown()
    got = await read_until_error(stream, OriginUnreachable)
    assert len(got) < 150_000
    with pytest.raises(OriginUnreachable):
        await backend.fetch("blob", MIDDLE)
