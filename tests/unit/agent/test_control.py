"""The control API over real mutual TLS: who may speak, what is refused, and rotation."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from tests.unit.agent.certificates import AGENT, Authority, Leaf, client_context, write_tls_dir

from blobcache_agent.control import create_control_app
from blobcache_agent.errors import ControlRefused, StalePush, StartError
from blobcache_agent.health import create_health_app
from blobcache_agent.listener import (
    HANDSHAKES_MAX,
    HEALTH_CONNECTIONS_MAX,
    Certificates,
    PlainListener,
    TLSListener,
    bind,
)
from blobcache_agent.settings import ListenAddress
from blobcache_api.agent import (
    ApplyResult,
    DesiredState,
    EvictionRequest,
    EvictionResponse,
    Report,
)
from blobcache_operator.certificates import agent_leaf, create_authority, operator_leaf

STATE = {"epoch": 5, "revision": 1, "node": "node-a"}
CANARY = "canary-55aa"


class FakeNode:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.applied: list[DesiredState] = []
        self.refusal: Exception | None = None
        self.waited: list[tuple[int | None, float]] = []

    async def apply(self, state: DesiredState) -> ApplyResult:
        """Note the state."""
        if self.refusal is not None:
            raise self.refusal
        self.applied.append(state)
        return ApplyResult(epoch=state.epoch, revision=state.revision, digest="")

    async def report(self, after: int | None, wait_seconds: float) -> Report:
        """Note what was asked."""
        self.waited.append((after, wait_seconds))
        return Report.model_validate(
            {
                "node": "node-a",
                "bootId": "b",
                "agentVersion": "1",
                "startTime": "2026-01-31T12:00:00Z",
                "protocol": {"min": 1, "max": 1},
                "change": 7,
                "disk": {"totalBytes": 1, "availableBytes": 1, "usedBytes": 0, "minFreeBytes": 0},
            }
        )

    async def evict(self, request: EvictionRequest) -> EvictionResponse:
        """Find nothing."""
        return EvictionResponse()


class Control:
    """A running control API and its authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.node = FakeNode()
        self.certificates: Certificates
        self.port = 0

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | io.BytesIO | None = None,
        *,
        leaf: Leaf | None = None,
        authority: Authority | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Ask once, as the operator unless told otherwise."""
        trusted = (authority or self.authority).certificate
        shown = leaf or self.authority.operator()
        context = await asyncio.to_thread(client_context, self.folder / "client", trusted, shown)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method,
                f"https://127.0.0.1:{self.port}{path}",
                data=body,
                ssl=context,
                server_hostname=AGENT,
                headers=headers,
            ) as answer,
        ):
            return answer.status, json.loads(await answer.read())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a `tls` directory to be filled."""
    return tmp_path


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    """A running control API."""
    running = Control(tmp_path)
    tls_dir = tmp_path / "tls"
    await asyncio.to_thread(
        write_tls_dir, tls_dir, running.authority.certificate, running.authority.agent()
    )
    running.certificates = await asyncio.to_thread(Certificates, tls_dir)
    runner = web.AppRunner(
        create_control_app(running.node), auto_decompress=False, shutdown_timeout=0.1
    )
    await runner.setup()
    server = runner.server
    assert server is not None
    sock = bind(ListenAddress("127.0.0.1", 0), "--control-listen")
    running.port = sock.getsockname()[1]
    listener = TLSListener(sock, running.certificates, server, lambda: len(server.connections))
    listener.start()
    yield running
    await listener.stop()
    await runner.cleanup()


async def test_the_operator_is_served(control: Control) -> None:
    """A state is taken and its result comes back."""
    status, body = await control.ask("PUT", "/v1/state", json.dumps(STATE).encode())
    assert (status, body["epoch"], body["revision"]) == (200, 5, 1)
    assert control.node.applied[0].node == "node-a"


async def test_the_operators_own_certificates_fit(control: Control, tmp_path: Path) -> None:
    """What the operator issues is what the agent accepts."""
    now = datetime.datetime.now(datetime.UTC)
    authority = create_authority(now)
    server, client = agent_leaf(authority, now), operator_leaf(authority, now)
    await asyncio.to_thread(
        write_tls_dir, tmp_path / "tls", server.bundle, Leaf(server.certificate, server.key)
    )
    assert await asyncio.to_thread(control.certificates.reload)
    fake = Authority()
    fake.certificate = client.bundle
    status, _ = await control.ask(
        "GET", "/v1/report", leaf=Leaf(client.certificate, client.key), authority=fake
    )
    assert status == 200


@pytest.mark.parametrize(
    "uri", ["blobcache://agent", "blobcache://operator/", "blobcache://operator.evil", "x:y"]
)
async def test_other_names_of_the_same_authority_are_refused(control: Control, uri: str) -> None:
    """Signed by the authority is not enough."""
    status, body = await control.ask(
        "PUT", "/v1/state", json.dumps(STATE).encode(), leaf=control.authority.client(uri)
    )
    assert (status, body["code"]) == (403, "NotTheOperator")
    assert control.node.applied == []


async def test_unknown_paths_tell_strangers_nothing(control: Control) -> None:
    """Who may not speak is refused before anything is looked up."""
    status, body = await control.ask("GET", "/x", leaf=control.authority.client("x:y"))
    assert (status, body["code"]) == (403, "NotTheOperator")
    status, body = await control.ask("GET", "/x")
    assert (status, body["code"]) == (404, "NotServed")
    status, body = await control.ask("DELETE", "/v1/state")
    assert (status, body["code"]) == (405, "NotServed")


@pytest.mark.parametrize("kind", ["none", "other authority", "server certificate", "expired"])
async def test_wrong_certificates_get_no_connection(control: Control, kind: str) -> None:
    """TLS itself refuses what the authority did not sign for a client, or what has ended."""
    leaf = {
        "none": None,
        "other authority": Authority("other").operator(),
        "server certificate": control.authority.agent(),
        "expired": control.authority.expired_operator(),
    }[kind]
    context = await asyncio.to_thread(
        client_context, control.folder / "client", control.authority.certificate, leaf
    )
    url = f"https://127.0.0.1:{control.port}/v1/report"
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await session.get(url, ssl=context, server_hostname=AGENT)
    assert control.node.waited == []


async def test_old_tls_is_refused(control: Control) -> None:
    """TLS 1.1 is not spoken."""
    context = await asyncio.to_thread(
        client_context,
        control.folder / "client",
        control.authority.certificate,
        control.authority.operator(),
    )
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await session.get(
                f"https://127.0.0.1:{control.port}/v1/report", ssl=context, server_hostname=AGENT
            )


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[" * 100_000, ""),
        (json.dumps({**STATE, "colour": CANARY}).encode(), "colour"),
        (json.dumps({**STATE, "epoch": CANARY}).encode(), "epoch"),
        (json.dumps({**STATE, "configs": [{"name": CANARY}]}).encode(), "configs[0]"),
        (
            json.dumps({**STATE, "jwks": {"keys": [json.loads("[" * 40 + "]" * 40)]}}).encode(),
            "deep",
        ),
    ],
)
async def test_malformed_states(control: Control, body: bytes, part: str) -> None:
    """400 names the field and quotes no value."""
    status, answer = await control.ask("PUT", "/v1/state", body)
    assert (status, answer["code"]) == (400, "Malformed")
    assert part in answer["message"]
    assert CANARY not in json.dumps(answer)


async def test_messages_are_bounded(control: Control) -> None:
    """Too much is refused with 413; compressed bodies are not expanded."""
    status, answer = await control.ask("PUT", "/v1/state", io.BytesIO(b" " * (17 * 1024 * 1024)))
    assert (status, answer["code"]) == (413, "TooLarge")
    status, answer = await control.ask(
        "PUT", "/v1/state", b"\x1f\x8b" + b"0" * 64, headers={"Content-Encoding": "gzip"}
    )
    assert (status, answer["code"]) == (400, "Malformed")


async def test_refusals_have_their_status(control: Control) -> None:
    """409 names the newest state; other refusals have a code."""
    body = json.dumps(STATE).encode()
    control.node.refusal = StalePush(9, 3)
    assert await control.ask("PUT", "/v1/state", body) == (409, {"epoch": 9, "revision": 3})
    control.node.refusal = ControlRefused(503, "StateNotDurable", "no room")
    status, answer = await control.ask("PUT", "/v1/state", body)
    assert (status, answer) == (503, {"code": "StateNotDurable", "message": "no room"})


async def test_report_parameters(control: Control) -> None:
    """`wait` is capped, both are whole numbers, both may be left out."""
    for query in ("", "?wait=5&after=7", "?wait=99999"):
        status, body = await control.ask("GET", f"/v1/report{query}")
        assert (status, body["change"]) == (200, 7)
    assert control.node.waited == [(None, 0), (7, 5), (None, 60)]
    for query in ("wait=-1", "wait=x", "after=1.5", "after=", f"after={'9' * 50}"):
        status, body = await control.ask("GET", f"/v1/report?{query}")
        assert (status, body["code"]) == (400, "Malformed")


async def test_evictions_are_parsed(control: Control) -> None:
    """Unknown fields are refused here too."""
    assert await control.ask("POST", "/v1/evictions", b'{"victims": []}') == (200, {"results": []})
    status, body = await control.ask("POST", "/v1/evictions", b'{"victims": [], "all": true}')
    assert (status, body["code"]) == (400, "Malformed")


async def test_rotation_drops_nobody(control: Control) -> None:
    """New connections get new files, open ones go on, half a rotation changes nothing."""
    old, new = control.authority, Authority("new")
    old_operator = old.operator()
    context = await asyncio.to_thread(
        client_context, control.folder / "client", old.certificate, old_operator
    )
    url = f"https://127.0.0.1:{control.port}/v1/report"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, ssl=context, server_hostname=AGENT) as answer:
            assert answer.status == 200
        tls_dir = control.folder / "tls"
        await asyncio.to_thread((tls_dir / "tls.crt").write_bytes, new.agent().certificate)
        assert not await asyncio.to_thread(control.certificates.reload)
        assert (await control.ask("GET", "/v1/report"))[0] == 200
        await asyncio.to_thread(write_tls_dir, tls_dir, new.certificate, new.agent())
        assert await asyncio.to_thread(control.certificates.reload)
        assert not await asyncio.to_thread(control.certificates.reload)
        async with session.get(url, ssl=context, server_hostname=AGENT) as answer:
            assert answer.status == 200
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await control.ask("GET", "/v1/report")
    control.authority = new
    assert (await control.ask("GET", "/v1/report"))[0] == 200


async def test_silent_connections_do_not_block_others(control: Control) -> None:
    """Handshakes that never end take places up to a bound; then the oldest yields to the next."""
    silent = [
        await asyncio.open_connection("127.0.0.1", control.port) for _ in range(HANDSHAKES_MAX + 20)
    ]
    try:
        for reader, _ in silent[:20]:
            async with asyncio.timeout(30):
                assert await reader.read(1) == b""
        assert (await control.ask("GET", "/v1/report"))[0] == 200
        assert not silent[-1][0].at_eof()
    finally:
        for _, writer in silent:
            writer.close()


async def test_held_connections_keep_no_probe_out() -> None:
    """At the bound of the health port the oldest connection yields to the next."""
    runner = web.AppRunner(create_health_app(lambda: "", CollectorRegistry()))
    await runner.setup()
    server = runner.server
    assert server is not None
    sock = bind(ListenAddress("127.0.0.1", 0), "--health-listen")
    port = sock.getsockname()[1]
    listener = PlainListener(sock, server)
    listener.start()
    held = [
        await asyncio.open_connection("127.0.0.1", port) for _ in range(HEALTH_CONNECTIONS_MAX + 20)
    ]
    try:
        for reader, _ in held[:20]:
            async with asyncio.timeout(30):
                assert await reader.read(1) == b""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/readyz") as answer,
        ):
            assert answer.status == 200
        assert len(server.connections) <= HEALTH_CONNECTIONS_MAX
    finally:
        for _, writer in held:
            writer.close()
        await listener.stop()
        await runner.cleanup()


def test_unusable_certificates_stop_the_start(folder: Path) -> None:
    """The message names the flag and the files."""
    with pytest.raises(StartError, match="--tls-dir"):
        Certificates(folder)
    authority = Authority()
    write_tls_dir(folder, authority.certificate, authority.agent())
    (folder / "tls.key").write_bytes(authority.operator().key)
    with pytest.raises(StartError, match=r"tls\.key"):
        Certificates(folder)


def test_a_port_in_use_is_said_so() -> None:
    """The message names the flag and the address."""
    first = bind(ListenAddress("127.0.0.1", 0), "--control-listen")
    port = first.getsockname()[1]
    with pytest.raises(StartError, match=rf"--control-listen 127\.0\.0\.1:{port}.*EADDRINUSE"):
        bind(ListenAddress("127.0.0.1", port), "--control-listen")
    first.close()
