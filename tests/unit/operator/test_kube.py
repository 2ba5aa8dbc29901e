"""The API server's bad days: pages that expire, throttling, answers that are none."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from blobcache_operator import errors, kube
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import KubeAccess

Answer = tuple[int, dict[str, str], Any]


class Server:
    """Answers from a list, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer | Callable[[web.Request], Answer]] = []
        self.asked: list[web.Request] = []

    async def handle(self, request: web.Request) -> web.Response:
        """Give the next answer; the last one is repeated."""
        self.asked.append(request)
        await request.read()
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        status, headers, body = answer(request) if callable(answer) else answer
        if isinstance(body, bytes):
            return web.Response(status=status, headers=headers, body=body)
        return web.json_response(body, status=status, headers=headers)


class PlainAccess(KubeAccess):
    """Without TLS, for a server of this process."""

    def ssl_context(self) -> ssl.SSLContext:
        """Return one nobody uses."""
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
async def server() -> Server:
    """Return a server's brain."""
    return Server()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Kube]:
    """Return a client of it."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    async with TestServer(app) as listening:
        url = str(listening.make_url("")).rstrip("/")
        async with Kube(PlainAccess(server=url, token_source=lambda: "t0k3n")) as made:
            yield made


def _page(*names: str, token: str = "") -> Answer:
    items = [{"metadata": {"name": name}} for name in names]
    return (200, {}, {"metadata": {"continue": token}, "items": items})


GONE: Answer = (410, {}, {"reason": "Expired", "message": "too old"})


async def test_a_list_is_all_its_pages(server: Server, client: Kube) -> None:
    """The continue token is followed to the end."""
    server.answers = [_page("a", token="1"), _page("b", token="2"), _page("c")]
    found = await client.list_all("/things", labelSelector="x=y")
    assert [item["metadata"]["name"] for item in found] == ["a", "b", "c"]
    assert [request.query.get("continue") for request in server.asked] == [None, "1", "2"]
    assert {request.query["labelSelector"] for request in server.asked} == {"x=y"}
    assert server.asked[0].headers["Authorization"] == "Bearer t0k3n"


async def test_a_list_that_expires_between_pages_starts_again(server: Server, client: Kube) -> None:
    """Half a list is never returned."""
    server.answers = [_page("a", token="1"), GONE, _page("a", token="3"), _page("b")]
    found = await client.list_all("/things")
    assert [item["metadata"]["name"] for item in found] == ["a", "b"]


async def test_a_list_that_always_expires_fails(server: Server, client: Kube) -> None:
    """There is a bound to starting again."""
    server.answers = [GONE]
    with pytest.raises(errors.KubeUnavailable):
        await client.list_all("/things")
    assert len(server.asked) == kube.RELISTS_MAX


async def test_a_list_without_end_fails(
    server: Server, client: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that never stops paging does not fill the memory."""
    monkeypatch.setattr(kube, "PAGES_MAX", 5)
    server.answers = [_page("a", token="more")]
    with pytest.raises(errors.KubeError, match="ListTooLong"):
        await client.list_all("/things")


async def test_throttling_is_waited_out(server: Server, client: Kube) -> None:
    """429 with Retry-After is tried again, a bounded number of times."""
    busy: Answer = (429, {"Retry-After": "0"}, {"reason": "TooManyRequests"})
    server.answers = [busy, busy, (200, {}, {"ok": True})]
    assert await client.get("/thing") == {"ok": True}
    server.asked.clear()
    server.answers = [busy]
    with pytest.raises(errors.KubeUnavailable):
        await client.get("/thing")
    assert len(server.asked) == kube.THROTTLED_RETRIES_MAX + 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.KubeUnavailable),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (410, errors.Gone),
        (422, errors.KubeError),
        (500, errors.KubeUnavailable),
        (503, errors.KubeUnavailable),
    ],
)
async def test_refusals_have_their_kinds(
    server: Server, client: Kube, status: int, kind: type[errors.KubeError]
) -> None:
    """Callers tell them apart by type; the server's words are kept."""
    server.answers = [(status, {}, {"reason": "Because", "message": "it is so"})]
    with pytest.raises(kind, match="it is so") as caught:
        await client.get("/thing")
    assert type(caught.value) is kind


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff"])
async def test_an_answer_that_is_no_object_is_no_answer(
    server: Server, client: Kube, body: bytes
) -> None:
    """A proxy's page of 200 OK is not taken for the server."""
    server.answers = [(200, {}, body)]
    with pytest.raises(errors.KubeUnavailable):
        await client.get("/thing")


async def test_no_server_is_unavailable() -> None:
    """A refused connection is not another kind of crash."""
    async with Kube(PlainAccess(server="http://127.0.0.1:1")) as made:
        with pytest.raises(errors.KubeUnavailable):
            await made.get("/thing")


async def test_an_answer_is_bounded(
    server: Server, client: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pretends to be the API server cannot fill the memory."""
    monkeypatch.setattr(kube, "ANSWER_BYTES_MAX", 1000)
    server.answers = [(200, {}, b"x" * 2_000_000)]
    with pytest.raises(errors.KubeError, match="AnswerTooLarge"):
        await client.get("/thing")


async def test_tables_give_metadata_and_cells(server: Server, client: Kube) -> None:
    """Columns are named once; a row has as many cells as there are columns, or fewer."""
    table = {
        "metadata": {},
        "columnDefinitions": [{"name": "Name"}, {"name": "Internal-IP"}],
        "rows": [
            {"cells": ["n1", "10.0.0.1"], "object": {"metadata": {"name": "n1"}}},
            {"cells": ["n2"], "object": {"metadata": {"name": "n2"}}},
        ],
    }
    server.answers = [(200, {}, table)]
    assert await client.list_table("/nodes") == [
        ({"name": "n1"}, {"Name": "n1", "Internal-IP": "10.0.0.1"}),
        ({"name": "n2"}, {"Name": "n2"}),
    ]
    assert "as=Table" in server.asked[0].headers["Accept"]
