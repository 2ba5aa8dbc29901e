"""RFC 9110 sections 13 and 14 on the wire: what Range and the conditions make of a GET or HEAD."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from tests.unit.data.twin import ETAG, LAST_MODIFIED, TwinBlob, content, running
from tests.unit.data.wire import connected

from blobcache_agent.data.dates import format_http_date

SIZE = 1000
BEFORE = "Wed, 21 Oct 2015 07:27:59 GMT"
AFTER = "Wed, 21 Oct 2015 07:28:01 GMT"
SAME_RFC850 = "Wednesday, 21-Oct-15 07:28:00 GMT"
SAME_ASCTIME = "Wed Oct 21 07:28:00 2015"
HUGE = "9" * 400


class Case(NamedTuple):
    """Headers, and what must come: status and, for 200 and 206, the half-open span."""

    headers: dict[str, str]
    status: int
    span: tuple[int, int] = (0, SIZE)


def _range(value: str, status: int, start: int = 0, end: int = SIZE) -> Case:
    return Case({"Range": value}, status, (start, end))


SINGLE = [
    _range("bytes=0-0", 206, 0, 1),
    _range("bytes=0-499", 206, 0, 500),
    _range("bytes=500-999", 206, 500, 1000),
    _range("bytes=0-999", 206, 0, 1000),
    _range("bytes=0-1000", 206, 0, 1000),
    _range(f"bytes=0-{HUGE}", 206, 0, 1000),
    _range("bytes=0-", 206, 0, 1000),
    _range("bytes=1-", 206, 1, 1000),
    _range("bytes=999-", 206, 999, 1000),
    _range("bytes=999-999", 206, 999, 1000),
    _range("bytes=999-5000", 206, 999, 1000),
    _range("bytes=-1", 206, 999, 1000),
    _range("bytes=-500", 206, 500, 1000),
    _range("bytes=-1000", 206, 0, 1000),
    _range("bytes=-1001", 206, 0, 1000),
    _range(f"bytes=-{HUGE}", 206, 0, 1000),
    _range("bytes=007-0010", 206, 7, 11),
    _range("bytes=" + "0" * 5000 + "7-8", 206, 7, 9),
    _range("BYTES=0-4", 206, 0, 5),
    _range("Bytes=0-4", 206, 0, 5),
    _range("bytes=0-4,", 206, 0, 5),
    _range("bytes=,0-4", 206, 0, 5),
    _range("bytes=, ,0-4 ,", 206, 0, 5),
]
UNSATISFIABLE = [
    _range(value, 416)
    for value in (
        "bytes=1000-",
        "bytes=1000-1000",
        "bytes=1000-2000",
        "bytes=2000-",
        f"bytes={HUGE}-",
        f"bytes={HUGE}-{HUGE}",
        "bytes=-0",
        "bytes=-000",
    )
]
IGNORED = [
    _range(value, 200)
    for value in (
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=,",
        "bytes=--1",
        "bytes=a-b",
        "bytes=0-b",
        "bytes=a-5",
        "bytes=0x0-0x5",
        "bytes=5-4",
        "bytes=999-0",
        "bytes=2000-1000",
        "bytes=0",
        "bytes=0-4-5",
        "bytes=+0-4",
        "bytes=0-+4",
        "bytes=-+4",
        "bytes=0.0-4",
        "bytes=1e2-",
        "bytes=1_0-20",
        "bytes= 0-4",
        "bytes=0 -4",
        "bytes=0- 4",
        "bytes =0-4",
        "bytes:0-4",
        "bytes 0-4",
        "bytes 0-4/1000",
        "bytes=0-4/1000",
        "bytes=0-4;q=1",
        "bytes=\u00b2-",
        "bytes==0-4",
        '"bytes"=0-4',
        "byte=0-4",
        "items=0-4",
        "seconds=0-4",
        "none",
        "=0-4",
        "bytes=0-4 5-9",
        # Several ranges: the whole blob holds them all.
        "bytes=0-4,10-14",
        "bytes=0-4, 10-14",
        "bytes=0-4,0-4",
        "bytes=0-4,2000-",
        "bytes=2000-,3000-",
        "bytes=0-,-1",
        "bytes=-1,-2",
        "bytes=" + ",".join(["0-0"] * 500),
        "bytes=0-4,x",
        "bytes=0-4, bytes=6-7",
    )
]
IF_RANGE = [
    Case({"Range": "bytes=5-9", "If-Range": value}, 206, (5, 10)) for value in (ETAG, LAST_MODIFIED)
] + [
    Case({"Range": "bytes=5-9", "If-Range": value}, 200)
    for value in (
        '"v2"',
        f"W/{ETAG}",
        "v1",
        "*",
        "",
        f"{ETAG}, {ETAG}",
        f'{ETAG}, "v2"',
        f" {ETAG}x",
        BEFORE,
        AFTER,
        SAME_RFC850,
        SAME_ASCTIME,
        "yesterday",
    )
]
IF_RANGE += [
    Case({"If-Range": '"v2"'}, 200),
    Case({"If-Range": ETAG}, 200),
    Case({"Range": "bytes=5-", "If-Range": ETAG}, 206, (5, SIZE)),
    Case({"Range": "bytes=-5", "If-Range": ETAG}, 206, (SIZE - 5, SIZE)),
    Case({"Range": "bytes=2000-", "If-Range": ETAG}, 416),
    Case({"Range": "bytes=2000-", "If-Range": LAST_MODIFIED}, 416),
    Case({"Range": "bytes=2000-", "If-Range": '"v2"'}, 200),
    Case({"Range": "bytes=2000-", "If-Range": AFTER}, 200),
    Case({"Range": "bytes=0-4,6-7", "If-Range": ETAG}, 200),
]
IF_MATCH = [
    Case({"If-Match": value}, 200)
    for value in (ETAG, "*", f'"v2", {ETAG}', f'"v2",{ETAG},"v3"', f", {ETAG} ,", f'W/"v1", {ETAG}')
] + [
    Case({"If-Match": value}, 412)
    for value in ('"v2"', f"W/{ETAG}", "v1", "", '"', '"v2", "v3"', f"{ETAG} x", "*, *", '"V1"')
]
IF_NONE_MATCH = [
    Case({"If-None-Match": value}, 304)
    for value in (ETAG, f"W/{ETAG}", "*", f'"v2", {ETAG}', f'"v2",W/{ETAG}', f",{ETAG}", f"{ETAG},")
] + [
    Case({"If-None-Match": value}, 200)
    for value in ('"v2"', 'W/"v2"', "v1", "", '"v1', 'v1"', '"v2", "v3"', '"V1"', "w/" + ETAG)
]
DATES = [
    Case({"If-Modified-Since": LAST_MODIFIED}, 304),
    Case({"If-Modified-Since": SAME_RFC850}, 304),
    Case({"If-Modified-Since": SAME_ASCTIME}, 304),
    Case({"If-Modified-Since": AFTER}, 304),
    Case({"If-Modified-Since": BEFORE}, 200),
    Case({"If-Modified-Since": "Wed, 21 Oct 2015 07:28:00 +0000"}, 200),
    Case({"If-Modified-Since": "Wed, 31 Feb 2016 07:28:00 GMT"}, 200),
    Case({"If-Modified-Since": "Wed, 21 Oct 2016 25:28:00 GMT"}, 200),
    Case({"If-Modified-Since": "2016-10-21T07:28:00Z"}, 200),
    Case({"If-Modified-Since": "1"}, 200),
    Case({"If-Modified-Since": f"{AFTER}, {AFTER}"}, 200),
    Case({"If-Unmodified-Since": LAST_MODIFIED}, 200),
    Case({"If-Unmodified-Since": SAME_RFC850}, 200),
    Case({"If-Unmodified-Since": SAME_ASCTIME}, 200),
    Case({"If-Unmodified-Since": AFTER}, 200),
    Case({"If-Unmodified-Since": BEFORE}, 412),
    Case({"If-Unmodified-Since": "long ago"}, 200),
]
PRECEDENCE = [
    # If-Match decides over If-Unmodified-Since, If-None-Match over If-Modified-Since.
    Case({"If-Match": ETAG, "If-Unmodified-Since": BEFORE}, 200),
    Case({"If-Match": '"v2"', "If-Unmodified-Since": AFTER}, 412),
    Case({"If-None-Match": '"v2"', "If-Modified-Since": AFTER}, 200),
    Case({"If-None-Match": ETAG, "If-Modified-Since": BEFORE}, 304),
    # 412 over 304.
    Case({"If-Match": '"v2"', "If-None-Match": ETAG}, 412),
    Case({"If-Match": ETAG, "If-None-Match": ETAG}, 304),
    Case({"If-Unmodified-Since": BEFORE, "If-None-Match": ETAG}, 412),
    Case({"If-Unmodified-Since": AFTER, "If-Modified-Since": AFTER}, 304),
    # Both over Range, satisfiable or not, and over If-Range.
    Case({"Range": "bytes=0-4", "If-None-Match": ETAG}, 304),
    Case({"Range": "bytes=0-4", "If-Match": '"v2"'}, 412),
    Case({"Range": "bytes=2000-", "If-None-Match": ETAG}, 304),
    Case({"Range": "bytes=2000-", "If-Match": '"v2"'}, 412),
    Case({"Range": "bytes=2000-", "If-Match": ETAG}, 416),
    Case({"Range": "bytes=2000-", "If-None-Match": '"v2"'}, 416),
    Case({"Range": "bytes=2000-", "If-None-Match": ETAG, "If-Range": '"v2"'}, 304),
    Case({"Range": "bytes=0-4", "If-Range": '"v2"', "If-None-Match": ETAG}, 304),
    Case({"Range": "bytes=0-4", "If-Range": ETAG, "If-Match": ETAG}, 206, (0, 5)),
    Case({"Range": "bytes=0-4", "If-Match": ETAG}, 206, (0, 5)),
    Case({"Range": "bytes=0-4", "If-None-Match": '"v2"'}, 206, (0, 5)),
    Case({"Range": "bytes=0-4", "If-Modified-Since": BEFORE}, 206, (0, 5)),
    Case({"Range": "bytes=0-4", "If-Modified-Since": AFTER}, 304),
    Case({"Range": "bytes=0-4", "If-Unmodified-Since": BEFORE}, 412),
]
TABLE = [
    *SINGLE,
    *UNSATISFIABLE,
    *IGNORED,
    *IF_RANGE,
    *IF_MATCH,
    *IF_NONE_MATCH,
    *DATES,
    *PRECEDENCE,
    Case({}, 200),
]


def _name(case: Case) -> str:
    short = {name: value[:40] + value[-5:] for name, value in case.headers.items()}
    return " ".join(f"{name}:{value}" for name, value in short.items()) or "nothing"


@pytest.mark.parametrize("case", TABLE, ids=_name)
async def test_get(case: Case) -> None:
    """A GET gets exactly the bytes and the fields the RFC says, and the connection goes on."""
    data = content(SIZE)
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(data))
        answer = await wire.ask(headers=case.headers)
        assert answer.status == case.status
        start, end = case.span
        if case.status in (200, 206):
            assert answer.body == data[start:end]
            assert answer["Content-Type"] == "application/octet-stream"
        if case.status == 206:
            assert answer["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
        elif case.status == 416:
            assert answer["Content-Range"] == f"bytes */{SIZE}"
        else:
            assert "content-range" not in answer.headers
        if case.status != 416:
            assert answer["ETag"] == ETAG
            assert answer["Last-Modified"] == LAST_MODIFIED
            assert answer["Accept-Ranges"] == "bytes"
            assert answer["Cache-Status"] == "blobcache; hit"
        assert "date" in answer.headers
        assert (await wire.ask()).body == data


@pytest.mark.parametrize("case", [*IF_MATCH, *IF_NONE_MATCH, *DATES, *PRECEDENCE], ids=_name)
async def test_head(case: Case) -> None:
    """A HEAD obeys the conditions and knows no ranges."""
    alone = {name: value for name, value in case.headers.items() if name != "Range"}
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(SIZE)))
        expected = await wire.ask("GET", headers=alone)
        reads = blob.total_reads
        answer = await wire.ask("HEAD", headers=case.headers)
        assert answer.status == expected.status
        assert answer.headers == expected.headers | {"date": answer["Date"]}
        assert blob.total_reads == reads, "a HEAD must not begin a read"
        assert (await wire.ask()).body == blob.data


@pytest.mark.parametrize("case", [*SINGLE[:6], *UNSATISFIABLE, *IGNORED[:3]], ids=_name)
async def test_head_ignores_range(case: Case) -> None:
    """Range has a meaning for GET only (section 14.2)."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(SIZE)))
        answer = await wire.ask("HEAD", headers=case.headers)
        assert (answer.status, answer["Content-Length"]) == (200, str(SIZE))
        assert "content-range" not in answer.headers


EMPTY = [
    ({}, 200),
    ({"Range": "bytes=0-"}, 416),
    ({"Range": "bytes=0-0"}, 416),
    ({"Range": "bytes=-1"}, 416),
    ({"Range": "bytes=-0"}, 416),
    ({"Range": "bytes=1-0"}, 200),
    ({"Range": "items=0-"}, 200),
    ({"Range": "bytes=0-", "If-Range": '"v2"'}, 200),
    ({"Range": "bytes=0-", "If-None-Match": ETAG}, 304),
]


@pytest.mark.parametrize(("headers", "status"), EMPTY)
async def test_an_empty_blob(headers: dict[str, str], status: int) -> None:
    """An empty blob has no byte, so no range of it can be satisfied."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(b""))
        answer = await wire.ask(headers=headers)
        assert answer.status == status
        if status == 200:
            assert (answer.body, answer["Content-Length"]) == (b"", "0")
        if status == 416:
            assert answer["Content-Range"] == "bytes */0"
        assert (await wire.ask("HEAD")).status == 200


WITHOUT_VALIDATORS = [
    ({"If-Match": ETAG}, 412),
    ({"If-Match": "*"}, 200),
    ({"If-None-Match": ETAG}, 200),
    ({"If-None-Match": "*"}, 304),
    ({"If-Modified-Since": AFTER}, 200),
    ({"If-Unmodified-Since": BEFORE}, 200),
    ({"Range": "bytes=0-4", "If-Range": ETAG}, 200),
    ({"Range": "bytes=0-4", "If-Range": LAST_MODIFIED}, 200),
    ({"Range": "bytes=0-4"}, 206),
]


@pytest.mark.parametrize(("headers", "status"), WITHOUT_VALIDATORS)
async def test_a_blob_without_validators(headers: dict[str, str], status: int) -> None:
    """Where there is nothing to compare, no condition on it holds, and dates are ignored."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(SIZE), etag=None, last_modified=None))
        answer = await wire.ask(headers=headers)
        assert answer.status == status
        assert "etag" not in answer.headers
        assert "last-modified" not in answer.headers


async def test_a_fresh_date_is_no_strong_validator() -> None:
    """A blob changed less than a minute ago may change again under the same date (8.8.2.2)."""
    fresh = format_http_date(int((datetime.now(UTC) - timedelta(seconds=5)).timestamp()))
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(SIZE), etag=None, last_modified=fresh))
        answer = await wire.ask(headers={"Range": "bytes=0-4", "If-Range": fresh})
        assert (answer.status, len(answer.body)) == (200, SIZE)


async def test_repeated_range_lines_count_as_several_ranges() -> None:
    """Two Range lines are one list (section 5.3), and lists are answered with the whole blob."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(SIZE)))
        await wire.send(
            b"GET /v1/blobs/team/models/blob HTTP/1.1\r\nHost: a\r\n"
            b"Range: bytes=0-4\r\nRange: bytes=6-7\r\n\r\n"
        )
        assert (await wire.answer()).status == 200
