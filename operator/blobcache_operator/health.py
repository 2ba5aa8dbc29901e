"""`/healthz`, `/readyz` and `/metrics`, on every replica, leading or not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import prometheus_client
from aiohttp import web

LEASE_CONTACT_SECONDS_MAX = 60.0


@dataclass
class Health:
    """
    What the probes look at.

    Args:
        last_lease_contact: The loop time the Lease was last read or written, None before.
        is_loop_alive: False when the reconcile loop of a leader has not turned for too long.
        obstacle: What somebody must mend before this replica can do its work, with the remedy.
    """

    last_lease_contact: Callable[[], float | None]
    is_loop_alive: Callable[[], bool]
    obstacle: Callable[[], str | None] = lambda: None

    def not_ready_reason(self) -> str | None:
        """Return why this replica could not lead or stand by, None when it could."""
        if (obstacle := self.obstacle()) is not None:
            return obstacle
        contact = self.last_lease_contact()
        if contact is None:
            return "the Lease was not read yet"
        age = asyncio.get_running_loop().time() - contact
        if age > LEASE_CONTACT_SECONDS_MAX:
            return f"the Lease was last read {age:.0f} s ago"
        return None


def make_application(health: Health) -> web.Application:
    """Return the handlers; a standby is ready, for it could lead at once."""

    async def healthz(_: web.Request) -> web.Response:
        alive = health.is_loop_alive()
        return web.Response(text="ok\n" if alive else "stuck\n", status=200 if alive else 503)

    async def readyz(_: web.Request) -> web.Response:
        reason = health.not_ready_reason()
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def metrics(_: web.Request) -> web.Response:
        body = await asyncio.to_thread(prometheus_client.generate_latest)  # reads /proc
        return web.Response(
            body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        )

    application = web.Application(client_max_size=1024)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    application.router.add_get("/metrics", metrics)
    return application


@contextlib.asynccontextmanager
async def health_served(health: Health, host: str, port: int) -> AsyncIterator[None]:
    """Serve the probes beside the body."""
    runner = web.AppRunner(make_application(health), access_log=None, keepalive_timeout=30)
    await runner.setup()
    try:
        await web.TCPSite(runner, host or None, port).start()
        yield
    finally:
        await runner.cleanup()
