"""
What tells the loop to look again: kopf for configs, metadata watches for nodes and EndpointSlices.

Nothing here carries facts; the loop lists. kopf keeps deleted objects in its indexes after a
relist and never says so, which is harmless for a bell. The one thing kept of an event is that a
config was deleted: a second witness beside the LIST that lacks it.

kopf runs on a thread and an event loop of its own, because on its way out it cancels every task
of its loop that is younger than itself, whosever they are. Nodes and EndpointSlices are watched
by their metadata alone: a Node is 16 KiB and more, and kopf would keep each in memory.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import kopf
import structlog

from blobcache_operator import errors
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import KubeAccess

GROUP = "blobcache.dev"
SERVER_TIMEOUT_SECONDS = 300
CLIENT_TIMEOUT_SECONDS = 330
WATCH_RETRY_SECONDS = 5.0
STOP_SECONDS_MAX = 3.0
GOODBYE_SECONDS = 0.25

log = structlog.get_logger(__name__)


Notice = Callable[[str | None], None]
"""Called on every change, with the uid of a config that a watch saw being deleted."""


def make_registry(access: KubeAccess, notice: Notice) -> kopf.OperatorRegistry:
    """Return kopf handlers that call `notice` on every event of a BlobCacheConfig."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(
            server=access.server,
            ca_path=access.ca_file,
            insecure=not access.verify,
            token=await access.read_token(),
            certificate_path=access.certificate_file,
            private_key_path=access.key_file,
        )

    @kopf.on.event(GROUP, "v1alpha1", "blobcacheconfigs", registry=registry)
    async def config_changed(type: str | None, uid: str, **_: Any) -> None:  # noqa: A002
        notice(uid if type == "DELETED" else None)

    return registry


def make_settings() -> kopf.OperatorSettings:
    """Return settings under which kopf leaves no trace on tenants' objects."""
    settings = kopf.OperatorSettings()
    settings.process.ultimate_exiting_timeout = None  # it would kill the process, not its thread
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.peering.standalone = True
    # The resources are known; scanning would want to watch namespaces and CRDs.
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    settings.persistence.finalizer = f"{GROUP}/finalizer"  # never set: no handler needs one
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    return settings


@contextlib.asynccontextmanager
async def kopf_running(access: KubeAccess, notice: Notice) -> AsyncIterator[None]:
    """Run kopf beside the body; if it ends by itself it is started again."""
    loop = asyncio.get_running_loop()
    stopping = threading.Event()
    thread_loop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def notice_from_thread(deleted_uid: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # our loop has closed: nobody listens
            loop.call_soon_threadsafe(notice, deleted_uid)

    async def operate() -> None:
        stop = asyncio.Event()
        thread_loop.append((asyncio.get_running_loop(), stop))
        while not stopping.is_set():
            registry = make_registry(access, notice_from_thread)
            try:
                await kopf.operator(
                    registry=registry,
                    settings=make_settings(),
                    clusterwide=True,
                    stop_flag=stop,
                )
            except Exception as error:  # without kopf the regular looks still work
                log.warning("kopf ended, starting it again", error=repr(error))
            # While stopping, the cancelled watches' connections still say goodbye in this loop.
            await asyncio.sleep(GOODBYE_SECONDS if stopping.is_set() else WATCH_RETRY_SECONDS)

    thread = threading.Thread(target=lambda: asyncio.run(operate()), name="kopf", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        if thread_loop:
            kopf_loop, stop = thread_loop[0]
            with contextlib.suppress(RuntimeError):  # the loop has closed already
                kopf_loop.call_soon_threadsafe(stop.set)
        await asyncio.to_thread(thread.join, STOP_SECONDS_MAX)


async def watch_changes(kube: Kube, path: str, notice: Notice) -> None:
    """Call `notice` whenever something in a collection changes; runs until cancelled."""
    while True:
        try:
            watch = kube.watch_metadata(path, timeout_seconds=SERVER_TIMEOUT_SECONDS)
            async with contextlib.aclosing(watch) as kinds:
                async for kind in kinds:
                    if kind in ("ADDED", "MODIFIED", "DELETED"):
                        notice(None)
        except errors.KubeError as error:
            log.info("Watch ended, starting it again", path=path, error=str(error))
            await asyncio.sleep(WATCH_RETRY_SECONDS)
        # Whatever happened between two watches was not seen.
        notice(None)
