"""
An agent's twin: speaks the control protocol over real mutual TLS, caches nothing, records all.

It can be told to be dead, slow or mad, and what to report. It fences epochs as agents must.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from blobcache_api.agent import (
    ApplyResult,
    Candidate,
    ConfigReport,
    ConfigResult,
    DesiredState,
    DiskReport,
    EvictionOutcome,
    EvictionRequest,
    EvictionResponse,
    EvictionResult,
    PrefetchReport,
    ProtocolRange,
    PushedConfig,
    Report,
    StaleState,
    dump_message,
    parse_message,
    parse_state,
)
from blobcache_api.v1alpha1.node import ConfigState

GIB = 1024**3
START_TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass
class Twin:
    """One node's agent; change `figures`, `candidates` or `mood` and call `touch()`."""

    node: str
    pod_uid: str = ""
    mood: str = "well"
    """well, slow (hangs), mad (answers nonsense), refusing (400), thief (another node's name)."""
    states: list[DesiredState] = field(default_factory=list)
    pushes: int = 0
    evictions: list[EvictionRequest] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By config name: fields of its ConfigReport."""
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By config name: reason and message."""
    candidates: tuple[Candidate, ...] = ()
    disk: DiskReport = field(
        default_factory=lambda: DiskReport(
            total_bytes=100 * GIB,
            available_bytes=90 * GIB,
            used_bytes=0,
            capacity_bytes=50 * GIB,
            min_free_bytes=GIB,
        )
    )
    warms: bool = True
    """Whether prefetch lists are complete at once."""
    epoch: int = 0
    revision: int = 0
    start_time: datetime.datetime = START_TIME
    port: int = 0
    change: int = 1
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def state(self) -> DesiredState | None:
        """The newest state."""
        return self.states[-1] if self.states else None

    @property
    def names(self) -> set[str]:
        """Names of the configs of the newest state."""
        return {config.name for config in self.state.configs} if self.state else set()

    def config(self, name: str) -> PushedConfig:
        """Return a config of the newest state."""
        assert self.state is not None
        return next(config for config in self.state.configs if config.name == name)

    def touch(self) -> None:
        """Let long polls return."""
        self.change += 1
        self._changed.set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, tls: Path) -> AsyncIterator[Twin]:
        """Listen beside the body, on the same port each time."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls / "ca.crt"))
        context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
        context.verify_mode = ssl.CERT_REQUIRED
        app = web.Application(client_max_size=16 * 1024 * 1024, middlewares=[self._by_mood])
        app.router.add_put("/v1/state", self._put_state)
        app.router.add_get("/v1/report", self._get_report)
        app.router.add_post("/v1/evictions", self._post_evictions)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            self.touch()
            await runner.cleanup()

    @web.middleware
    async def _by_mood(self, request: web.Request, handler: Any) -> web.StreamResponse:
        names = request.transport.get_extra_info("peercert").get("subjectAltName", ())  # type: ignore[union-attr]
        assert ("URI", "blobcache://operator") in names
        if self.mood == "slow":
            await asyncio.sleep(3600)
        if self.mood == "mad":
            return web.Response(body=b'{"lies": [1, 2, 3]}', content_type="application/json")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _put_state(self, request: web.Request) -> web.Response:
        state = parse_state(await request.read())
        self.pushes += 1
        if self.mood == "refusing":
            return web.json_response({"code": "Malformed", "message": "cannot"}, status=400)
        if (state.epoch, state.revision) < (self.epoch, self.revision):
            stale = StaleState(epoch=self.epoch, revision=self.revision)
            return web.Response(status=409, body=dump_message(stale))
        self.epoch, self.revision = state.epoch, state.revision
        if (
            self.state is None
            or state.digest != self.state.digest
            or state.epoch != self.state.epoch
        ):
            self.states.append(state)
            self.touch()
        results = tuple(self._result(config) for config in state.configs)
        result = ApplyResult(
            epoch=state.epoch, revision=state.revision, digest=state.digest, configs=results
        )
        return web.Response(body=dump_message(result), content_type="application/json")

    def _result(self, config: PushedConfig) -> ConfigResult:
        refusal = self.refusals.get(config.name)
        return ConfigResult(
            namespace=config.namespace,
            name=config.name,
            uid=config.uid,
            applied=refusal is None,
            reason=refusal[0] if refusal else None,
            message=refusal[1] if refusal else "",
            digest="" if refusal else config.digest,
        )

    async def _get_report(self, request: web.Request) -> web.Response:
        wait, after = int(request.query["wait"]), int(request.query["after"])
        if after == self.change and wait:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
        return web.Response(body=dump_message(self.report()), content_type="application/json")

    def report(self) -> Report:
        """Return what it says of itself now."""
        configs = self.state.configs if self.state else ()
        return Report(
            node="elsewhere" if self.mood == "thief" else self.node,
            boot_id="boot",
            pod_uid=self.pod_uid,
            agent_version="0.1.0",
            start_time=self.start_time,
            protocol=ProtocolRange(min=1, max=1),
            epoch=self.epoch,
            revision=self.revision,
            digest=self.state.digest if self.state else "",
            change=self.change,
            disk=self.disk,
            configs=tuple(self._config_report(config) for config in configs),
            candidates=self.candidates,
        )

    def _config_report(self, config: PushedConfig) -> ConfigReport:
        refusal = self.refusals.get(config.name)
        prefetch = None
        if config.spec.prefetch is not None and config.spec.prefetch.blobs:
            count = len(config.spec.prefetch.blobs)
            size = sum(blob.size or 0 for blob in config.spec.prefetch.blobs)
            prefetch = PrefetchReport(
                blobs=count,
                blobs_ready=count if self.warms else 0,
                bytes=size,
                bytes_ready=size if self.warms else 0,
            )
        return ConfigReport(
            namespace=config.namespace,
            name=config.name,
            uid=config.uid,
            applied_digest="" if refusal else config.digest,
            state=ConfigState.FAILED if refusal else ConfigState.APPLIED,
            reason=refusal[0] if refusal else None,
            message=refusal[1] if refusal else "",
            prefetch=prefetch,
            **self.figures.get(config.name, {}),
        )

    async def _post_evictions(self, request: web.Request) -> web.Response:
        asked = parse_message(EvictionRequest, await request.read(), size_bytes_max=1024 * 1024)
        self.evictions.append(asked)
        sizes = {item.blob_id: item.bytes for item in self.candidates}
        response = EvictionResponse(
            results=tuple(
                EvictionResult(
                    config_uid=victim.config_uid,
                    blob_id=victim.blob_id,
                    outcome=EvictionOutcome.EVICTED,
                    bytes=sizes.get(victim.blob_id, 0),
                )
                for victim in asked.victims
            )
        )
        gone = {victim.blob_id for victim in asked.victims}
        self.candidates = tuple(item for item in self.candidates if item.blob_id not in gone)
        return web.Response(body=dump_message(response), content_type="application/json")
