"""Backends before an origin that misbehaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.open import BackendEnvironment, open_backend
from blobcache_storage.config import BackendConfig, HTTPProxyConfig
from blobcache_storage.testing.fault_origin import FaultOrigin

OpenBackend = Callable[..., BlobBackend]


@pytest.fixture
async def origin() -> AsyncIterator[FaultOrigin]:
    """An origin that listens."""
    async with FaultOrigin() as origin:
        yield origin


@pytest.fixture
async def open_any() -> AsyncIterator[OpenBackend]:
    """Opens backends of a configuration and shuts them down."""
    opened: list[BlobBackend] = []

    def open_(config: BackendConfig, **environment: Any) -> BlobBackend:
        environment.setdefault("policy", AddressPolicy(in_cluster=False))
        environment.setdefault("localfs_roots", None)
        opened.append(open_backend(config, environment=BackendEnvironment(**environment)))
        return opened[-1]

    yield open_
    for backend in opened:
        await backend.shutdown()


@pytest.fixture
def open_proxy(open_any: OpenBackend) -> OpenBackend:
    """Opens http-proxy backends of an origin; retries are off unless asked for."""

    def open_(url: str, *, environment: dict[str, Any] | None = None, **config: Any) -> BlobBackend:
        config.setdefault("retry_limit", 0)
        section = HTTPProxyConfig(address=url)
        return open_any(
            BackendConfig(type="http-proxy", http_proxy=section, **config), **environment or {}
        )

    return open_
