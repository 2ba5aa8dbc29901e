"""Asking a registry on behalf of a caller, where the registry answers oddly."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from pydantic import SecretStr

from blobcache_storage.backend import registry_inquiry
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.manners import CONNECTIONS_MAX, SlotsBusy
from blobcache_storage.backend.registry import RegistryBackend
from blobcache_storage.backend.registry_inquiry import Finding, RegistryInquiry
from blobcache_storage.config import BackendConfig, RegistryConfig
from blobcache_storage.credentials import BasicAuth
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import (
    ConfigError,
    InvalidBlobId,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
    RangeNotSatisfiable,
)

DIGEST = "sha256:" + "0" * 64
CALLER = SecretStr("Bearer canary-91")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Run a server and yield its host and port."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def asking(host: str) -> AsyncIterator[RegistryInquiry]:
    """Make an inquiry of a configuration with a credential, which must never be seen."""
    config = BackendConfig(
        type="registry",
        registry=RegistryConfig(host, scheme="http"),
        credentials=BasicAuth("own", SecretStr("own")),
        timeout_seconds=2,
        connect_timeout_seconds=2,
    )
    inquiry = RegistryInquiry(config, policy=AddressPolicy(in_cluster=False))
    try:
        yield inquiry
    finally:
        await inquiry.close()


@pytest.mark.parametrize(
    ("response", "finding"),
    [
        ({"status": 200, "content_type": "text/html"}, Finding(403)),
        ({"status": 403}, Finding(403)),
        ({"status": 404}, Finding(404)),
        ({"status": 405}, Finding(405)),
        ({"status": 401}, Finding(401)),
        (
            {"status": 401, "headers": {"WWW-Authenticate": 'Basic realm="a"'}},
            Finding(401, challenges=('Basic realm="a"',)),
        ),
        ({"status": 416}, Finding(200, DIGEST)),
    ],
)
async def test_answers(response: dict[str, object], finding: Finding) -> None:
    """What each means for a caller with a credential, who is sent to nobody else."""
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.Response(**response)  # type: ignore[arg-type]

    async with serving(answer) as host, asking(host) as inquiry:
        assert await inquiry.ask("a", "blobs", DIGEST, CALLER) == finding
    assert seen == [CALLER.get_secret_value()]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, OriginServerError),
        (503, OriginThrottled),
        (429, OriginThrottled),
        (304, OriginProtocolError),
    ],
)
async def test_errors(status: int, error: type[Exception]) -> None:
    """What is no answer is raised, and never names the caller's credential."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with serving(answer) as host, asking(host) as inquiry:
        with pytest.raises(error) as caught:
            await inquiry.ask("a", "manifests", "v1", CALLER)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("status", "found"), [(403, 403), (401, 403), (404, 404), (206, 200)])
async def test_a_storage_host_has_no_say_in_who_may(status: int, found: int) -> None:
    """Its refusals are no challenge, and it sees no credential."""
    seen = []

    async def store(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=status, headers={"WWW-Authenticate": "Basic"})

    async with serving(store) as storage:

        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": f"http://{storage}/x"})

        async with serving(answer) as host, asking(host) as inquiry:
            finding = await inquiry.ask("a", "blobs", DIGEST, CALLER)
    assert (finding.status, finding.challenges) == (found, ())
    assert seen == [None]


async def test_a_strange_realm_is_the_callers_business() -> None:
    """An anonymous caller gets the challenge; nothing is sent there by us."""
    challenge = 'Bearer realm="http://realm.example/token",service="x"'
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    async with serving(answer) as host, asking(host) as inquiry:
        finding = await inquiry.ask("a", "manifests", "v1", None)
    assert finding == Finding(401, challenges=(challenge,))
    assert seen == [None]


@pytest.mark.parametrize("token_status", [401, 403])
async def test_no_tokens_for_strangers(token_status: int) -> None:
    """Then the registry's own challenge says what is needed, each time."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/token":
            return web.Response(status=token_status)
        realm = f'Bearer realm="http://{request.host}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": realm})

    async with serving(answer) as host, asking(host) as inquiry:
        for _ in range(2):
            finding = await inquiry.ask("a", "manifests", "v1", None)
            assert (finding.status, len(finding.challenges)) == (401, 1)


async def test_a_token_service_that_is_down() -> None:
    """The registry is as good as down for who shows nothing."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/token":
            return web.Response(status=500)
        realm = f'Bearer realm="http://{request.host}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": realm})

    async with serving(answer) as host, asking(host) as inquiry:
        with pytest.raises(OriginServerError):
            await inquiry.ask("a", "manifests", "v1", None)


async def test_challenges_fit_for_a_header_line() -> None:
    """What is not one line of visible ASCII, or too long, is left out."""
    values = ["Basic", "B\xe4sic", "Basic " + "x" * 5000, *["Digest"] * 20]

    async def answer(request: web.Request) -> web.Response:
        response = web.Response(status=401)
        for value in values:
            response.headers.add("WWW-Authenticate", value)
        return response

    async with serving(answer) as host, asking(host) as inquiry:
        finding = await inquiry.ask("a", "blobs", DIGEST, CALLER)
    assert finding.challenges == ("Basic", *["Digest"] * 5)


async def test_nobody_there() -> None:
    """A dead registry is an error, and so is a name that cannot be."""
    async with serving(lambda request: web.Response()) as host:  # type: ignore[arg-type, return-value]
        pass
    async with asking(host) as inquiry:
        with pytest.raises(OriginUnreachable):
            await inquiry.ask("a", "blobs", DIGEST, None)
        for repository, reference in (("A", "v1"), ("a", "-"), ("a/../b", "v1"), ("a", "x/y")):
            with pytest.raises(InvalidBlobId):
                await inquiry.ask(repository, "manifests", reference, None)
    with pytest.raises(ConfigError):
        RegistryInquiry(BackendConfig(type="s3"), policy=AddressPolicy(in_cluster=True))


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        (RangeRequest(first=100_000, last=199_999), slice(100_000, 200_000)),
        (RangeRequest(first=250_000), slice(250_000, None)),
        (RangeRequest(first=0, last=9), slice(0, 10)),
        (RangeRequest(suffix_length=7), slice(-7, None)),
        (RangeRequest(), slice(None)),
    ],
)
async def test_a_part_of_a_manifest(wanted: RangeRequest, part: slice) -> None:
    """Registries send manifests whole; the part a cache has lost is cut from it."""
    manifest = bytes(range(256)) * 1000
    named = "sha256:" + hashlib.sha256(manifest).hexdigest()

    async def answer(request: web.Request) -> web.Response:
        assert "Range" not in request.headers
        return web.Response(body=manifest)

    async with serving(answer) as host:
        config = BackendConfig(type="registry", registry=RegistryConfig(host, scheme="http"))
        backend = RegistryBackend(config, policy=AddressPolicy(in_cluster=False))
        try:
            async with await backend.fetch(f"a@{named}", wanted) as stream:
                body = b"".join([piece async for piece in stream])
            assert body == manifest[part]
            assert stream.span.length == len(body)
            with pytest.raises(RangeNotSatisfiable):
                await backend.fetch(f"a@{named}", RangeRequest(first=len(manifest)))
        finally:
            await backend.shutdown()


async def test_a_silent_registry_keeps_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who asked, nor who waits for a turn; a late answer harms nobody."""
    monkeypatch.setattr(registry_inquiry, "INQUIRY_SECONDS_MAX", 1.0)
    monkeypatch.setattr(registry_inquiry, "SLOT_WAIT_SECONDS_MAX", 0.2)
    gate = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        await gate.wait()
        return web.Response()

    async with serving(answer) as host, asking(host) as inquiry:
        questions = [inquiry.ask("a", "manifests", f"t{number}", CALLER) for number in range(80)]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        assert [type(found) for found in answers].count(SlotsBusy) == 80 - CONNECTIONS_MAX
        assert [type(found) for found in answers].count(OriginTimeout) == CONNECTIONS_MAX
        gate.set()
