"""A data server with a mirror over a real cache, in this process, before a fake registry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from tests.unit.data.twin import TwinObserver
from tests.unit.data.wire import Answer, connected
from tests.unit.mirror.fake_registry import FakeRegistry

from blobcache_agent.configs import Configs
from blobcache_agent.data.limits import Limits
from blobcache_agent.data.server import DataServer
from blobcache_agent.data.tokens import AllowAll
from blobcache_agent.mirror.bindings import Bindings, parse_binding
from blobcache_agent.mirror.mirror import Mirror
from blobcache_agent.settings import Permissions
from blobcache_agent.translate import Resource, Wanted
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.open import BackendEnvironment
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.credentials import Anonymous, BasicAuth, Credentials
from blobcache_storage.factory import BlobFactory

OWN_USER = "own"
"""Whose credential the configuration has."""


def wanted(
    registry_host: str,
    *,
    namespace: str = "team",
    name: str = "images",
    credentials: Credentials | None = None,
    **registry: Any,
) -> Wanted:
    """Return a configuration of a registry."""
    backend: dict[str, Any] = {
        "type": "Registry",
        "registry": {"host": registry_host, "scheme": "http", **registry},
        "retryLimit": 0,
    }
    if credentials is not None:
        backend["credentialsSecretRef"] = {"name": "own"}
    spec = BlobCacheConfigSpec.model_validate({"backend": backend})
    resource = Resource(namespace, name, f"uid-{namespace}-{name}", spec)
    return Wanted(resource, credentials or Anonymous())


def own_credentials() -> BasicAuth:
    """Return the configuration's own credential."""
    return BasicAuth(OWN_USER, SecretStr(f"secret-{OWN_USER}"))


@dataclass
class World:
    """What runs."""

    host: str
    port: int
    configs: Configs
    mirror: Mirror
    observer: TwinObserver

    async def ask(
        self, path: str, authorization: str | None = None, *, method: str = "GET", **headers: str
    ) -> Answer:
        """Ask once, on a connection of its own."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if authorization is not None:
            sent["Authorization"] = authorization
        async with connected(self.host, self.port) as wire:
            return await wire.ask(method, path, sent)


@asynccontextmanager
async def running_world(
    folder: Path, registry: FakeRegistry, *configs: Wanted, bindings: Sequence[str] = ()
) -> AsyncIterator[World]:
    """Run it: by default `team/images`, with a credential of its own, for the registry's host."""
    policy = AddressPolicy(in_cluster=False)
    runtime = StorageRuntime()
    factory = BlobFactory(runtime, BackendEnvironment(policy=policy))
    await factory.open_root(str(folder / "cache"))
    served = Configs(factory, Permissions(), str(folder / "cache"))
    given = configs or (wanted(registry.host, credentials=own_credentials()),)
    await served.replace(given)
    bound = bindings or (f"{registry.host}=team/images",)
    mirror = Mirror(Bindings(map(parse_binding, bound)), served, policy)
    observer = TwinObserver()
    server = DataServer(served, AllowAll(), observer, Limits(), mirror)
    host, port = await server.start("127.0.0.1", 0)
    try:
        yield World(host, port, served, mirror, observer)
    finally:
        await server.stop(grace_seconds=1)
        await mirror.close()
        await factory.close()
        await runtime.close()
    assert not observer.errors, observer.errors
