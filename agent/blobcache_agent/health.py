"""Liveness, readiness and metrics: `/healthz`, `/readyz`, `/metrics`.

Ready means: a state is in force (pushed, persisted or read from files) and the data port listens.
Never an origin, the disk or the operator: a node that cannot fetch still serves its hits.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_READINESS: web.AppKey[Callable[[], str]] = web.AppKey("readiness")
_REGISTRY: web.AppKey[CollectorRegistry] = web.AppKey("registry")


def create_health_app(readiness: Callable[[], str], registry: CollectorRegistry) -> web.Application:
    """Return the application.

    Args:
        readiness: Returns "" when ready, else why not.
        registry: What `/metrics` shows.
    """
    app = web.Application()
    app[_READINESS] = readiness
    app[_REGISTRY] = registry
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)
    return app


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _readyz(request: web.Request) -> web.Response:
    why_not = request.app[_READINESS]()
    if why_not:
        return web.Response(status=503, text=f"{why_not}\n")
    return web.Response(text="ok\n")


async def _metrics(request: web.Request) -> web.Response:
    body = generate_latest(request.app[_REGISTRY])
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
