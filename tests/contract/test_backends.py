"""Every backend passes the one suite, against real origins where there are any."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.harness.origins import (
    FIRST_LOGIN,
    SECOND_LOGIN,
    RegistryServer,
    S3Credentials,
    S3Server,
)
from typing_extensions import override

from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.open import BackendEnvironment, open_backend
from blobcache_storage.config import (
    BackendConfig,
    HTTPProxyConfig,
    LocalFSConfig,
    OSSConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import AccessKey, BasicAuth
from blobcache_storage.testing.backend_suite import BackendConformance, Subject
from blobcache_storage.testing.fault_origin import FaultOrigin
from blobcache_storage.testing.memory_backend import MemoryBackend
from blobcache_storage.testing.origin_guards import HeaderGuard, OSSGuard, RegistryGuard, basic

HERE = BackendEnvironment(policy=AddressPolicy(in_cluster=False), localfs_roots=None)
NO_SUCH_DIGEST = "sha256:" + "0" * 64
_serial = itertools.count()


def fresh_name(kind: str) -> str:
    """Return a name no other test of this machine uses at the same time."""
    return f"{kind}-{next(_serial)}-{secrets.token_hex(4)}"


def digest(data: bytes) -> str:
    """Return the id of a registry's blob."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class MemorySubject(Subject):
    """The twin in memory."""

    def __init__(self) -> None:
        self.backend = self.memory = MemoryBackend()

    @override
    async def put(self, name: str, data: bytes) -> str:
        self.memory.put(name, data)
        return name

    @override
    def missing_id(self) -> str:
        return "missing"


class TestMemory(BackendConformance):
    """The twin keeps the contract it is used in place of."""

    @pytest.fixture
    async def subject(self) -> Subject:
        """A backend and its origin."""
        return MemorySubject()


class MemoryDigestSubject(Subject):
    """The twin in memory, with a registry's ids."""

    is_replaceable = False
    further_hostile_ids = ("sha256:abc", "sha256:" + "A" * 64, "md5:" + "0" * 32)

    def __init__(self) -> None:
        self.backend = self.memory = MemoryBackend(digest_ids=True)

    @override
    async def put(self, name: str, data: bytes) -> str:
        self.memory.put(digest(data), data)
        return digest(data)

    @override
    def missing_id(self) -> str:
        return NO_SUCH_DIGEST


class TestMemoryWithDigests(BackendConformance):
    """So it does with digests for ids."""

    @pytest.fixture
    async def subject(self) -> Subject:
        """A backend and its origin."""
        return MemoryDigestSubject()


class LocalFSSubject(Subject):
    """Files in a folder."""

    further_hostile_ids = ("/etc/passwd", "a//b", "a/", "/")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backend = open_backend(
            BackendConfig(type="localfs", localfs=LocalFSConfig(directory=str(folder))),
            environment=HERE,
        )

    @override
    async def put(self, name: str, data: bytes) -> str:
        def write() -> None:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        await asyncio.to_thread(write)
        return name

    @override
    def missing_id(self) -> str:
        return "not/there"


class TestLocalFS(BackendConformance):
    """Files."""

    @pytest.fixture
    async def subject(self, tmp_path: Path) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        subject = LocalFSSubject(tmp_path)
        yield subject
        await subject.backend.shutdown()


class HTTPProxySubject(Subject):
    """A plain HTTP server with basic credentials."""

    further_hostile_ids = ("/a", "a//b", "a/")

    def __init__(self, origin: FaultOrigin, guard: HeaderGuard) -> None:
        self.origin = origin
        self.guard = guard
        self.config = BackendConfig(
            type="http-proxy",
            http_proxy=HTTPProxyConfig(address=origin.url, path="/some/where"),
            credentials=BasicAuth("reader", SecretStr("first")),
        )
        self.backend = open_backend(self.config, environment=HERE)

    @override
    async def put(self, name: str, data: bytes) -> str:
        self.origin.put(f"/some/where/{name}", data)
        return name

    @override
    def missing_id(self) -> str:
        return "missing"

    @override
    async def rotate(self) -> BackendConfig:
        self.guard.authorization = basic("reader", "second")
        return dataclasses.replace(
            self.config, credentials=BasicAuth("reader", SecretStr("second"))
        )


class TestHTTPProxy(BackendConformance):
    """A plain HTTP origin."""

    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        guard = HeaderGuard(basic("reader", "first"))
        async with FaultOrigin(guard) as origin:
            subject = HTTPProxySubject(origin, guard)
            yield subject
            await subject.backend.shutdown()


class TokenRegistrySubject(Subject):
    """A registry with a token service, whose blobs lie on another host."""

    is_replaceable = False
    further_hostile_ids = ("sha256:abc", "team/app/sha256:" + "0" * 64, "a" * 63)

    def __init__(self, origin: FaultOrigin, storage: FaultOrigin, guard: RegistryGuard) -> None:
        self.origin = origin
        self.storage = storage
        self.guard = guard
        self.config = BackendConfig(
            type="registry",
            registry=RegistryConfig(host=origin.host, repository="team/app", scheme="http"),
            credentials=BasicAuth("robot", SecretStr("first")),
        )
        self.backend = open_backend(self.config, environment=HERE)

    @override
    async def put(self, name: str, data: bytes) -> str:
        self.storage.put(f"/bucket/{digest(data)}", data)
        return digest(data).removeprefix("sha256:")

    @override
    def missing_id(self) -> str:
        return NO_SUCH_DIGEST

    @override
    async def rotate(self) -> BackendConfig:
        self.guard.revoke()
        self.guard.login = basic("robot", "second")
        return dataclasses.replace(self.config, credentials=BasicAuth("robot", SecretStr("second")))


class TestTokenRegistry(BackendConformance):
    """A registry with tokens and redirects."""

    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        guard = RegistryGuard(lambda: origin.url, login=basic("robot", "first"))
        async with FaultOrigin() as storage, FaultOrigin(guard) as origin:
            origin.redirects = lambda request: (
                f"{storage.url}/bucket/{request.path.rpartition('/')[2]}?X-Signature=abc"
            )
            subject = TokenRegistrySubject(origin, storage, guard)
            yield subject
            await subject.backend.shutdown()
            assert all("authorization" not in request.headers for request in storage.requests)


class RealRegistrySubject(Subject):
    """The distribution registry, ids with their repository."""

    is_replaceable = False
    further_hostile_ids = (NO_SUCH_DIGEST, "0" * 64, "Team/" + NO_SUCH_DIGEST, "/" + NO_SUCH_DIGEST)

    def __init__(self, server: RegistryServer, config: BackendConfig, repository: str) -> None:
        self.server = server
        self.config = config
        self.repository = repository
        self.backend = open_backend(config, environment=HERE)

    @override
    async def put(self, name: str, data: bytes) -> str:
        found = await asyncio.to_thread(self.server.push_blob, self.repository, data)
        return f"{self.repository}/{found}"

    @override
    def missing_id(self) -> str:
        return f"{self.repository}/{NO_SUCH_DIGEST}"


class TestRealRegistry(BackendConformance):
    """The distribution registry."""

    @pytest.fixture
    async def subject(self, registry_server: RegistryServer) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        section = RegistryConfig(host=registry_server.host, scheme="http")
        config = BackendConfig(type="registry", registry=section)
        subject = RealRegistrySubject(registry_server, config, fresh_name("team/app"))
        yield subject
        await subject.backend.shutdown()


class PrivateRegistrySubject(RealRegistrySubject):
    """The distribution registry with basic credentials."""

    @override
    async def rotate(self) -> BackendConfig:
        await asyncio.to_thread(self.server.set_users, {"reader": SECOND_LOGIN})
        return dataclasses.replace(
            self.config, credentials=BasicAuth("reader", SecretStr(SECOND_LOGIN.password))
        )


class TestPrivateRegistry(BackendConformance):
    """The distribution registry with users."""

    pytestmark = pytest.mark.registry

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[RegistryServer]:
        """One registry for the class."""
        with RegistryServer({"reader": FIRST_LOGIN}) as server:
            yield server

    @pytest.fixture
    async def subject(self, server: RegistryServer) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        await asyncio.to_thread(server.set_users, {"reader": FIRST_LOGIN})
        config = BackendConfig(
            type="registry",
            registry=RegistryConfig(host=server.host, scheme="http"),
            credentials=BasicAuth("reader", SecretStr(FIRST_LOGIN.password)),
        )
        subject = PrivateRegistrySubject(server, config, fresh_name("private"))
        yield subject
        await subject.backend.shutdown()


class S3Subject(Subject):
    """A bucket of an S3 server that enforces signatures."""

    def __init__(self, server: S3Server, bucket: str, user: str, key: S3Credentials) -> None:
        self.server = server
        self.bucket = bucket
        self.user = user
        self.key = key
        self.config = BackendConfig(
            type="s3",
            s3=S3Config(server.url, "us-east-1", bucket, prefix="some prefix/"),
            credentials=AccessKey(key.access_key_id, SecretStr(key.secret_access_key)),
        )
        self.backend = open_backend(self.config, environment=HERE)

    @override
    async def put(self, name: str, data: bytes) -> str:
        await asyncio.to_thread(self.server.put_object, self.bucket, f"some prefix/{name}", data)
        return name

    @override
    def missing_id(self) -> str:
        return "missing"

    @override
    async def rotate(self) -> BackendConfig:
        key = await asyncio.to_thread(self.server.create_another_key, self.user)
        await asyncio.to_thread(self.server.revoke, self.user, self.key)
        return dataclasses.replace(
            self.config,
            credentials=AccessKey(key.access_key_id, SecretStr(key.secret_access_key)),
        )


class TestS3(BackendConformance):
    """moto's S3 server."""

    @pytest.fixture
    async def subject(self, s3_server: S3Server) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        bucket, user = fresh_name("bucket"), fresh_name("user")

        def prepare() -> S3Credentials:
            s3_server.create_bucket(bucket)
            return s3_server.create_reader(user, [bucket])

        subject = S3Subject(s3_server, bucket, user, await asyncio.to_thread(prepare))
        yield subject
        await subject.backend.shutdown()


class OSSSubject(Subject):
    """A bucket of an origin that checks OSS signatures."""

    def __init__(self, origin: FaultOrigin, guard: OSSGuard, signature: str) -> None:
        self.origin = origin
        self.guard = guard
        section = OSSConfig(
            origin.url,
            "bucket",
            prefix="some prefix/",
            region="cn-hangzhou",
            virtual_host=False,
            signature=signature,
        )
        key = AccessKey(guard.access_key_id, SecretStr(guard.secret))
        self.config = BackendConfig(type="oss", oss=section, credentials=key)
        self.backend = open_backend(self.config, environment=HERE)

    @override
    async def put(self, name: str, data: bytes) -> str:
        self.origin.put(f"/bucket/some prefix/{name}", data)
        return name

    @override
    def missing_id(self) -> str:
        return "missing"

    @override
    async def rotate(self) -> BackendConfig:
        self.guard.access_key_id, self.guard.secret = "SECOND", "another secret"
        self.guard.session_token = "session"
        key = AccessKey("SECOND", SecretStr("another secret"), SecretStr("session"))
        return dataclasses.replace(self.config, credentials=key)


class TestOSS(BackendConformance):
    """An origin that checks OSS signatures."""

    @pytest.fixture(params=["V4", "V1"])
    async def subject(self, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
        """A backend and its origin."""
        guard = OSSGuard("FIRST", "a secret")
        async with FaultOrigin(guard) as origin:
            subject = OSSSubject(origin, guard, request.param)
            yield subject
            await subject.backend.shutdown()
            assert set(guard.seen) <= {request.param}
