"""From a request's path to the manifest or blob it names, as strictly as the grammar is.

Reference: OCI distribution-spec, "Pulling manifests"; containerd's `ns` query (its
docs/registry.md). Nothing that does not match is passed on or guessed at: no repository's name,
tag or digest has an escape in it, so a `%` in the path is enough to be refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from blobcache_agent.data.rejection import Rejection
from blobcache_storage.backend.blob_id import is_repository
from blobcache_storage.backend.registry_inquiry import Kind, is_reference

PREFIX = "/v2/"
BASE_PATHS = ("/v2", PREFIX)
QUERY_CHARACTERS_MAX = 1024

_RESOURCE = re.compile(r"/v2/([a-z0-9._/-]+)/(manifests|blobs)/([A-Za-z0-9._:+=-]+)")
_NAMESPACE_HEADER = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


@dataclass(frozen=True, slots=True)
class OCIPath:
    """What `/v2/{repository}/{manifests|blobs}/{reference}` names."""

    repository: str
    kind: Kind
    reference: str
    """`sha256:<hex>`, or for manifests a tag."""

    @property
    def is_tag(self) -> bool:
        """Whether the reference has to be resolved."""
        return not self.reference.startswith("sha256:")


def is_mirror_path(path: str) -> bool:
    """Whether a request target belongs to the mirror."""
    return path.startswith(PREFIX) or path.partition("?")[0] == "/v2"


def parse_oci_path(path: str) -> OCIPath | None:
    """Return what a request target names; None for the API's base.

    Raises:
        Rejection: 404, with the reason NameInvalid, DigestInvalid, TagInvalid or NotFound.
    """
    path = path.partition("?")[0]
    if path in BASE_PATHS:
        return None
    match = _RESOURCE.fullmatch(path)
    if match is None:
        raise Rejection(404, "NotFound", "manifests and blobs can be pulled here, nothing else")
    repository, kind, reference = match.groups()
    if not is_repository(repository):
        raise Rejection(404, "NameInvalid", "this is no repository's name")
    found: Kind = "manifests" if kind == "manifests" else "blobs"
    if not is_reference(found, reference):
        if found == "blobs" or ":" in reference:
            raise Rejection(404, "DigestInvalid", "a digest must be 'sha256:' and 64 hex digits")
        raise Rejection(404, "TagInvalid", "this is no tag")
    return OCIPath(repository, found, reference)


def parse_host_asked(path: str, header: str | None) -> str | None:
    """Return the registry host a client means, None if it does not say.

    Args:
        path: The request target; `ns` in its query counts first.
        header: OCI-Namespace.

    Raises:
        Rejection: 400: it says it in two ways, or in one that cannot be read.
    """
    query = path.partition("?")[2]
    if len(query) > QUERY_CHARACTERS_MAX:
        raise Rejection(400, "BadRequest", "the query is too long")
    given = {
        unquote(value, errors="replace")
        for name, _, value in (part.partition("=") for part in query.split("&"))
        if name == "ns"
    }
    if header is not None:
        given.add(header)
    if not given:
        return None
    host = given.pop()
    if given or not _NAMESPACE_HEADER.fullmatch(host):
        raise Rejection(400, "BadRequest", "`ns` must name one registry host")
    return host
