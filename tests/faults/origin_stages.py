"""One origin of each kind, complete: what it is called in a BlobCacheConfig, who may read, where
the bytes are, and other hosts beside it that must be left alone.

All on loopback: 127.0.0.1 is the origin, 127.0.0.2 a stranger that may be dialled, 127.1.0.1 an
address that the agents were not permitted.
"""

from __future__ import annotations

import abc
import contextlib
import ssl
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import trustme
from typing_extensions import override

from blobcache_storage.testing.fault_origin import FaultOrigin, StoredBlob
from blobcache_storage.testing.oracle import ByteOracle
from blobcache_storage.testing.origin_guards import (
    HeaderGuard,
    OSSGuard,
    RegistryGuard,
    S3Guard,
    basic,
)

ORIGIN: Final = "127.0.0.1"
STRANGER: Final = "127.0.0.2"
FORBIDDEN: Final = "127.1.0.1"
PERMITTED_NETWORK: Final = "127.0.0.0/16"
ACCESS_KEY: Final = {"accessKeyID": "AKIDEXAMPLE", "secretAccessKey": "canary-secret-key"}
LOGIN: Final = {"username": "reader", "password": "canary-password"}
CREDENTIAL_HEADERS: Final = ("authorization", "x-amz-security-token", "x-oss-security-token")


@dataclass(slots=True)
class Blob:
    """A blob of the oracle; `version` is what the origin has now."""

    name: str
    size_bytes: int
    version: int = 1


class Trust:
    """Two authorities, of which the configurations trust the first."""

    def __init__(self) -> None:
        known, unknown = trustme.CA(), trustme.CA()
        self.bundle_pem = known.cert_pem.bytes().decode()
        self.trusted = _server_context(known)
        self.untrusted = _server_context(unknown)


def _server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(ORIGIN).configure_cert(context)
    return context


class Stage(abc.ABC):
    """An origin with its neighbours; an async context manager.

    Args:
        trust: Makes the origin speak https.
    """

    kind: ClassVar[str]
    backend_type: ClassVar[str]
    credentials: ClassVar[dict[str, str]]
    requests_cold: ClassVar[int] = 1
    """What a read of a cold blob needs once the stage was asked before."""

    def __init__(self, oracle: ByteOracle, trust: Trust | None = None) -> None:
        self.oracle = oracle
        self.trust = trust
        self.store = FaultOrigin(tls=trust.trusted if trust else None, address=ORIGIN)
        """Where the bytes are."""
        self.door = self.store
        """What is asked first."""
        self.stranger = FaultOrigin(address=STRANGER)
        self.forbidden = FaultOrigin(address=FORBIDDEN)
        self._open = contextlib.AsyncExitStack()

    @property
    def origins(self) -> tuple[FaultOrigin, ...]:
        """All that is rightly asked."""
        return (self.store,) if self.door is self.store else (self.door, self.store)

    async def __aenter__(self) -> Self:
        for server in (*self.origins, self.stranger, self.forbidden):
            await self._open.enter_async_context(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    @property
    def requests(self) -> int:
        """How many requests reached the origin."""
        return sum(len(origin.requests) for origin in self.origins)

    def requests_for(self, blob: Blob) -> int:
        """How many of them were for a blob."""
        end = f"/{self.blob_id(blob)}"
        asked = (request for origin in self.origins for request in origin.requests)
        return sum(request.path.endswith(end) for request in asked)

    @property
    def faults(self) -> int:
        """How many of them were met with a misbehaviour."""
        return sum(origin.faults for origin in self.origins)

    def behave(self) -> None:
        """Do right by all requests to come."""
        for origin in self.origins:
            origin.behave()

    async def heal(self) -> None:
        """End all faults, those of listeners and certificates too."""
        self.behave()
        for origin in self.origins:
            if self.trust is not None and origin.tls is not self.trust.trusted:
                await origin.stop()
                origin.tls = self.trust.trusted
            await origin.start()

    @abc.abstractmethod
    def section(self) -> dict[str, Any]:
        """Return the backend's own section, by its name."""

    def backend(self, **extra: Any) -> dict[str, Any]:
        """Return `spec.backend`."""
        tls = {"tls": {"caBundle": self.trust.bundle_pem}} if self.trust else {}
        secret = {"credentialsSecretRef": {"name": "credentials"}}
        return {"type": self.backend_type, **self.section(), **secret, **tls, **extra}

    def blob_id(self, blob: Blob) -> str:
        """Return what readers call a blob."""
        return blob.name

    @abc.abstractmethod
    def path(self, blob: Blob) -> str:
        """Return where a blob is in the store, percent-decoded."""

    def etag(self, blob: Blob, version: int) -> str:
        """Return the entity tag the agent must serve a version with."""
        return self.oracle.etag(blob.name, version)

    def stored(self, blob: Blob, version: int, etag: str | None = None) -> StoredBlob:
        """Return what a version of a blob is in the store."""
        data = self.oracle.blob(blob.name, version, blob.size_bytes)
        return StoredBlob(data, etag or self.oracle.etag(blob.name, version))

    def put(self, blob: Blob, server: FaultOrigin | None = None) -> None:
        """Store a blob, at the origin or at another server."""
        (server or self.store).blobs[self.path(blob)] = self.stored(blob, blob.version)

    def leaks(self) -> list[str]:
        """Return what reached others and should not have."""
        found = []
        if self.forbidden.connections:
            found.append(f"{self.forbidden.connections} connections to {FORBIDDEN}")
        for request in self.stranger.requests:
            shown = [name for name in CREDENTIAL_HEADERS if name in request.headers]
            if shown or "canary" in f"{request.target}{request.headers}":
                found.append(f"credentials shown to {STRANGER}: {shown}")
        return found


class S3Stage(Stage):
    """S3 with checked signatures."""

    kind = "s3"
    backend_type = "S3"
    credentials = ACCESS_KEY

    def __init__(self, oracle: ByteOracle, trust: Trust | None = None) -> None:
        super().__init__(oracle, trust)
        self.store.guard = S3Guard(ACCESS_KEY["accessKeyID"], ACCESS_KEY["secretAccessKey"])

    @override
    def section(self) -> dict[str, Any]:
        section = {"endpoint": self.store.url, "region": "us-east-1", "bucket": "models"}
        return {"s3": {**section, "prefix": "a b/", "addressing": "Path"}}

    @override
    def path(self, blob: Blob) -> str:
        return f"/models/a b/{blob.name}"


class OSSStage(Stage):
    """OSS with checked signatures."""

    kind = "oss"
    backend_type = "OSS"
    credentials = ACCESS_KEY

    def __init__(self, oracle: ByteOracle, trust: Trust | None = None) -> None:
        super().__init__(oracle, trust)
        self.store.guard = OSSGuard(ACCESS_KEY["accessKeyID"], ACCESS_KEY["secretAccessKey"])

    @override
    def section(self) -> dict[str, Any]:
        return {"oss": {"endpoint": self.store.url, "bucket": "models", "prefix": "a b/"}}

    @override
    def path(self, blob: Blob) -> str:
        return f"/models/a b/{blob.name}"


class HTTPProxyStage(Stage):
    """A plain web server behind a password."""

    kind = "http"
    backend_type = "HTTPProxy"
    credentials = LOGIN

    def __init__(self, oracle: ByteOracle, trust: Trust | None = None) -> None:
        super().__init__(oracle, trust)
        self.store.guard = HeaderGuard(basic(LOGIN["username"], LOGIN["password"]))

    @override
    def section(self) -> dict[str, Any]:
        return {"httpProxy": {"address": self.store.url, "path": "/files"}}

    @override
    def path(self, blob: Blob) -> str:
        return f"/files/{blob.name}"


class RegistryStage(Stage):
    """A registry with a token service, whose blobs lie on another host."""

    kind = "registry"
    backend_type = "Registry"
    credentials = LOGIN
    requests_cold = 2

    def __init__(self, oracle: ByteOracle, trust: Trust | None = None) -> None:
        super().__init__(oracle, trust)
        self.guard = RegistryGuard(
            lambda: self.door.url, login=basic(LOGIN["username"], LOGIN["password"])
        )
        self.door = FaultOrigin(self.guard, self.store.tls, ORIGIN)
        self.door.redirects = lambda request: (
            f"{self.store.url}/storage/{request.path.rpartition('/')[2]}?X-Signature=abc"
        )

    @override
    def section(self) -> dict[str, Any]:
        scheme = "https" if self.trust else "http"
        return {"registry": {"host": self.door.host, "repository": "a/b", "scheme": scheme}}

    @override
    def blob_id(self, blob: Blob) -> str:
        return self.oracle.digest(blob.name, 1, blob.size_bytes)

    @override
    def path(self, blob: Blob) -> str:
        return f"/storage/{self.blob_id(blob)}"

    @override
    def etag(self, blob: Blob, version: int) -> str:
        return f'"{self.blob_id(blob)}"'

    @override
    def behave(self) -> None:
        super().behave()
        self.guard.realm = None
        self.guard.refuse_tokens = False

    @override
    def leaks(self) -> list[str]:
        shown = [r for r in self.store.requests if "authorization" in r.headers]
        return super().leaks() + (["the token shown to the store"] if shown else [])


STAGES: Final[dict[str, type[Stage]]] = {
    stage.kind: stage for stage in (S3Stage, OSSStage, RegistryStage, HTTPProxyStage)
}
