"""A registry's tokens: asked for once, only for pulling, only where they may go."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from multidict import CIMultiDict
from pydantic import SecretStr
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.backend.registry import RegistryBackend
from blobcache_storage.config import BackendConfig, RegistryConfig
from blobcache_storage.credentials import Anonymous, BasicAuth, BearerToken, Credentials
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import (
    ConfigError,
    InvalidBlobId,
    OriginDenied,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginUnreachable,
    StorageError,
)
from blobcache_storage.testing.fault_origin import Answer, FaultOrigin, Misbehaviour, Request
from blobcache_storage.testing.origin_guards import HeaderGuard, RegistryGuard, basic

DATA = b"layer" * 1000
HEX = hashlib.sha256(DATA).hexdigest()
ID = f"sha256:{HEX}"
LOGIN = BasicAuth("robot", SecretStr("hunter2"))


@dataclass
class Registry:
    """A registry with a token service, and the means to open it."""

    origin: FaultOrigin
    guard: RegistryGuard
    open_any: OpenBackend

    def open(self, credentials: Credentials = LOGIN, **section: Any) -> BlobBackend:
        """Open a backend of it."""
        section = {"repository": "team/app", "scheme": "http", **section}
        return self.open_any(self.config(credentials, **section))

    def config(self, credentials: Credentials, **section: Any) -> BackendConfig:
        """Return a configuration of it."""
        registry = RegistryConfig(host=self.origin.host, **section)
        return BackendConfig(
            type="registry", registry=registry, credentials=credentials, retry_limit=0
        )

    def asked_for_tokens(self) -> list[Request]:
        """Return the requests for tokens."""
        return [request for request in self.origin.requests if request.raw_path == "/token"]


@pytest.fixture
async def registry(open_any: OpenBackend) -> AsyncIterator[Registry]:
    """A registry that wants the login."""
    guard = RegistryGuard(lambda: origin.url, login=basic("robot", "hunter2"))
    async with FaultOrigin(guard) as origin:
        for repository in ("team/app", "team/other"):
            origin.put(f"/v2/{repository}/blobs/{ID}", DATA)
        yield Registry(origin, guard, open_any)


async def read(backend: BlobBackend, blob_id: str = ID) -> bytes:
    """Read a whole blob."""
    async with await backend.fetch(blob_id, RangeRequest()) as stream:
        return b"".join([piece async for piece in stream])


async def test_one_token_serves_a_crowd(registry: Registry) -> None:
    """A hundred readers at once cost one token."""
    backend = registry.open()
    assert set(await asyncio.gather(*(read(backend) for _ in range(100)))) == {DATA}
    assert registry.guard.issued == 1
    assert await read(backend) == DATA
    assert registry.guard.issued == 1


async def test_only_pulling_is_asked_for(registry: Registry) -> None:
    """The scope is pull on the one repository, though the challenge offers more."""
    await read(registry.open())
    (request,) = registry.asked_for_tokens()
    assert request.query == {"scope": "repository:team/app:pull", "service": "registry.test"}
    assert request.headers["authorization"] == basic("robot", "hunter2")


async def test_each_repository_has_its_own_token(registry: Registry) -> None:
    """Without a repository in the configuration ids name theirs, and so do tokens."""
    backend = registry.open(repository="")
    for repository in ("team/app", "team/other", "team/app"):
        assert await read(backend, f"{repository}/{ID}") == DATA
    assert registry.guard.issued == 2


async def test_anonymous_tokens(registry: Registry) -> None:
    """Public repositories give tokens to those without a login."""
    registry.guard.login = None
    assert await read(registry.open(Anonymous())) == DATA
    assert "authorization" not in registry.asked_for_tokens()[0].headers


async def test_a_revoked_token_is_renewed_once(registry: Registry) -> None:
    """A refused token is replaced, once however many requests it was refused to."""
    backend = registry.open()
    await read(backend)
    registry.guard.revoke()
    assert set(await asyncio.gather(*(read(backend) for _ in range(20)))) == {DATA}
    assert registry.guard.issued == 2


async def test_a_late_refusal_of_an_old_token_renews_nothing(registry: Registry) -> None:
    """Who is refused with a token that was replaced meanwhile takes the new one."""
    backend = registry.open()
    assert isinstance(backend, RegistryBackend)
    await read(backend)
    refusal = registry.guard(Request("GET", f"/v2/team/app/blobs/{ID}", {}))
    assert refusal is not None
    answer = cast("aiohttp.ClientResponse", SimpleNamespace(headers=CIMultiDict(refusal.headers)))
    assert await backend._tokens.challenged("team/app", answer, "Bearer old")
    assert registry.guard.issued == 1


async def test_a_token_is_renewed_before_it_ends(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token near its end is replaced without waiting to be refused."""
    now = 1000.0
    backend = registry.open()
    assert isinstance(backend, RegistryBackend)
    monkeypatch.setattr(backend._tokens, "_clock", lambda: now)
    registry.guard.lifetime_seconds = 100
    await read(backend)
    now += 79
    await read(backend)
    assert registry.guard.issued == 1
    now += 2
    await read(backend)
    assert registry.guard.issued == 2
    refused = [r for r in registry.origin.requests if "authorization" not in r.headers]
    assert len(refused) == 1


async def test_a_wrong_login_is_denied(registry: Registry) -> None:
    """A login the token service does not know is OriginDenied, and is not tried again."""
    backend = registry.open(BasicAuth("robot", SecretStr("wrong")))
    with pytest.raises(OriginDenied, match="refused"):
        await read(backend)
    assert len(registry.origin.requests) == 2


async def test_new_credentials_replace_tokens(registry: Registry) -> None:
    """After a rotation no token got with the old login is used."""
    backend = registry.open()
    await read(backend)
    old = registry.origin.requests[-1].headers["authorization"]
    registry.guard.login = basic("robot", "second")
    backend.reconfigure(
        registry.config(
            BasicAuth("robot", SecretStr("second")), repository="team/app", scheme="http"
        )
    )
    assert await read(backend) == DATA
    assert registry.origin.requests[-1].headers["authorization"] != old
    assert registry.asked_for_tokens()[-1].headers["authorization"] == basic("robot", "second")


@pytest.mark.parametrize(
    "realm", ["http://127.0.0.1:1/token", "http://evil.test/token", "", "//x", "http://[", "x:y"]
)
async def test_a_realm_elsewhere_gets_nothing(registry: Registry, realm: str) -> None:
    """A registry cannot have its credentials sent to another host."""
    registry.guard.realm = realm or " "
    with pytest.raises(OriginDenied, match="realm"):
        await read(registry.open())
    assert len(registry.origin.requests) == 1


async def test_an_unreadable_challenge(registry: Registry) -> None:
    """A challenge that breaks the grammar is not guessed at."""
    registry.origin.guard = lambda request: Answer(401, {"WWW-Authenticate": 'Bearer realm="x'})
    with pytest.raises(OriginProtocolError, match="challenge"):
        await read(registry.open())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(200, {}, b"not json"), OriginProtocolError),
        (Answer(200, {}, b"[]"), OriginProtocolError),
        (Answer(200, {}, b"{}"), OriginProtocolError),
        (Answer(200, {}, b'{"token": ""}'), OriginProtocolError),
        (Answer(200, {}, b'{"token": 7}'), OriginProtocolError),
        (Answer(200, {}, b'{"token": "a\\r\\nX-Evil: 1"}'), OriginProtocolError),
        (Answer(200, {}, b'{"token": "' + b"x" * 20_000 + b'"}'), OriginProtocolError),
        (Answer(200, {}, b" " * 100_000), OriginProtocolError),
        (Answer(200, {}, b"[" * 60_000), OriginProtocolError),
        (Answer(404), OriginProtocolError),
        (Answer(400), OriginDenied),
        (Answer(500), OriginServerError),
        (Answer(503, {"Retry-After": "20"}), OriginThrottled),
    ],
    ids=range(13),
)
async def test_a_bad_token_service(
    registry: Registry, answer: Answer, error: type[StorageError]
) -> None:
    """Whatever the token service sends is bounded, checked, and named."""
    inner = registry.guard

    def guard(request: Request) -> Answer | None:
        return answer if request.raw_path == "/token" else inner(request)

    registry.origin.guard = guard
    with pytest.raises(error, match="token service"):
        await read(registry.open())


@pytest.mark.parametrize("name", ["token", "access_token"])
@pytest.mark.parametrize("expires", ["", ',"expires_in": null', ',"expires_in": "soon"'])
async def test_both_names_of_a_token(registry: Registry, name: str, expires: str) -> None:
    """Either field will do, with or without a lifetime."""
    inner = registry.guard
    inner.tokens["abc"] = "repository:team/app:pull"
    answer = Answer(200, {}, f'{{"{name}": "abc"{expires}}}'.encode())

    def guard(request: Request) -> Answer | None:
        return answer if request.raw_path == "/token" else inner(request)

    registry.origin.guard = guard
    assert await read(registry.open()) == DATA


async def test_credentials_stay_behind_at_a_redirect(registry: Registry) -> None:
    """The storage host sees range and no credential; its own challenge is not taken up."""
    async with FaultOrigin() as storage:
        storage.put(f"/{ID}", DATA)
        registry.origin.redirects = lambda request: f"{storage.url}/{ID}?X-Sig=1"
        backend = registry.open()
        assert await read(backend) == DATA
        await backend.stat(ID)
        challenge = {"WWW-Authenticate": f'Bearer realm="{storage.url}/token"'}
        storage.always = Misbehaviour(answer=Answer(401, challenge))
        with pytest.raises(OriginDenied):
            await read(backend)
        assert all("authorization" not in request.headers for request in storage.requests)
        assert {request.raw_path for request in storage.requests} == {f"/{ID}"}
        own_realm = {"WWW-Authenticate": f'Bearer realm="{registry.origin.url}/token"'}
        storage.always = Misbehaviour(answer=Answer(401, own_realm))
        issued = registry.guard.issued
        with pytest.raises(OriginDenied):
            await read(backend)
        assert registry.guard.issued == issued


async def test_a_redirect_is_taken_again_without_asking(registry: Registry) -> None:
    """Further ranges go straight to the storage host, until it refuses or credentials change."""
    async with FaultOrigin() as storage:
        storage.put(f"/{ID}", DATA)
        registry.origin.redirects = lambda request: f"{storage.url}/{ID}?X-Sig=1"
        backend = registry.open()
        await read(backend)
        asked = len(registry.origin.requests)
        assert await read(backend) == DATA
        assert len(registry.origin.requests) == asked
        assert len(storage.requests) == 2
        for status in (401, 403, 404, 500):
            storage.misbehave(Misbehaviour(answer=Answer(status)))
            assert await read(backend) == DATA
            asked += 1
            assert len(registry.origin.requests) == asked
        await backend.stat(ID)
        assert len(registry.origin.requests) == asked + 1
        backend.reconfigure(registry.config(LOGIN, repository="team/app", scheme="http"))
        await read(backend)
        assert len(registry.origin.requests) == asked + 2


async def test_a_storage_host_that_is_gone_is_not_asked_for_ever(registry: Registry) -> None:
    """After a failure at the storage host the registry is asked where to go now."""
    async with FaultOrigin() as old, FaultOrigin() as new:
        for storage in (old, new):
            storage.put(f"/{ID}", DATA)
        places = [old, new]
        registry.origin.redirects = lambda request: f"{places.pop(0).url}/{ID}"
        backend = registry.open()
        await read(backend)
        await old.stop()
        with pytest.raises(OriginUnreachable):
            await read(backend)
        assert await read(backend) == DATA


@pytest.mark.parametrize("status", [429, 503])
async def test_a_storage_host_that_is_busy_is_left_alone(registry: Registry, status: int) -> None:
    """Its Retry-After counts: the registry would send us back there at once."""
    async with FaultOrigin() as storage:
        storage.put(f"/{ID}", DATA)
        registry.origin.redirects = lambda request: f"{storage.url}/{ID}"
        backend = registry.open()
        await read(backend)
        storage.misbehave(Misbehaviour(answer=Answer(status, {"Retry-After": "7"})))
        with pytest.raises(OriginThrottled) as caught:
            await read(backend)
        assert caught.value.retry_after_seconds == 7
        assert len(storage.requests) == 2
        assert await read(backend) == DATA


async def test_a_token_service_that_redirects_away_gets_no_login(registry: Registry) -> None:
    """The login is not carried along to another host."""
    inner = registry.guard
    async with FaultOrigin() as other:
        other.put("/token", b'{"token": "abc"}')

        def guard(request: Request) -> Answer | None:
            if request.raw_path == "/token":
                return Answer(307, {"Location": f"{other.url}/token"})
            return inner(request)

        registry.origin.guard = guard
        with pytest.raises(OriginDenied):
            await read(registry.open())
        assert all("authorization" not in request.headers for request in other.requests)


async def test_a_fixed_token_is_sent_as_it_is(registry: Registry) -> None:
    """A configured bearer token needs no token service, and its refusal is final."""
    registry.origin.guard = HeaderGuard("Bearer fixed")
    assert await read(registry.open(BearerToken(SecretStr("fixed")))) == DATA
    with pytest.raises(OriginDenied):
        await read(registry.open(BearerToken(SecretStr("other"))))
    assert len(registry.origin.requests) == 2


async def test_basic_credentials_are_sent_once_asked_for(registry: Registry) -> None:
    """A registry with Basic gets it after its challenge, and then at once."""
    registry.origin.guard = HeaderGuard(basic("robot", "hunter2"))
    backend = registry.open()
    assert await read(backend) == await read(backend) == DATA
    assert len(registry.origin.requests) == 3
    with pytest.raises(OriginDenied):
        await read(registry.open(Anonymous()))
    with pytest.raises(OriginDenied):
        await read(registry.open(BasicAuth("robot", SecretStr("wrong"))))


async def test_a_cancelled_reader_leaves_the_token_to_the_others(registry: Registry) -> None:
    """The token request goes on when the reader who began it gives up."""
    gate = asyncio.Event()
    inner, asked = registry.guard, asyncio.Event()
    registry.guard.login = None
    backend = registry.open(Anonymous())

    def guard(request: Request) -> Answer | None:
        if request.raw_path == "/token":
            asked.set()
        return inner(request)

    registry.origin.guard = guard
    first = asyncio.create_task(read(backend))
    second = asyncio.create_task(read(backend))
    await asked.wait()
    first.cancel()
    gate.set()
    assert await second == DATA
    await asyncio.gather(first, return_exceptions=True)


async def test_answers_for_another_digest_are_refused(registry: Registry) -> None:
    """A registry that says it sends another blob is believed."""
    registry.origin.always = Misbehaviour(headers={"Docker-Content-Digest": "sha256:" + "0" * 64})
    with pytest.raises(OriginProtocolError, match="digest"):
        await read(registry.open())


def test_ids_and_digests(registry: Registry) -> None:
    """Bare hex is canonicalised; the digest is known from the id."""
    one = registry.open()
    assert one.check_blob_id(HEX) == one.check_blob_id(ID) == ID
    assert one.digest_of(HEX) == ID
    many = registry.open(repository="")
    assert many.check_blob_id(f"team/app/{ID}") == f"team/app/{ID}"
    assert many.digest_of(f"team/app/{ID}") == ID
    for blob_id in (ID, HEX, f"Team/{ID}", f"a//b/{ID}", f"/a/{ID}", f"a/{HEX}", f"a/{ID}/"):
        with pytest.raises(InvalidBlobId):
            many.check_blob_id(blob_id)
    for blob_id in (ID.upper(), HEX[:-1], f"sha512:{HEX}", f"a/{ID}", f"{ID}\n"):
        with pytest.raises(InvalidBlobId):
            one.check_blob_id(blob_id)


@pytest.mark.parametrize(
    "section",
    [
        {"host": "user@registry.test"},
        {"host": "registry.test/path"},
        {"host": "registry.test?x=1"},
        {"host": ""},
        {"host": "registry.test:0"},
        {"host": "registry.test", "scheme": "ftp"},
        {"host": "registry.test", "repository": "../x"},
        {"host": "registry.test", "repository": "Upper/Case"},
    ],
    ids=str,
)
def test_sections_that_cannot_be(open_any: OpenBackend, section: dict[str, str]) -> None:
    """A section that is no registry is an error of the configuration."""
    with pytest.raises(ConfigError, match="registry"):
        open_any(BackendConfig(type="registry", registry=RegistryConfig(**section)))
