"""The grammar of blob ids: what may be asked of an origin at all.

The strict forms come first: an id that passes here can be put into a path, a header or an error
message without changing what any of them means.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

from blobcache_storage.errors import InvalidBlobId

BLOB_ID_BYTES_MAX: Final = 1024
"""Longest id in UTF-8; S3 and OSS keys end there too."""

REPOSITORY_CHARACTERS_MAX: Final = 255
"""Longest repository name (OCI distribution-spec, "Pulling manifests")."""

_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


def check_path_id(blob_id: str) -> str:
    """Return an id unchanged if it may become part of a path or an object's key.

    Raises:
        InvalidBlobId: It is empty, has a `.` or `..` segment, a control character (NUL, DEL and
            C1 included), a lone surrogate, or more than 1,024 bytes.
    """
    if not blob_id:
        raise InvalidBlobId("a blob id must not be empty")
    try:
        size_bytes = len(blob_id.encode())
    except UnicodeEncodeError:
        raise InvalidBlobId("a blob id must be valid UTF-8") from None
    if size_bytes > BLOB_ID_BYTES_MAX:
        raise InvalidBlobId(f"a blob id must have at most {BLOB_ID_BYTES_MAX} bytes")
    if any(unicodedata.category(character) == "Cc" for character in blob_id):
        raise InvalidBlobId("a blob id must not have control characters")
    if any(segment in (".", "..") for segment in blob_id.split("/")):
        raise InvalidBlobId("a blob id must not have '.' or '..' segments")
    return blob_id


def check_joined_id(blob_id: str) -> str:
    """Return an id unchanged if it is a relative path of non-empty segments.

    Stricter than `check_path_id`: where an id is joined to a folder or a path by one `/`, an
    empty segment would name the same blob twice, or the root.

    Raises:
        InvalidBlobId: As `check_path_id`, or a segment is empty.
    """
    check_path_id(blob_id)
    if any(not segment for segment in blob_id.split("/")):
        raise InvalidBlobId("a blob id must not have empty segments here")
    return blob_id


def canonical_digest(blob_id: str) -> str:
    """Return `sha256:<hex>` for that form or for the bare hex.

    Raises:
        InvalidBlobId: It is neither.
    """
    if _DIGEST.fullmatch(blob_id):
        return blob_id
    if _HEX_DIGEST.fullmatch(blob_id):
        return f"sha256:{blob_id}"
    raise InvalidBlobId("a registry's blob id must be 'sha256:' and 64 lower-case hex digits")


def is_repository(name: str) -> bool:
    """Whether a name is a repository's in the OCI distribution-spec's grammar."""
    return len(name) <= REPOSITORY_CHARACTERS_MAX and _REPOSITORY.fullmatch(name) is not None


def split_repository_id(blob_id: str) -> tuple[str, str]:
    """Return repository and `sha256:<hex>` of `<repository>/sha256:<hex>`.

    Raises:
        InvalidBlobId: It has another form.
    """
    check_path_id(blob_id)
    repository, slash, digest = blob_id.rpartition("/")
    if not slash or not is_repository(repository) or not _DIGEST.fullmatch(digest):
        raise InvalidBlobId("a blob id must be '<repository>/sha256:<64 hex digits>' here")
    return repository, digest


@dataclass(frozen=True, slots=True)
class RegistryId:
    """What a registry's blob id names: a blob or a manifest, by digest."""

    repository: str
    """"" where the id names none: the configuration does."""
    digest: str
    is_manifest: bool

    def __str__(self) -> str:
        """Return the id's canonical form."""
        if self.is_manifest:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}/{self.digest}" if self.repository else self.digest


def parse_registry_id(blob_id: str, repository: str) -> RegistryId:
    """Read a registry's blob id.

    A manifest is `<repository>@sha256:<hex>`, as image references have it: no repository's name
    has an `@`, so it is never taken for a blob. A blob is `<repository>/sha256:<hex>`, or a digest
    alone where the configuration names the repository.

    Args:
        repository: The only one there is; "" where ids name theirs.

    Raises:
        InvalidBlobId: It has none of these forms, or names another repository.
    """
    name, at, digest = blob_id.rpartition("@")
    if at:
        is_sound = is_repository(name) and _DIGEST.fullmatch(digest)
        if not is_sound or (repository and name != repository):
            raise InvalidBlobId(
                "a manifest's id must be '<repository>@sha256:<64 hex digits>' here"
            )
        return RegistryId(name, digest, is_manifest=True)
    if repository:
        return RegistryId("", canonical_digest(blob_id), is_manifest=False)
    return RegistryId(*split_repository_id(blob_id), is_manifest=False)
