"""Reading a request's head: as strict as RFC 9112 permits.

Reader, proxy and server must never disagree on where a request ends, so everything that some
parser might read differently is refused, and the connection with it. llhttp (in httptools) judges
the header block; the request line is judged here, because llhttp accepts RTSP and ICE versions,
HTTP/0.9 and 2.0, runs of spaces, and turns CONNECT and Upgrade into another protocol.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import httptools

from blobcache_agent.data.limits import HEADERS_MAX
from blobcache_agent.data.rejection import Rejection, bad_request, head_too_large

HEAD_END = b"\r\n\r\n"

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])"
)
_ABSOLUTE_FORM = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://[^/?#@]+(/.*)")
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")
_CONTENT_LENGTH_ZERO = re.compile(rb"0+")


@dataclass(slots=True, repr=False)
class Request:
    """A well-formed GET or HEAD without a body; does not print itself: it may hold a secret."""

    method: str
    path: str
    """The origin-form target: starts with "/", visible ASCII, query included, not decoded."""
    keep_alive: bool
    is_http_1_0: bool
    headers: dict[bytes, str] = field(default_factory=dict)
    """By lower-case name; repeated fields are joined by ", " (RFC 9110 section 5.3)."""


class _HeaderCollector:
    """The callbacks httptools wants; holds the headers of one head."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.repeated: set[bytes] = set()
        self.heads_complete = 0

    def on_headers_complete(self) -> None:
        """Count: one head that llhttp reads as two must not pass."""
        self.heads_complete += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header line."""
        name = name.lower()
        if name in self.headers:
            self.repeated.add(name)
            value = self.headers[name] + b", " + value
        self.headers[name] = value


def parse_head(head: bytes) -> Request:
    """Return the request of a head that ends with an empty line and has at most HEAD_BYTES_MAX.

    Raises:
        Rejection: It is malformed (400), of another version (505), of another method (405), has
            a body (400, 413) or too many headers (431). All end the connection.
    """
    line, _, block = head.partition(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise bad_request("the request line must be 'METHOD TARGET HTTP/1.1'")
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        raise Rejection(
            505, "VersionNotSupported", "HTTP/1.1 and HTTP/1.0 are spoken here", close=True
        )
    if block.count(b"\r\n") > HEADERS_MAX + 1:
        raise head_too_large(f"a request may have {HEADERS_MAX} header lines")
    is_http_1_0 = minor == b"0"
    collector = _parse_headers(block, minor)
    _check_host(collector, is_http_1_0)
    _check_no_body(collector)
    if b"authorization" in collector.repeated:
        raise bad_request("there must be one Authorization header")
    if method not in (b"GET", b"HEAD"):
        raise Rejection(
            405,
            "MethodNotAllowed",
            "blobs can be read with GET and HEAD only",
            close=True,
            headers="Allow: GET, HEAD\r\n",
        )
    return Request(
        method=method.decode("ascii"),
        path=_origin_form(target.decode("ascii")),
        keep_alive=_keep_alive(collector.headers.get(b"connection", b""), is_http_1_0),
        is_http_1_0=is_http_1_0,
        headers={name: value.decode("latin-1") for name, value in collector.headers.items()},
    )


def _parse_headers(block: bytes, minor: bytes) -> _HeaderCollector:
    """Have llhttp judge the header block, under a request line that raises no other question."""
    collector = _HeaderCollector()
    # A parser of its own for each head: none carries a state over from what came before.
    parser = httptools.HttpRequestParser(collector)
    data = b"GET / HTTP/1.%b\r\n%b" % (minor, block)
    consumed = len(data)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade as upgrade:
        # An upgrade may be declined by answering as if it was not there (RFC 9110 section 7.8);
        # some clients offer h2c with each first request.
        consumed = upgrade.args[0]
    except httptools.HttpParserError as error:
        raise bad_request("the header lines are malformed") from error
    if collector.heads_complete != 1 or consumed != len(data):
        raise bad_request("the header lines are malformed")
    return collector


def _check_host(collector: _HeaderCollector, is_http_1_0: bool) -> None:
    """RFC 9112 section 3.2: exactly one valid Host, which HTTP/1.0 may leave out."""
    host = collector.headers.get(b"host")
    if host is None:
        if is_http_1_0:
            return
        raise bad_request("there must be a Host header")
    if b"host" in collector.repeated or not _HOST.fullmatch(host):
        raise bad_request("there must be one Host header with a host and an optional port")


def _check_no_body(collector: _HeaderCollector) -> None:
    """Refuse bodies: none has a meaning here, and skipping them is where smuggling begins."""
    if b"transfer-encoding" in collector.headers:
        raise bad_request("a request here must not have Transfer-Encoding")
    length = collector.headers.get(b"content-length")
    if length is None:
        return
    if b"content-length" in collector.repeated or not length.isdigit():
        raise bad_request("Content-Length must be one whole number")
    if not _CONTENT_LENGTH_ZERO.fullmatch(length):
        raise Rejection(413, "BodyNotAllowed", "a request here must not have a body", close=True)


def _keep_alive(connection: bytes, is_http_1_0: bool) -> bool:
    """RFC 9112 section 9.3. Not llhttp's word: it forgets it when the message is complete."""
    options = {option.strip(b" \t").lower() for option in connection.split(b",")}
    return b"close" not in options and (not is_http_1_0 or b"keep-alive" in options)


def _origin_form(target: str) -> str:
    """Return the path and query of a target (RFC 9112 section 3.2); its authority is not used."""
    if not target.startswith("/"):
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        if absolute is None:
            raise bad_request("the request target must be a path or an http URL")
        target = absolute.group(1)
    if "#" in target:
        raise bad_request("the request target must not have a fragment")
    return target
