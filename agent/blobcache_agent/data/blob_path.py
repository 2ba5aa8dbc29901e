"""From a request target to a configuration and a blob id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from blobcache_agent.data.limits import BLOB_ID_BYTES_MAX
from blobcache_agent.data.rejection import Rejection

PREFIX = "/v1/blobs/"
PATHS_REMEMBERED_MAX = 256
"""Readers ask for many ranges of few blobs; at most 16 KiB each, and only valid ones."""

_CONFIG_NAME = re.compile(r"[a-z0-9](?:[-.a-z0-9]{0,61}[a-z0-9])?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]*")
"""Ids that need neither decoding nor a closer look; most are of this form."""


@dataclass(frozen=True, slots=True)
class BlobPath:
    """What `/v1/blobs/{namespace}/{name}/{blob-id}` names."""

    namespace: str
    name: str
    blob_id: str


@lru_cache(PATHS_REMEMBERED_MAX)
def parse_blob_path(path: str) -> BlobPath:
    """Return what an absolute path names; a query is ignored.

    The id is the rest of the path, percent-decoded once and only then looked at, so that
    `%2e%2e%2f` is judged as what it means and `%252e` stays `%2e`.

    Raises:
        Rejection: 404 NotFound (no such place), UnknownConfig (a name no configuration can have)
            or InvalidBlobId.
    """
    path, _, _ = path.partition("?")
    if not path.startswith(PREFIX):
        raise Rejection(404, "NotFound", f"blobs are at {PREFIX}NAMESPACE/NAME/BLOB-ID")
    parts = path[len(PREFIX) :].split("/", 2)
    if len(parts) < 3:
        raise Rejection(404, "NotFound", f"blobs are at {PREFIX}NAMESPACE/NAME/BLOB-ID")
    namespace, name, raw_id = parts
    if not (_CONFIG_NAME.fullmatch(namespace) and _CONFIG_NAME.fullmatch(name)):
        raise Rejection(404, "UnknownConfig", "no BlobCacheConfig can have this namespace or name")
    return BlobPath(namespace, name, _decode_blob_id(raw_id))


def _decode_blob_id(raw: str) -> str:
    """Decode and check the id."""
    if len(raw) <= BLOB_ID_BYTES_MAX and _PLAIN_ID.fullmatch(raw):
        return raw
    if _BAD_ESCAPE.search(raw):
        raise _invalid_id("has a '%' that is not followed by two hexadecimal digits")
    encoded = unquote_to_bytes(raw)
    if len(encoded) > BLOB_ID_BYTES_MAX:
        raise _invalid_id(f"is longer than {BLOB_ID_BYTES_MAX} bytes")
    try:
        blob_id = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid_id("is not UTF-8") from error
    if _CONTROL.search(blob_id):
        raise _invalid_id("has a control character")
    for segment in blob_id.split("/"):
        if segment in ("", ".", ".."):
            raise _invalid_id("has an empty segment, or one that is '.' or '..'")
    return blob_id


def _invalid_id(problem: str) -> Rejection:
    """Return the 404 for an id no blob can have."""
    return Rejection(404, "InvalidBlobId", f"the blob id {problem}")
