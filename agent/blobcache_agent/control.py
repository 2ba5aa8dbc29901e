"""The control API: what the operator pushes, reads and asks for.

    PUT  /v1/state                     DesiredState -> ApplyResult | 409 StaleState
    GET  /v1/report?wait=S&after=N     Report; waits until its `change` is no longer N
    POST /v1/evictions                 EvictionRequest -> EvictionResponse

Only the operator may speak here: a client certificate of the installation's authority is not
enough, for agents have one too; it must name the operator.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web

from blobcache_agent.errors import ControlRefused, StalePush
from blobcache_agent.logs import get_logger
from blobcache_api.agent import (
    EVICTION_SIZE_BYTES_MAX,
    STATE_SIZE_BYTES_MAX,
    ApplyResult,
    DesiredState,
    EvictionRequest,
    EvictionResponse,
    Report,
    StaleState,
    dump_message,
    parse_message,
    parse_state,
)
from blobcache_api.v1alpha1.common import MalformedError, Model

OPERATOR_URI = "blobcache://operator"
WAIT_SECONDS_MAX = 60
BODY_TIMEOUT_SECONDS = 30.0
"""For a message to arrive whole."""
_NUMBER_DIGITS_MAX = 19

log = get_logger(__name__)


class Node(Protocol):
    """What the control API needs from the agent."""

    async def apply(self, state: DesiredState) -> ApplyResult:
        """Take a state and act on it.

        Raises:
            StalePush: It is older than what was taken.
            ControlRefused: It cannot be taken.
        """

    async def report(self, after: int | None, wait_seconds: float) -> Report:
        """Return a report, when its change number is no longer `after` or the time is up."""

    async def evict(self, request: EvictionRequest) -> EvictionResponse:
        """Evict what is still as it was when it was decided."""


_NODE: web.AppKey[Node] = web.AppKey("node")


def create_control_app(node: Node) -> web.Application:
    """Return the application."""
    app = web.Application(
        middlewares=[_answer_errors, _require_operator], client_max_size=STATE_SIZE_BYTES_MAX
    )
    app[_NODE] = node
    app.router.add_put("/v1/state", _put_state)
    app.router.add_get("/v1/report", _get_report)
    app.router.add_post("/v1/evictions", _post_evictions)
    return app


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer every refusal in one form: {code, message}; nothing of the request is quoted."""
    try:
        return await handler(request)
    except StalePush as stale:
        log.info("Refused an older state", epoch=stale.epoch, revision=stale.revision)
        return _json(StaleState(epoch=stale.epoch, revision=stale.revision), status=409)
    except ControlRefused as refused:
        log.info("Refused a control request", code=refused.code, why=refused.message)
        return _error(refused.status, refused.code, refused.message)
    except MalformedError as error:
        log.info("Refused a control request", code="Malformed", why=str(error))
        return _error(400, "Malformed", str(error))
    except web.HTTPRequestEntityTooLarge:
        return _error(413, "TooLarge", f"a message must be at most {STATE_SIZE_BYTES_MAX} bytes")
    except web.HTTPException as error:
        return _error(error.status, "NotServed", "there is no such path or method here")


@web.middleware
async def _require_operator(request: web.Request, handler: _Handler) -> web.StreamResponse:
    certificate = None
    if request.transport is not None:
        certificate = request.transport.get_extra_info("peercert")
    names = certificate.get("subjectAltName", ()) if certificate else ()
    if ("URI", OPERATOR_URI) not in names:
        raise ControlRefused(
            403, "NotTheOperator", f"the client certificate must name '{OPERATOR_URI}'"
        )
    return await handler(request)


async def _put_state(request: web.Request) -> web.Response:
    raw = await _read(request)
    # A large state takes long to check; readers are served meanwhile.
    state = await asyncio.to_thread(parse_state, raw)
    return _json(await request.app[_NODE].apply(state))


async def _get_report(request: web.Request) -> web.Response:
    wait = min(_number(request, "wait") or 0, WAIT_SECONDS_MAX)
    report = await request.app[_NODE].report(_number(request, "after"), wait)
    return _json(report)


async def _post_evictions(request: web.Request) -> web.Response:
    raw = await _read(request)
    asked = parse_message(EvictionRequest, raw, size_bytes_max=EVICTION_SIZE_BYTES_MAX)
    return _json(await request.app[_NODE].evict(asked))


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            return await request.read()
    except (TimeoutError, ConnectionError) as error:
        raise ControlRefused(
            408, "TooSlow", f"a message must arrive whole within {BODY_TIMEOUT_SECONDS:.0f} s"
        ) from error


def _number(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS_MAX):
        raise ControlRefused(400, "Malformed", f"`{name}` must be a whole number")
    return int(text)


def _json(message: Model, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=dump_message(message), content_type="application/json")


def _error(status: int, code: str, message: str) -> web.Response:
    body = json.dumps({"code": code, "message": message}).encode()
    return web.Response(status=status, body=body, content_type="application/json")
