"""RFC 9112 on the wire: what is malformed is refused, once, with the connection, and not echoed."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from tests.unit.data.twin import TwinBlob, content, running
from tests.unit.data.wire import PATH, connected, request

from blobcache_agent.data.limits import HEAD_BYTES_MAX, HEADERS_MAX

CANARY = "cAnArY"
TARGET = PATH.encode()
SMUGGLED = b"GET /v1/blobs/team/models/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
"""Follows each hostile head: if any server took it for a request, the record would tell."""


class Case(NamedTuple):
    """What is sent, and the status that comes back; afterwards the connection ends."""

    name: str
    data: bytes
    status: int = 400


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: a\r\n\r\n"


def _field(field: bytes, version: bytes = b"1.1") -> bytes:
    return b"GET %b HTTP/%b\r\nHost: a\r\n%b\r\n\r\n" % (TARGET, version, field)


REQUEST_LINES = [
    Case("http/0.9", b"GET /v1/blobs/team/models/blob\r\n\r\n"),
    Case("no version", _line(b"GET " + TARGET)),
    Case("http/0.9 by name", _line(b"GET %b HTTP/0.9" % TARGET), 505),
    Case("http/1.2", _line(b"GET %b HTTP/1.2" % TARGET), 505),
    Case("http/2.0", _line(b"GET %b HTTP/2.0" % TARGET), 505),
    Case("http/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    Case("http/1.10", _line(b"GET %b HTTP/1.10" % TARGET)),
    Case("http/01.1", _line(b"GET %b HTTP/01.1" % TARGET)),
    Case("http/1", _line(b"GET %b HTTP/1" % TARGET)),
    Case("http/1,1", _line(b"GET %b HTTP/1,1" % TARGET)),
    Case("lower-case http", _line(b"GET %b http/1.1" % TARGET)),
    Case("rtsp", _line(b"GET %b RTSP/1.0" % TARGET)),
    Case("ice", _line(b"SOURCE %b ICE/1.0" % TARGET)),
    Case("two spaces before target", _line(b"GET  %b HTTP/1.1" % TARGET)),
    Case("two spaces before version", _line(b"GET %b  HTTP/1.1" % TARGET)),
    Case("space at the end", _line(b"GET %b HTTP/1.1 " % TARGET)),
    Case("space at the start", _line(b" GET %b HTTP/1.1" % TARGET)),
    Case("tab for space", _line(b"GET\t%b HTTP/1.1" % TARGET)),
    Case("vertical tab for space", _line(b"GET\x0b%b HTTP/1.1" % TARGET)),
    Case("space in target", _line(b"GET /v1/blobs/team/models/a b HTTP/1.1")),
    Case("tab in target", _line(b"GET /v1/blobs/team/models/a\tb HTTP/1.1")),
    Case("nul in target", _line(b"GET /v1/blobs/team/models/a\0b HTTP/1.1")),
    Case("control in target", _line(b"GET /v1/blobs/team/models/a\x01b HTTP/1.1")),
    Case("del in target", _line(b"GET /v1/blobs/team/models/a\x7fb HTTP/1.1")),
    Case("raw utf-8 in target", _line("GET /v1/blobs/team/models/é HTTP/1.1".encode())),
    Case("latin-1 in target", _line(b"GET /v1/blobs/team/models/\xe9 HTTP/1.1")),
    Case("fragment", _line(b"GET %b#part HTTP/1.1" % TARGET)),
    Case("fragment in absolute form", _line(b"GET http://h%b#part HTTP/1.1" % TARGET)),
    Case("relative target", _line(b"GET v1/blobs/team/models/blob HTTP/1.1")),
    Case("authority form", _line(b"GET node:7080 HTTP/1.1")),
    Case("asterisk form", _line(b"GET * HTTP/1.1")),
    Case("query only", _line(b"GET ?a HTTP/1.1")),
    Case("absolute form, other scheme", _line(b"GET ftp://h%b HTTP/1.1" % TARGET)),
    Case("absolute form, no authority", _line(b"GET http://%b HTTP/1.1" % TARGET)),
    Case("absolute form, no path", _line(b"GET http://h HTTP/1.1")),
    Case("absolute form, user info", _line(b"GET http://u:p@h%b HTTP/1.1" % TARGET)),
    Case("no method", _line(b" %b HTTP/1.1" % TARGET)),
    Case("bad method character", _line(b"G(ET %b HTTP/1.1" % TARGET)),
    Case("long method", _line(b"G" * 200 + b" %b HTTP/1.1" % TARGET)),
    Case("method only", _line(b"GET")),
    Case("bare cr in the line", _line(b"GET %b\r HTTP/1.1" % TARGET)),
    Case("cr cr lf", b"GET %b HTTP/1.1\r\r\nHost: a\r\n\r\n" % TARGET),
    Case("bare lf in the line", _line(b"GET %b\n HTTP/1.1" % TARGET)),
    Case("bare lf lines", b"GET %b HTTP/1.1\nHost: a\n\n" % TARGET),
    Case("bare lf after the line", b"GET %b HTTP/1.1\nHost: a\r\n\r\n" % TARGET),
    Case("bare cr after the line", b"GET %b HTTP/1.1\rHost: a\r\n\r\n" % TARGET),
    Case("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)),
    Case("binary", bytes(range(128, 256))),
    Case("nul first", b"\0" + _line(b"GET %b HTTP/1.1" % TARGET)),
    Case("cr first", b"\r" + _line(b"GET %b HTTP/1.1" % TARGET)),
    Case("lf first", b"\n" + _line(b"GET %b HTTP/1.1" % TARGET)),
    Case("two empty lines first", b"\r\n\r\n" + _line(b"GET %b HTTP/1.1" % TARGET)),
    Case("byte order mark", b"\xef\xbb\xbf" + _line(b"GET %b HTTP/1.1" % TARGET)),
]
HOSTS = [
    Case("no host", b"GET %b HTTP/1.1\r\n\r\n" % TARGET),
    Case("no host, other field", b"GET %b HTTP/1.1\r\nAccept: a\r\n\r\n" % TARGET),
    Case("two hosts", _field(b"Host: b")),
    Case("two equal hosts", _field(b"Host: a")),
    Case("two hosts, other case", _field(b"hOST: a")),
    Case("two hosts on 1.0", _field(b"Host: b", b"1.0")),
    *(
        Case(f"host {value!r}", b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (TARGET, value))
        for value in (
            b"a b",
            b"a/b",
            b"u@a",
            b"a,b",
            b"a?b",
            b"a#b",
            b"a\\b",
            b"\xe9",
            b'"a"',
            b"a\tb",
        )
    ),
]
FIELDS = [
    Case("space before colon", _field(b"X : 1")),
    Case("tab before colon", _field(b"X\t: 1")),
    Case("space before name", _field(b" X: 1")),
    Case("folded", _field(b"X: 1\r\n 2")),
    Case("folded by a tab", _field(b"X: 1\r\n\t2")),
    Case("folded empty", _field(b"X: 1\r\n \r\nY: 2")),
    Case("folded first", b"GET %b HTTP/1.1\r\n Host: a\r\n\r\n" % TARGET),
    Case("no colon", _field(b"X")),
    Case("empty name", _field(b": 1")),
    Case("space in name", _field(b"X Y: 1")),
    Case("nul in name", _field(b"X\0Y: 1")),
    Case("latin-1 in name", _field(b"X\xe9: 1")),
    *(
        Case(f"{chr(char)!r} in name", _field(b"X%cY: 1" % char))
        for char in b'"(),/;<=>?@[\\]{}\x01\x7f'
    ),
    Case("nul in value", _field(b"X: 1\x002")),
    Case("control in value", _field(b"X: 1\x012")),
    Case("vertical tab in value", _field(b"X: 1\x0b2")),
    Case("del in value", _field(b"X: 1\x7f2")),
    Case("bare cr in value", _field(b"X: 1\r2")),
    Case("bare cr at the end of a value", _field(b"X: 1\r")),
    Case("bare lf in value", _field(b"X: 1\nY: 2")),
    Case("bare lf smuggles a field", _field(b"X: 1\nTransfer-Encoding: chunked")),
    Case("lf lf ends the head", _field(b"X: 1\n\nGET /smuggled HTTP/1.1\r\nHost: a")),
    Case("lf cr lf ends the head", _field(b"X: 1\n\r\nGET /smuggled HTTP/1.1")[:-4] + b"\r\n\r\n"),
    Case("two authorizations", _field(b"Authorization: Bearer a\r\nAuthorization: Bearer b")),
]
BODIES = [
    Case("chunked", _field(b"Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("chunked on 1.0", _field(b"Transfer-Encoding: chunked", b"1.0") + b"0\r\n\r\n"),
    Case("chunked twice", _field(b"Transfer-Encoding: chunked, chunked")),
    Case("chunked in two fields", _field(b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked")),
    Case("identity", _field(b"Transfer-Encoding: identity")),
    Case("gzip", _field(b"Transfer-Encoding: gzip")),
    Case("unknown coding", _field(b"Transfer-Encoding: xchunked")),
    Case("empty coding", _field(b"Transfer-Encoding:")),
    Case("chunked in capitals", _field(b"TRANSFER-ENCODING: CHUNKED")),
    Case("chunked, then length", _field(b"Transfer-Encoding: chunked\r\nContent-Length: 0")),
    Case("length, then chunked", _field(b"Content-Length: 0\r\nTransfer-Encoding: chunked")),
    Case("two lengths", _field(b"Content-Length: 0\r\nContent-Length: 5")),
    Case("two equal lengths", _field(b"Content-Length: 0\r\nContent-Length: 0")),
    Case("list of lengths", _field(b"Content-Length: 0, 0")),
    *(
        Case(f"length {value!r}", _field(b"Content-Length: " + value))
        for value in (
            b"",
            b"-1",
            b"+0",
            b"0x0",
            b"1 2",
            b"0;",
            b"a",
            b"0.0",
            b"\xb2",
            b"1_0",
            b"9" * 30,
        )
    ),
    Case("a body", _field(b"Content-Length: 5") + b"hello", 413),
    Case("a huge body", _field(b"Content-Length: 999999999999"), 413),
    Case("a body that is a request", _field(b"Content-Length: %d" % len(SMUGGLED)), 413),
    Case("a body to be asked for", _field(b"Content-Length: 5\r\nExpect: 100-continue"), 413),
]
METHODS = [
    Case(f"method {name}", _line(b"%b %b HTTP/1.1" % (name.encode(), TARGET)), 405)
    for name in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "FOO", "get")
] + [
    Case("connect", _line(b"CONNECT node:7080 HTTP/1.1"), 405),
    Case("options asterisk", _line(b"OPTIONS * HTTP/1.1"), 405),
    Case("post with a body", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 413),
    Case("post without a host", b"POST / HTTP/1.1\r\n\r\n"),
]
SIZES = [
    Case("many fields", _field(b"\r\n".join([b"X: 1"] * HEADERS_MAX)), 431),
    Case("long field", _field(b"X: " + b"a" * HEAD_BYTES_MAX), 431),
    Case("long name", _field(b"X" * HEAD_BYTES_MAX + b": a"), 431),
    Case("long target", _line(b"GET /%b HTTP/1.1" % (b"a" * HEAD_BYTES_MAX)), 431),
    Case("long method without end", b"G" * (HEAD_BYTES_MAX + 1), 431),
    Case("endless fields", b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * (HEAD_BYTES_MAX // 6), 431),
    Case("just one byte too long", b"", 431),
]
TABLE = [*REQUEST_LINES, *HOSTS, *FIELDS, *BODIES, *METHODS, *SIZES]


def _head_of(length: int) -> bytes:
    """Return a valid head of exactly so many bytes."""
    rest = length - len(_field(b"X: "))
    return _field(b"X: " + b"a" * rest)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
async def test_refused(case: Case) -> None:
    """One error answer comes, it echoes nothing, the connection ends, and no blob was read."""
    data = case.data or _head_of(HEAD_BYTES_MAX + 1)
    async with running() as twin, connected(twin.host, twin.port) as wire:
        for blob_id in ("blob", "smuggled"):
            twin.add(blob_id, TwinBlob(content(10)))
        await wire.send(data.replace(b"X", CANARY.encode()) + SMUGGLED)
        answer = await wire.answer()
        assert (answer.status, answer["Connection"]) == (case.status, "close")
        assert await wire.rest() == b""
        document = json.loads(answer.body)
        assert set(document) == {"code", "message"}
        assert CANARY.encode() not in answer.body
        assert (answer.headers.get("allow") == "GET, HEAD") == (case.status == 405)
        assert [record.status for record in twin.observer.records] == [case.status]
        assert twin.observer.errors == []
        assert all(blob.total_reads == 0 for blob in twin.entry.blobs.values())


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(
    "case", [*REQUEST_LINES[:4], HOSTS[0], FIELDS[0], BODIES[0], METHODS[0]], ids=lambda c: c.name
)
async def test_refused_in_small_packets(case: Case, chunk: int) -> None:
    """How the bytes are cut into packets changes nothing."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(10)))
        for start in range(0, len(case.data), chunk):
            await wire.send(case.data[start : start + chunk])
        answer = await wire.answer()
        assert answer.status == case.status
        assert await wire.rest() == b""


ACCEPTED = [
    ("plain", _field(b"X: 1")),
    ("one empty line first", b"\r\n" + _field(b"X: 1")),
    ("no space after colon", b"GET %b HTTP/1.1\r\nHost:a\r\n\r\n" % TARGET),
    ("spaces around a value", _field(b"X: \t 1 \t ")),
    ("empty value", _field(b"X:")),
    ("latin-1 in value", _field(b"X: \xe9")),
    ("empty host", b"GET %b HTTP/1.1\r\nHost:\r\n\r\n" % TARGET),
    ("host with a port", b"GET %b HTTP/1.1\r\nHost: [::1]:7080\r\n\r\n" % TARGET),
    ("capital fields", b"GET %b HTTP/1.1\r\nHOST: a\r\n\r\n" % TARGET),
    ("length zero", _field(b"Content-Length: 0")),
    ("query", _line(b"GET %b?a=/../b HTTP/1.1" % TARGET)),
    ("absolute form", _line(b"GET http://other:1%b HTTP/1.1" % TARGET)),
    ("absolute form in capitals", _line(b"GET HTTPS://other%b HTTP/1.1" % TARGET)),
    ("escaped id", _line(b"GET /v1/blobs/team/models/%62lob HTTP/1.1")),
    ("expect", _field(b"Expect: 100-continue")),
    ("upgrade is declined", _field(b"Connection: Upgrade\r\nUpgrade: websocket")),
    ("h2c is declined", _field(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c")),
    ("as many fields as may be", _field(b"\r\n".join([b"X: 1"] * (HEADERS_MAX - 1)))),
    ("as long as may be", _head_of(HEAD_BYTES_MAX)),
]


@pytest.mark.parametrize(("name", "data"), ACCEPTED, ids=[name for name, _ in ACCEPTED])
async def test_accepted(name: str, data: bytes) -> None:
    """What is unusual but right is served, and the connection goes on."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(10)))
        for _ in range(2):
            await wire.send(data)
            answer = await wire.answer()
            assert (answer.status, answer.body) == (200, blob.data)
            assert "connection" not in answer.headers


PATHS = [
    ("/", "NotFound"),
    ("/v1", "NotFound"),
    ("/v1/blobs", "NotFound"),
    ("/v1/blobs/", "NotFound"),
    ("/v1/blobs/team", "NotFound"),
    ("/v1/blobs/team/models", "NotFound"),
    ("/v2/blobs/team/models/blob", "NotFound"),
    ("//v1/blobs/team/models/blob", "NotFound"),
    ("/V1/blobs/team/models/blob", "NotFound"),
    ("/v1/%62lobs/team/models/blob", "NotFound"),
    ("/x/../v1/blobs/team/models/blob", "NotFound"),
    ("/v1/blobs/team/models/", "InvalidBlobId"),
    ("/v1/blobs/team/models/?blob", "InvalidBlobId"),
    ("/v1/blobs//models/blob", "UnknownConfig"),
    ("/v1/blobs/team//blob", "UnknownConfig"),
    ("/v1/blobs/other/models/blob", "UnknownConfig"),
    ("/v1/blobs/team/other/blob", "UnknownConfig"),
    ("/v1/blobs/Team/models/blob", "UnknownConfig"),
    ("/v1/blobs/te%61m/models/blob", "UnknownConfig"),
    ("/v1/blobs/../models/blob", "UnknownConfig"),
    ("/v1/blobs/-team/models/blob", "UnknownConfig"),
    (f"/v1/blobs/{'a' * 64}/models/blob", "UnknownConfig"),
    *(
        (f"/v1/blobs/team/models/{blob_id}", "InvalidBlobId")
        for blob_id in (
            ".",
            "..",
            "%2e",
            "%2E%2e",
            ".%2e",
            "../blob",
            "a/../blob",
            "a/%2e%2e/blob",
            "a%2f..%2fblob",
            "%2e%2e%2fblob",
            "./blob",
            "a/./blob",
            "blob/..",
            "blob/.",
            "/blob",
            "%2fblob",
            "%2Fetc%2Fpasswd",
            "a//b",
            "blob/",
            "blob%2f",
            "blob%00",
            "%00",
            "a%0ab",
            "a%0d%0aX:%20y",
            "a%1fb",
            "a%7fb",
            "a%C2%85b",
            "%",
            "%2",
            "a%zz",
            "a%%62",
            "%u0062",
            "a%-1",
            "%ff",
            "%c0%ae%c0%ae",
            "%c0%af",
            "%ed%a0%80",
            "%f8%88%80%80%80",
            "a" * 1025,
            "%61" * 1025,
            "%c3%a9" * 513,
        )
    ),
    *(
        (f"/v1/blobs/team/models/{blob_id}", "BlobNotFound")
        for blob_id in (
            "none",
            "%252e%252e",
            "...",
            "..a",
            "a%20b",
            "%c3%a9",
            "a\\..\\b",
            "~root",
            "sha256:abc",
            "a;b",
            "a%3fb",
            "a" * 1024,
            "%61" * 1024,
            "%c3%a9" * 512,
            "'\"<>{}|^`",
        )
    ),
]


@pytest.mark.parametrize(
    ("path", "code"), PATHS, ids=[f"{path[:60]} {len(path)}" for path, _ in PATHS]
)
async def test_paths(path: str, code: str) -> None:
    """Whatever does not name a blob is 404, with a reason and without an echo."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        for blob_id in ("blob", "etc/passwd", "b"):
            twin.add(blob_id, TwinBlob(content(10)))
        await wire.send(request(path=path))
        answer = await wire.answer()
        assert answer.status == 404
        assert json.loads(answer.body)["code"] == code
        assert (await wire.ask()).status == 200
        head = await wire.ask("HEAD", path)
        assert (head.status, head["Content-Length"]) == (404, str(len(answer.body)))


async def test_ids_arrive_decoded_once() -> None:
    """The catalogue sees the id that was meant."""
    names = {"a%2Fb": "a/b", "a/b c".replace(" ", "%20"): "a/b c", "%2525": "%25", "%C3%A9": "é"}
    async with running() as twin, connected(twin.host, twin.port) as wire:
        for number, (path, blob_id) in enumerate(names.items()):
            blob = twin.add(blob_id, TwinBlob(content(20, seed=number)))
            answer = await wire.ask(path=f"/v1/blobs/team/models/{path}")
            assert (answer.status, answer.body) == (200, blob.data)
