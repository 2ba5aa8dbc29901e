"""The parsers that read what others wrote, with valid inputs, words, and what each may raise.

S3 and OSS answers are judged by status and headers alone (`origin-head`): no XML is ever parsed.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from blobcache_agent.data.blob_path import parse_blob_path
from blobcache_agent.data.catalog import Unauthenticated
from blobcache_agent.data.ranges import parse_range
from blobcache_agent.data.rejection import Rejection
from blobcache_agent.data.request import parse_head
from blobcache_agent.data.tokens import TokenAuth
from blobcache_agent.state_file import StateFile, StateFileCorrupt
from blobcache_api.agent import DesiredState, dump_for_disk, parse_state, seal_state
from blobcache_api.v1alpha1.common import MalformedError
from blobcache_storage.backend import headers
from blobcache_storage.backend.challenge import is_realm_trusted, parse_challenges
from blobcache_storage.backend.registry_token import _parse_answer
from blobcache_storage.cache.chunk_map import (
    MapHeader,
    decode_header,
    decode_slots,
    decode_whole_record,
    encode_header,
    encode_slots,
    encode_whole_record,
    seal_slot,
)
from blobcache_storage.cache.index import IndexedFolder, decode_index, encode_index
from blobcache_storage.device import BlobVersion, RangeRequest, Validator
from blobcache_storage.errors import ConfigError, OriginProtocolError
from blobcache_storage.nydus_config import load_config
from tests.integration.agent_world import Readers


@dataclass(frozen=True, slots=True)
class Target:
    """One parser."""

    run: Callable[[bytes], None]
    """Parses and checks what came out; raises nothing but `refusals`."""
    refusals: tuple[type[Exception], ...]
    seeds: Sequence[bytes]
    words: Sequence[bytes]


def _range(data: bytes) -> None:
    found = parse_range(data.decode("latin-1"))
    if found is None:
        return
    assert isinstance(found, RangeRequest)
    assert (found.suffix_length is None) != (found.first is None)
    if found.first is not None and found.last is not None:
        assert 0 <= found.first <= found.last


def _challenge(data: bytes) -> None:
    registry = URL("https://registry.example.com")
    for challenge in parse_challenges([data.decode("latin-1")]):
        realm = challenge.parameters.get("realm", "")
        url = URL(realm, encoded=True).with_fragment(None)
        if is_realm_trusted(registry, url):
            host = url.host or ""
            assert url.scheme == "https"
            assert host == "example.com" or host.endswith(".example.com"), host


def _origin_head(data: bytes) -> None:
    lines = (line.partition(":") for line in data.decode("latin-1").split("\n"))
    answer = CIMultiDictProxy(
        CIMultiDict((name.strip(), value.strip()) for name, _, value in lines)
    )
    headers.retry_after_seconds(answer, datetime.now(UTC))
    headers.unsatisfied_size(answer)
    version = headers.version_of(answer, 10)
    assert version.etag is None or len(version.etag) <= headers.ETAG_CHARACTERS_MAX
    headers.content_length(answer)
    start, end, size = headers.content_range(answer)
    assert 0 <= start < end <= size


def _map(data: bytes) -> None:
    header = decode_header(data[:4096])
    if header is not None:
        slots = decode_slots(header, data[4096:])
        assert len(slots) == header.chunk_count
        decode_whole_record(header.generation, data[:4096])


def _index(data: bytes) -> None:
    decode_index(data)


class _StateTarget:
    """Writes the bytes where an agent's state file is, and reads them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="blobcache-fuzz-")
        self._fd = os.open(self._folder.name, os.O_RDONLY | os.O_DIRECTORY)

    def seed(self, content: bytes) -> bytes:
        """Return a whole file with this content."""
        StateFile(self._fd).write(content)
        with open(f"{self._folder.name}/agent-state", "rb") as file:
            return file.read()

    def __call__(self, data: bytes) -> None:
        with open(f"{self._folder.name}/agent-state", "wb") as file:
            file.write(data)
        content = StateFile(self._fd).read()
        assert content is not None
        parse_state(content)


def _nydus(data: bytes) -> None:
    load_config(data)


def _head(data: bytes) -> None:
    request = parse_head(data + b"\r\n\r\n")
    assert request.method in ("GET", "HEAD")
    parse_blob_path(request.path)


def _token_answer(data: bytes) -> None:
    token, seconds = _parse_answer(data, "h")
    assert token
    assert 0 < seconds <= 3600


def _state(*configs: dict[str, Any]) -> DesiredState:
    plain = DesiredState.model_validate(
        {"epoch": 7, "revision": 1, "node": "n", "configs": list(configs)}
    )
    return seal_state(plain)


_CONFIG = {
    "namespace": "demo",
    "name": "web",
    "uid": "u",
    "generation": 1,
    "spec": {"backend": {"type": "HTTPProxy", "httpProxy": {"address": "http://h"}}},
}
_PUNCTUATION = [
    b",",
    b";",
    b":",
    b"=",
    b"-",
    b'"',
    b"\\",
    b" ",
    b"\t",
    b"\0",
    b"\r\n",
    b"/",
    b"\xff",
]
_JSON = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"1e999", b"NaN", b"-1", b'""',
    b"1" * 400, b"\\ud800", b"[" * 500, b'{"a":' * 300,
]  # fmt: skip


def _readers() -> tuple[Target, Target]:
    readers = Readers()
    auth = TokenAuth()
    auth.set_keys(readers.jwks, readers.issuer)
    good = {"Bearer " + readers.token(name) for name in ("demo", "other")}

    def token(data: bytes) -> None:
        text = data.decode("latin-1")
        auth.admit(text)
        # Whoever is admitted shows a signed token; base64url has one spelling here.
        assert text.partition(" ")[2].strip(" ") in {t.partition(" ")[2] for t in good}

    def keys(data: bytes) -> None:
        document = json.loads(data)
        if isinstance(document, dict):
            TokenAuth().set_keys(document, "issuer")

    rsa = {"kty": "RSA", "kid": "r", "n": "v" * 342 + "Q", "e": "AQAB", "alg": "RS256"}
    sets = [readers.jwks, {"keys": [*readers.jwks["keys"], rsa]}]
    return (
        Target(
            token,
            (Unauthenticated,),
            [text.encode() for text in good],
            [b".", b"=", b"Bearer ", b"bearer", b"eyJhbGciOiJub25lIn0", b"-", b"_", b" "],
        ),
        Target(
            keys,
            (ValueError, RecursionError),
            [json.dumps(one).encode() for one in sets],
            [*_JSON, b'"AA"', b'"AQAB"', b'"EC"', b'"RSA"', b'"P-256"', b'"kid"'],
        ),
    )


def _map_seed() -> bytes:
    version = BlobVersion(40_000, Validator.ETAG, '"t"', '"t"', "Wed, 21 Oct 2015 07:28:00 GMT")
    header = MapHeader("some/blob", version, 16_384, 99, 5, bytes(16))
    page = bytearray(encode_header(header))
    page[3584 : 3584 + 36] = encode_whole_record(99, b"\x01" * 32)
    slots = array("Q", [seal_slot(99, index, 7) for index in range(header.chunk_count)])
    return bytes(page) + encode_slots(slots)


def targets() -> dict[str, Target]:
    """Return all parsers by name."""
    token, jwks = _readers()
    state = _StateTarget()
    nydus = json.dumps(
        {
            "version": 2,
            "backend": {"type": "s3", "s3": {"region": "r", "bucket_name": "b"}},
            "cache": {"type": "filecache", "filecache": {"work_dir": "w"}},
        }
    )
    toml = b'version = 2\n[backend]\ntype = "s3"\n[backend.s3]\nregion = "r"\nbucket_name = "b"\n'
    head = b"GET /v1/blobs/a/b/c%2Fd HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1"
    origin = (
        b'Content-Range: bytes 0-9/10\nETag: "x"\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\n'
        b"Date: Wed, 21 Oct 2015 08:28:00 GMT\nContent-Length: 10\nRetry-After: 5"
    )
    bearer = b'Bearer realm="https://auth.example.com/token",service="s", Basic realm="x"'
    return {
        "range": Target(
            _range, (), [b"bytes=0-9", b"bytes=-5", b"bytes=7-", b"Bytes=1-2,3-4"],
            [*_PUNCTUATION, b"bytes=", b"9" * 30, b"0" * 5000, b"-0"],
        ),
        "challenge": Target(
            _challenge, (ValueError,), [bearer, b"Negotiate abc==", b"Basic"],
            [*_PUNCTUATION, b"realm=", b"Bearer ", b"https://example.com.evil.org/", b"@", b"[::1]",
             b"https://evilexample.com", b"#", b"?", b"%00", b"\\\""],
        ),
        "origin-head": Target(
            _origin_head, (OriginProtocolError,), [origin],
            [*_PUNCTUATION, b"\n", b"W/", b"9" * 19, b"bytes */5", b"+9999", b"Date:", b"ETag:"],
        ),
        "map": Target(_map, (), [_map_seed()], [b"\0" * 8, b"\xff" * 8, b"blobcmap", b"\x01"]),
        "index": Target(
            _index, (),
            [encode_index({"a": IndexedFolder(1.0, [])}), encode_index({})], _JSON,
        ),
        "state-file": Target(
            state, (StateFileCorrupt, MalformedError),
            [state.seed(dump_for_disk(_state(_CONFIG))), state.seed(dump_for_disk(_state()))],
            [*_JSON, b"\n", b"blobcache-agent-state", b" 1 "],
        ),
        "state": Target(
            lambda data: parse_state(data) and None, (MalformedError,),
            [dump_for_disk(_state(_CONFIG)), dump_for_disk(_state())],
            [*_JSON, b'"epoch"', b'"configs"', b'"spec"', b'"bytes"', b'"50Gi"'],
        ),
        "nydus": Target(
            _nydus, (ConfigError,), [nydus.encode(), toml],
            [*_JSON, b"=", b"\n", b"'''", b'"""', b"[[a]]", b"[a.b]", b"#", b"1979-05-27", b"0x",
             b"a.b.c = 1\n", b"inf", b"\xef\xbb\xbf"],
        ),
        "token": token,
        "jwks": jwks,
        "token-answer": Target(
            _token_answer, (OriginProtocolError,),
            [b'{"token":"abc","expires_in":60}', b'{"access_token":"x"}'],
            [*_JSON, b'"expires_in":', b"Infinity", b"0.0", b"\\n"],
        ),
        "head": Target(
            _head, (Rejection,), [head, head.replace(b"1.1", b"1.0")],
            [*_PUNCTUATION, b"\n", b"\r", b"%2e%2e/", b"%", b"Transfer-Encoding: chunked\r\n",
             b"\r\n ",
             b"Content-Length: 0\r\n", b"HTTP/1.1", b"Host: \r\n", b"Connection: upgrade\r\n"],
        ),
    }  # fmt: skip
