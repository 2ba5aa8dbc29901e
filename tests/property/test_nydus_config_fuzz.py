"""Whatever the bytes: a configuration, or a ConfigError, never anything else."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from blobcache_storage.config import ConfigV2
from blobcache_storage.errors import ConfigError
from blobcache_storage.nydus_config import load_config

VALID: list[dict[str, Any]] = [
    {
        "version": 2,
        "id": "x",
        "backend": {
            "type": kind,
            "s3": {
                "scheme": "https",
                "endpoint": "e",
                "region": "r",
                "bucket_name": "b",
                "access_key_id": "a",
                "access_key_secret": "s",
                "timeout": 1,
                "ca_cert_files": [],
                "proxy": {"url": ""},
            },
            "oss": {"endpoint": "e", "bucket_name": "b"},
            "registry": {"host": "h", "repo": "r", "auth": "YTpi", "registry_token": ""},
            "http-proxy": {"addr": "http://h:1", "path": "/p"},
            "localfs": {"blob_file": "", "dir": "d", "alt_dirs": ["x"]},
        },
        "cache": {
            "type": "filecache",
            "validate": True,
            "filecache": {"work_dir": "w"},
            "prefetch": {"enable": True, "threads": 1, "batch_size": 1},
        },
        "rafs": {"mode": "direct", "prefetch": {"enable": True}},
    }
    for kind in ("s3", "oss", "registry", "http-proxy", "localfs")
]
VALID.append(
    {
        "device": {
            "id": "x",
            "backend": {"type": "registry", "config": {"host": "h", "repo": "r"}},
            "cache": {"type": "blobcache", "config": {"work_dir": "w"}},
        },
        "mode": "direct",
        "fs_prefetch": {"enable": True, "threads_count": 1},
    }
)

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["http://h", "/x", "h:1", "[::1]:9", "\x00", "\ud800", "a:b:c", "٣:٣"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def _places(table: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values below a table."""
    items: list[tuple[Any, Any]] = []
    if isinstance(table, dict):
        items = list(table.items())
    elif isinstance(table, list):
        items = list(enumerate(table))
    return [place for key, value in items for place in [(*at, key), *_places(value, (*at, key))]]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid document with up to three values replaced or removed."""
    document = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from(_places(document)))
        table = document
        for key in path:
            table = table[key]
        if draw(st.booleans()):
            table[last] = draw(anything)
        else:
            del table[last]
        if not document:
            break
    return json.dumps(document).encode()


def _load(content: bytes) -> ConfigV2 | None:
    try:
        return load_config(content)
    except ConfigError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return None


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
@example(b"\xef\xbb\xbf{}")
@example(b"a" + b".a" * 3000 + b" = 1")
@example(b"a = " + b"[" * 3000)
@example(b"a = 9999-99-99")
@example(b"version = 1_0")
def test_arbitrary_bytes(content: bytes) -> None:
    """Rubbish is refused in one line."""
    _load(content)


@given(anything)
def test_arbitrary_documents(document: Any) -> None:
    """Any JSON."""
    _load(json.dumps(document).encode())


@given(mutants())
def test_nearly_valid_documents(content: bytes) -> None:
    """What is accepted has the section its type names, and only that one."""
    config = _load(content)
    if config is None or config.backend is None:
        return
    backend = config.backend
    sections = {
        "s3": backend.s3,
        "oss": backend.oss,
        "registry": backend.registry,
        "http-proxy": backend.http_proxy,
        "localfs": backend.localfs,
    }
    assert [kind for kind, section in sections.items() if section is not None] == [backend.type]
    assert backend.timeout_seconds > 0
    assert backend.connect_timeout_seconds > 0


@given(st.sampled_from(VALID))
def test_the_valid_ones_are_valid(document: dict[str, Any]) -> None:
    """Or the mutants would prove nothing."""
    assert _load(json.dumps(document).encode()) is not None
