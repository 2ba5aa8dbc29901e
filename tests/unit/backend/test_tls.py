"""TLS towards origins: trust is the system's plus the bundle's, and is never given up."""

from __future__ import annotations

import ssl

import pytest
import trustme
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import (
    ConfigError,
    OriginProtocolError,
    OriginTimeout,
    OriginUnreachable,
)
from blobcache_storage.testing.fault_origin import FaultOrigin


@pytest.fixture
def authority() -> trustme.CA:
    """Return a CA nobody trusts by default."""
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the origin's side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_only_a_known_authority_is_trusted(
    authority: trustme.CA, server_tls: ssl.SSLContext, open_proxy: OpenBackend
) -> None:
    """The bundle's authority is trusted, an unknown one is not, insecure needs no trust."""
    bundle = authority.cert_pem.bytes().decode()
    async with FaultOrigin(tls=server_tls) as origin:
        origin.put("/blob", b"bytes")
        with pytest.raises(OriginUnreachable, match="certificate"):
            await open_proxy(origin.url).stat("blob")
        trusting = open_proxy(origin.url, ca_bundle_pem=bundle)
        async with await trusting.fetch("blob", RangeRequest(first=1)) as stream:
            assert b"".join([piece async for piece in stream]) == b"ytes"
        blind = open_proxy(
            origin.url, insecure_skip_verify=True, environment={"permit_insecure": True}
        )
        assert (await blind.stat("blob")).size_bytes == 5


def test_insecure_needs_permission(open_proxy: OpenBackend) -> None:
    """Skipping verification is refused unless the administrator permits it."""
    with pytest.raises(ConfigError, match="InsecureTLSRefused"):
        open_proxy("https://x.test", insecure_skip_verify=True)


def test_a_bundle_must_be_pem(open_proxy: OpenBackend) -> None:
    """A bundle that holds no certificate is an error of the configuration."""
    with pytest.raises(ConfigError, match="caBundle"):
        open_proxy("https://x.test", ca_bundle_pem="not a certificate")


async def test_https_is_never_left(
    authority: trustme.CA,
    server_tls: ssl.SSLContext,
    origin: FaultOrigin,
    open_proxy: OpenBackend,
) -> None:
    """A redirect from https to http is not followed, nor is plain http tried on its own."""
    bundle = authority.cert_pem.bytes().decode()
    async with FaultOrigin(tls=server_tls) as secure:
        secure.redirects = lambda request: f"{origin.url}{request.target}"
        with pytest.raises(OriginProtocolError, match="https to http"):
            await open_proxy(secure.url, ca_bundle_pem=bundle).fetch("blob", RangeRequest())
    secure_url = origin.url.replace("http:", "https:")
    blind = open_proxy(
        secure_url,
        insecure_skip_verify=True,
        connect_timeout_seconds=0.1,
        environment={"permit_insecure": True},
    )
    with pytest.raises((OriginUnreachable, OriginTimeout)):
        await blind.fetch("blob", RangeRequest())
    assert origin.requests == []
