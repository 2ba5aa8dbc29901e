"""The advisory index of a cache root: what start-up would else have to open every map for.

One JSON document after a line with its CRC-32C. Advisory: a wrong or missing index costs time,
never correctness; the map files are the truth and are checked when a blob is opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from crc32c import crc32c

from blobcache_storage.device import BlobVersion, Validator

INDEX_NAME = "index.json"
INDEX_BYTES_MAX = 256 * 1024 * 1024
_INDEX_VERSION = 1


@dataclass(slots=True)
class CatalogEntry:
    """What is known, without opening it, of one version of a blob on disk.

    Changed only in the event loop's thread (before the root is opened, in the opening one).
    """

    stem: str
    """Its two files are `stem`.data and `stem`.map."""
    blob_id: str
    version: BlobVersion
    chunk_size_bytes: int
    generation: int
    created_ns: int
    bytes: int
    """What it is counted with in the budgets: present and reserved chunks, and the map."""
    last_read_time: float
    complete: bool


@dataclass(slots=True)
class IndexedFolder:
    """What is remembered of one configuration's folder."""

    orphaned_time: float | None = None
    """Unix seconds since when no configuration claims it."""
    blobs: list[CatalogEntry] = field(default_factory=list)


def encode_index(folders: dict[str, IndexedFolder]) -> bytes:
    """Return the index file's bytes."""
    body = json.dumps(
        {
            "version": _INDEX_VERSION,
            "folders": {
                name: {
                    "orphaned": folder.orphaned_time,
                    "blobs": [_encode_blob(blob) for blob in folder.blobs],
                }
                for name, folder in folders.items()
            },
        },
        separators=(",", ":"),
    ).encode()
    return b"%08x\n" % crc32c(body) + body


def _encode_blob(blob: CatalogEntry) -> list[Any]:
    version = blob.version
    return [
        blob.stem,
        blob.blob_id,
        version.size_bytes,
        version.validator.value,
        version.token,
        version.etag,
        version.last_modified,
        blob.chunk_size_bytes,
        blob.generation,
        blob.created_ns,
        blob.bytes,
        blob.last_read_time,
        blob.complete,
    ]


def decode_index(data: bytes) -> dict[str, IndexedFolder]:
    """Return what an index file says; nothing at all if anything is wrong with it."""
    line, _, body = data.partition(b"\n")
    if line != b"%08x" % crc32c(body):
        return {}
    try:
        document = json.loads(body)
        if document["version"] != _INDEX_VERSION:
            return {}
        return {
            name: IndexedFolder(
                folder["orphaned"], [_decode_blob(blob) for blob in folder["blobs"]]
            )
            for name, folder in document["folders"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        # The checksum is right, so another release wrote it: as good as none.
        return {}


def _decode_blob(blob: list[Any]) -> CatalogEntry:
    stem, blob_id, size, validator, token, etag, last_modified, *rest = blob
    version = BlobVersion(size, Validator(validator), token, etag, last_modified)
    return CatalogEntry(stem, blob_id, version, *rest)
