"""TLS towards origins: system roots plus the configuration's own, 1.2 at least, never less."""

from __future__ import annotations

import functools
import ssl
from typing import Final

from blobcache_storage.errors import ConfigError

CONTEXTS_KEPT: Final = 32
"""Contexts are kept by what they trust: reading the system's roots takes some 20 ms."""


@functools.lru_cache(maxsize=CONTEXTS_KEPT)
def tls_context(ca_bundle_pem: str, *, insecure_skip_verify: bool) -> ssl.SSLContext:
    """Return a client context; blocks while it reads the system's roots.

    Args:
        ca_bundle_pem: Further roots; "" for none.
        insecure_skip_verify: Accept any certificate. The caller checked that it is permitted.

    Raises:
        ConfigError: The bundle cannot be read.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_bundle_pem:
        try:
            context.load_verify_locations(cadata=ca_bundle_pem)
        except (ssl.SSLError, ValueError):
            raise ConfigError("`tls.caBundle` must be PEM certificates") from None
    if insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
