"""Reading endpoints: a URL that says where an origin is and nothing else."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from yarl import URL

from blobcache_storage.errors import ConfigError

ENDPOINT_CHARACTERS_MAX: Final = 2048
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT: Final = re.compile(r"[0-9]{1,5}")


def parse_endpoint(text: str, field: str) -> URL:
    """Return an http or https URL without a trailing slash.

    Args:
        field: What to name in the message.

    Raises:
        ConfigError: It is something else, or has userinfo, a query or a fragment.
    """
    match = re.fullmatch(r"(https?)://([^/?#\\@\s]+)((?:/[^?#\\\s]*)?)", text, re.IGNORECASE)
    if match is None or len(text) > ENDPOINT_CHARACTERS_MAX or not text.isascii():
        raise ConfigError(
            f"`{field}` must be an http or https URL without user, query and fragment"
        )
    scheme, authority, path = match.groups()
    host, colon, port = authority.rpartition(":") if _has_port(authority) else (authority, "", "")
    is_port_sound = not colon or (_PORT.fullmatch(port) and 0 < int(port) < 65536)
    segments = path.split("/")
    if not _HOST.fullmatch(host) or not is_port_sound or "." in segments or ".." in segments:
        raise ConfigError(f"`{field}` must have a host, a port at most, and no dot segments")
    url = f"{scheme.lower()}://{host.lower()}{colon}{port}{path.rstrip('/')}"
    try:
        return URL(url, encoded=True)
    except ValueError:
        raise ConfigError(f"`{field}` must be an http or https URL") from None


def _has_port(authority: str) -> bool:
    return ":" in authority.rpartition("]")[2]


def is_address(host: str | None) -> bool:
    """Whether a URL's host is an IP address."""
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def check_bucket(bucket: str, field: str) -> str:
    """Return a bucket's name.

    Raises:
        ConfigError: It could be more than one label or path segment... or nothing.
    """
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ConfigError(f"`{field}` must be a bucket's name: letters, digits, '-', '_', '.'")
    return bucket


def bucket_url(endpoint: URL, bucket: str, *, virtual_host: bool, field: str) -> str:
    """Return the URL of a bucket, to which a `/` and a quoted key are added.

    Raises:
        ConfigError: The bucket shall be part of a host that is an IP address.
    """
    if not virtual_host:
        return f"{endpoint}".rstrip("/") + f"/{bucket}"
    if is_address(endpoint.host):
        raise ConfigError(f"`{field}` must be a name, not an IP address, to address by host")
    host = f"{bucket}.{endpoint.host}"
    port = "" if endpoint.is_default_port() else f":{endpoint.port}"
    return f"{endpoint.scheme}://{host}{port}{endpoint.raw_path.rstrip('/')}"
