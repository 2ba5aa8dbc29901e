"""
The operator's side of the control protocol: one request at a time, deadlines and size limits.

Every failure becomes an `AgentError` whose reason is shown to users, or a `NewerLeader`.
"""

import asyncio
import asyncio.sslproto
import json
import ssl
from types import TracebackType
from typing import Self, TypeVar

import aiohttp

from blobcache_api.agent import (
    EVICTION_SIZE_BYTES_MAX,
    REPORT_SIZE_BYTES_MAX,
    STATE_SIZE_BYTES_MAX,
    ApplyResult,
    EvictionRequest,
    EvictionResponse,
    Report,
    StaleState,
    dump_message,
    parse_message,
)
from blobcache_api.v1alpha1.common import MalformedError, Model
from blobcache_operator.certificates import AGENT_DNS_NAME
from blobcache_operator.errors import AgentError, NewerLeader, StateOutdated

CONNECT_SECONDS = 5.0
PUSH_SECONDS = 20.0
EVICTION_SECONDS = 20.0
REPORT_WAIT_SECONDS = 30
# Above a watermark, what was just read becomes evictable by time alone.
PRESSED_WAIT_SECONDS = 5
REPORT_GRACE_SECONDS = 10.0
ANSWER_SIZE_BYTES_MAX = 1024 * 1024
QUOTED_CHARACTERS_MAX = 200

# asyncio gives each TLS connection a read buffer of 256 KiB. There is one long poll per node, so
# a thousand nodes would cost 256 MiB for answers of some kilobytes; a TLS record has 16 KiB.
asyncio.sslproto.SSLProtocol.max_size = 16 * 1024

M = TypeVar("M", bound=Model)


class AgentClient:
    """
    Speaks to agents; use as an async context manager.

    Args:
        context: Mutual TLS with the operator's certificate.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._polls: aiohttp.ClientSession | None = None
        self._orders: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # Unlimited: who may speak at once is the callers' business. Each agent's long poll holds a
        # connection (80 KiB); a push, once a minute, gives its own back at once.
        polls = aiohttp.TCPConnector(limit=0, keepalive_timeout=15, ssl=self._context)
        orders = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._context)
        self._polls = aiohttp.ClientSession(connector=polls, read_bufsize=16 * 1024)
        self._orders = aiohttp.ClientSession(connector=orders, read_bufsize=16 * 1024)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for session in (self._polls, self._orders):
            if session is not None:
                await session.close()

    async def push(self, url: str, state: bytes, *, epoch: int) -> ApplyResult:
        """
        Send a desired state.

        Args:
            url: The agent's base URL.
            state: As `dump_for_push` wrote it.
            epoch: The state's, to judge a refusal.

        Raises:
            NewerLeader: The agent follows a higher epoch.
            StateOutdated: It has a newer revision of this epoch.
            AgentError: Anything else.
        """
        if len(state) > STATE_SIZE_BYTES_MAX:
            raise AgentError(
                "StateTooLarge",
                f"The node's state has {len(state)} bytes, more than {STATE_SIZE_BYTES_MAX}. "
                "Shorten lists of blobs, or narrow nodeSelectors.",
            )
        status, raw = await self._ask(
            "PUT", f"{url}/v1/state", PUSH_SECONDS, ANSWER_SIZE_BYTES_MAX, body=state
        )
        if status == 409:
            stale = _parse(StaleState, raw, ANSWER_SIZE_BYTES_MAX)
            if stale.epoch > epoch:
                raise NewerLeader(stale.epoch)
            raise StateOutdated(stale.revision)
        if status == 400:
            raise AgentError("StateRefused", f"The agent refused the state: {_quote(raw)}")
        _require_ok(status, raw)
        return _parse(ApplyResult, raw, ANSWER_SIZE_BYTES_MAX)

    async def report(self, url: str, *, wait_seconds: int, after: int) -> Report:
        """Return the agent's report, once it changed beyond `after` or the wait is over."""
        status, raw = await self._ask(
            "GET",
            f"{url}/v1/report?wait={wait_seconds}&after={after}",
            wait_seconds + REPORT_GRACE_SECONDS,
            REPORT_SIZE_BYTES_MAX,
        )
        _require_ok(status, raw)
        if len(raw) > 256 * 1024:
            return await asyncio.to_thread(_parse, Report, raw, REPORT_SIZE_BYTES_MAX)
        return _parse(Report, raw, REPORT_SIZE_BYTES_MAX)

    async def evict(self, url: str, request: EvictionRequest) -> EvictionResponse:
        """Ask for evictions and return what became of them."""
        status, raw = await self._ask(
            "POST",
            f"{url}/v1/evictions",
            EVICTION_SECONDS,
            EVICTION_SIZE_BYTES_MAX,
            body=dump_message(request),
        )
        _require_ok(status, raw)
        return _parse(EvictionResponse, raw, EVICTION_SIZE_BYTES_MAX)

    async def _ask(
        self,
        method: str,
        url: str,
        seconds: float,
        size_bytes_max: int,
        *,
        body: bytes | None = None,
    ) -> tuple[int, bytes]:
        session = self._polls if method == "GET" else self._orders
        assert session is not None, "use `async with AgentClient(...)`"
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with session.request(
                method,
                url,
                data=body,
                headers=headers,
                allow_redirects=False,
                server_hostname=AGENT_DNS_NAME,
                timeout=aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS),
            ) as answer:
                raw = bytearray()
                async for piece in answer.content.iter_chunked(64 * 1024):
                    raw += piece
                    if len(raw) > size_bytes_max:
                        raise AgentError(
                            "AgentNonsense", f"The agent answered more than {size_bytes_max} bytes."
                        )
                return answer.status, bytes(raw)
        except TimeoutError as error:
            raise AgentError(
                "AgentTimeout",
                f"The agent did not answer within {seconds:.0f} s. See its log, and the node.",
            ) from error
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
            raise AgentError(
                "AgentUntrusted",
                "TLS with the agent failed. Its certificate must be the one in Secret "
                "blobcache-agent-tls; restart its pod if this lasts longer than two minutes.",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise AgentError(
                "AgentUnreachable",
                f"The agent cannot be reached ({type(error).__name__}). See its pod on the node, "
                "and network policies for port 7443.",
            ) from error


def _require_ok(status: int, raw: bytes) -> None:
    if status in (401, 403):
        raise AgentError("AgentRefused", "The agent does not take this operator's certificate.")
    if status != 200:
        raise AgentError("AgentNonsense", f"The agent answered {status}: {_quote(raw)}")


def _parse(model: type[M], raw: bytes, size_bytes_max: int) -> M:
    try:
        return parse_message(model, raw, size_bytes_max=size_bytes_max)
    except MalformedError as error:
        raise AgentError(
            "AgentNonsense",
            f"The agent's answer cannot be read: {str(error)[:QUOTED_CHARACTERS_MAX]}. Bring "
            "operator and agent to the same version.",
        ) from error


def _quote(raw: bytes) -> str:
    """Return an error's message, if it is JSON of ours, in printable characters only."""
    try:
        body = json.loads(raw)
        text = str(body["message"])
    except (ValueError, KeyError, TypeError):
        text = "(no message)"
    return "".join(letter for letter in text if letter.isprintable())[:QUOTED_CHARACTERS_MAX]
