"""Errors as registries say them (OCI distribution-spec, "Error codes")."""

from __future__ import annotations

from typing import Any

from blobcache_agent.data.responses import MESSAGE_CHARS_MAX, Failure

_CODES = {
    "BlobNotFound": "BLOB_UNKNOWN",
    "DigestInvalid": "DIGEST_INVALID",
    "DigestMismatch": "DIGEST_INVALID",
    "ManifestNotFound": "MANIFEST_UNKNOWN",
    "ManifestInvalid": "MANIFEST_INVALID",
    "NameInvalid": "NAME_INVALID",
    "TagInvalid": "MANIFEST_UNKNOWN",
}
_CODES_BY_STATUS = {
    401: "UNAUTHORIZED",
    403: "DENIED",
    404: "NAME_UNKNOWN",
    405: "UNSUPPORTED",
    416: "RANGE_INVALID",
    503: "UNAVAILABLE",
}
_CODE_OTHER = "UNKNOWN"


def oci_document(failure: Failure) -> dict[str, Any]:
    """Return the body of an error answer; our own reason goes along as detail."""
    code = _CODES.get(failure.reason) or _CODES_BY_STATUS.get(failure.status, _CODE_OTHER)
    return {
        "errors": [
            {
                "code": code,
                "message": failure.message[:MESSAGE_CHARS_MAX],
                "detail": {"reason": failure.reason},
            }
        ]
    }
