"""The process: what starts in which order, runs until a signal, and ends in an orderly way.

Start: the cache root (its lock refuses a second agent), health, what was applied before, readers,
the operator. So hits are served as soon as possible after a restart, and `/healthz` answers
while a large cache is taken stock of. Stop: readers first, then the engine, health last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web
from prometheus_client import Gauge

from blobcache_agent import __version__
from blobcache_agent.apply import ClusterNode
from blobcache_agent.changes import WATCH_SECONDS
from blobcache_agent.configs import Configs
from blobcache_agent.control import create_control_app
from blobcache_agent.data.catalog import ReaderAuth
from blobcache_agent.data.limits import Limits
from blobcache_agent.data.server import DataServer
from blobcache_agent.data.tokens import AllowAll, TokenAuth
from blobcache_agent.descriptors import Shares
from blobcache_agent.errors import StartError, UsageError
from blobcache_agent.health import create_health_app
from blobcache_agent.listener import (
    RELOAD_SECONDS,
    Certificates,
    PlainListener,
    TLSListener,
    bind,
    listen_error,
)
from blobcache_agent.logs import get_logger
from blobcache_agent.metrics import AgentCollector, create_registry
from blobcache_agent.mirror.start import misbindings, start_mirror
from blobcache_agent.node_state import NodeState
from blobcache_agent.observer import RequestObserver
from blobcache_agent.process import Signals, harden, keep_one_heap, raise_file_limit
from blobcache_agent.report import Figures, Identity
from blobcache_agent.settings import (
    AgentSettings,
    ListenAddress,
    ServeSettings,
    StandaloneSettings,
)
from blobcache_agent.standalone import load
from blobcache_agent.state_file import StateFile
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.open import BackendEnvironment
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.errors import ConfigError
from blobcache_storage.factory import BlobFactory

GRACE_SECONDS = 25.0
"""For reads under way after a stop signal; a pod has 30 s until it is killed."""
CONTROL_GRACE_SECONDS = 2.0
KEEPALIVE_SECONDS = 75.0
HEALTH_KEEPALIVE_SECONDS = 15.0
FIGURES_SECONDS = 5.0

log = get_logger(__name__)


def run_serve(settings: ServeSettings) -> None:
    """Run as a node of a cluster until a signal.

    Raises:
        StartError: The agent cannot run here.
    """
    harden()
    keep_one_heap()
    certificates = Certificates(settings.tls_dir)
    asyncio.run(_serve(settings, certificates))


def run_standalone(settings: StandaloneSettings) -> None:
    """Run on one machine until a signal.

    Raises:
        StartError: The agent cannot run here.
        UsageError: A file must be changed.
    """
    harden()
    keep_one_heap()
    # Before anything is touched: a typo costs nothing but a message.
    load(settings.files, settings.permissions)
    asyncio.run(_standalone(settings))


class Agent:
    """What both ways to run have in common. Everything it starts is ended with `stack`.

    Args:
        settings: The settings.
        policy: Which addresses origins may have.
        auth: Who may read.
        stack: Ends what was started, in reverse order.
    """

    def __init__(
        self,
        settings: AgentSettings,
        policy: AddressPolicy,
        auth: ReaderAuth,
        stack: AsyncExitStack,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._auth = auth
        self._stack = stack
        self._cache_root = settings.cache_root.absolute()
        self._shares = _shares(settings)
        self._runtime = StorageRuntime(
            open_files_max=self._shares.open_blobs, open_files_busy_max=self._shares.busy_blobs
        )
        self._factory = BlobFactory(self._runtime, _environment(settings, policy))
        self._data_port = 0
        self._server: DataServer | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.registry = create_registry()
        self.configs = Configs(self._factory, settings.permissions, str(self._cache_root))
        self.root: CacheRoot
        self.figures: Figures

    async def open(self) -> None:
        """Open the cache root and have the engine look after itself.

        Raises:
            StartError: The cache root cannot be used.
        """
        self._stack.push_async_callback(self._runtime.close)
        self._stack.push_async_callback(self._factory.close)
        settings = self._settings
        try:
            size = await asyncio.to_thread(_filesystem_bytes, self._cache_root)
            self.root = await self._factory.open_root(
                str(self._cache_root),
                capacity_bytes=settings.capacity_bytes,
                min_free_bytes=settings.min_free.of(size),
            )
        except (ConfigError, OSError) as error:
            raise StartError(f"--cache-root {settings.cache_root}: {error}") from error
        self._factory.start_mgr_checker()
        self.figures = Figures(self.configs, self.root)
        await self.figures.refresh()
        self.every(FIGURES_SECONDS, self.figures.refresh)
        # Managers have the root looked after; an agent without one has orphans all the same.
        self.every(FIGURES_SECONDS, self.root.look_after)

    async def start_health(self, state_revision: Callable[[], tuple[int, int]]) -> None:
        """Serve health and metrics, if asked to."""
        self.registry.register(AgentCollector(self.figures, state_revision))
        address = self._settings.health_listen
        if address is None:
            return
        app = create_health_app(self._why_not_ready, self.registry)
        runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=HEALTH_KEEPALIVE_SECONDS,
            shutdown_timeout=CONTROL_GRACE_SECONDS,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        sock = bind(address, "--health-listen")
        assert runner.server is not None, "set up above"
        listener = PlainListener(sock, runner.server)
        listener.start()
        self._stack.push_async_callback(listener.stop)
        log.info("Listens for health and metrics", port=sock.getsockname()[1])

    async def start_data(self) -> None:
        """Serve readers."""
        address = self._settings.listen
        server = DataServer(
            self.configs,
            self._auth,
            RequestObserver(self.registry),
            Limits(
                connections_max=self._shares.readers,
                connections_refusing_max=self._shares.refusals,
            ),
            await start_mirror(
                self._settings.mirrored,
                self.configs,
                self._policy,
                self._cache_root,
                self._stack,
                self.every,
            ),
        )
        try:
            host, self._data_port = await server.start(address.host or None, address.port)
        except OSError as error:
            raise listen_error(address, "--listen", error) from error
        self._server = server
        connections = Gauge(
            "blobcache_agent_connections", "Readers connected now.", registry=self.registry
        )
        connections.set_function(lambda: server.connections)
        self._stack.push_async_callback(self._finish_data)
        # What was made until now lives as long as the process: the collector need not walk it.
        gc.collect()
        gc.freeze()
        log.info("Listens for readers", address=host, port=self._data_port)

    def stop_data(self) -> None:
        """Accept no more readers and begin to finish reads under way."""
        assert self._server is not None, "it was started"
        self._data_port = 0
        self._stopping = asyncio.create_task(self._server.stop(GRACE_SECONDS), name="stop-data")

    async def _finish_data(self) -> None:
        if self._stopping is None:
            self.stop_data()
        assert self._stopping is not None, "begun above"
        await self._stopping

    def _why_not_ready(self) -> str:
        if not self.configs.is_applied:
            return "no state has been applied yet: the operator has not pushed one"
        if not self._data_port:
            return "the data port does not listen"
        return ""

    def every(self, seconds: float, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step again and again until the end; a failure is logged and stops nothing."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await step()
                except Exception:
                    log.exception("A periodic step failed")

        task = asyncio.create_task(repeat(), name="periodic")
        self._stack.push_async_callback(_cancel, task)


async def _serve(settings: ServeSettings, certificates: Certificates) -> None:
    signals = Signals(lambda: log.info("Ignored SIGHUP: the operator says what changes"))
    signals.install()
    async with AsyncExitStack() as stack:
        policy = AddressPolicy(
            in_cluster=True, allow_cidrs=[str(net) for net in settings.allowed_origin_networks]
        )
        auth = TokenAuth()
        agent = Agent(settings, policy, auth, stack)
        await agent.open()
        directory_fd = await asyncio.to_thread(_open_directory, settings.cache_root.absolute())
        stack.callback(os.close, directory_fd)
        state = NodeState(StateFile(directory_fd), settings.node_name)
        node = ClusterNode(
            identity=await asyncio.to_thread(Identity.read, settings.node_name, settings.pod_uid),
            state=state,
            configs=agent.configs,
            figures=agent.figures,
            root=agent.root,
            policy=policy,
            keys=auth,
        )
        await agent.start_health(lambda: (state.epoch, state.revision))
        await node.restore()
        await agent.start_data()
        await _start_control(settings.control_listen, certificates, node, agent, stack)
        log.info("Serves a node", node=settings.node_name, version=__version__)
        await signals.wait_for_stop()
        agent.stop_data()
    log.info("Stopped")


async def _start_control(
    address: ListenAddress,
    certificates: Certificates,
    node: ClusterNode,
    agent: Agent,
    stack: AsyncExitStack,
) -> None:
    """Serve the operator."""
    # Bodies are taken as they are sent: none of ours is compressed, and a bomb would be.
    runner = web.AppRunner(
        create_control_app(node),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=KEEPALIVE_SECONDS,
        shutdown_timeout=CONTROL_GRACE_SECONDS,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    server = runner.server
    assert server is not None, "set up above"
    sock = bind(address, "--control-listen")
    listener = TLSListener(sock, certificates, server, lambda: len(server.connections))
    listener.start()
    stack.push_async_callback(listener.stop)
    stack.callback(node.changes.close)

    async def reload() -> None:
        await asyncio.to_thread(certificates.reload)

    async def look() -> None:
        node.changes.look()

    agent.every(RELOAD_SECONDS, reload)
    agent.every(WATCH_SECONDS, look)
    log.info("Listens for the operator", port=sock.getsockname()[1])


async def _standalone(settings: StandaloneSettings) -> None:
    asked = asyncio.Event()
    signals = Signals(asked.set)
    signals.install()
    async with AsyncExitStack() as stack:
        policy = AddressPolicy(in_cluster=False)
        agent = Agent(settings, policy, AllowAll(), stack)
        await agent.open()
        await agent.start_health(lambda: (0, 0))
        await _load_and_apply(settings, agent)
        await agent.start_data()
        reloading = asyncio.create_task(_reload_when_asked(settings, agent, asked))
        stack.push_async_callback(_cancel, reloading)
        log.info("Serves standalone", version=__version__)
        await signals.wait_for_stop()
        agent.stop_data()
    log.info("Stopped")


async def _reload_when_asked(
    settings: StandaloneSettings, agent: Agent, asked: asyncio.Event
) -> None:
    """Read the files again at each SIGHUP; anything wrong in them changes nothing."""
    while True:
        await asked.wait()
        asked.clear()
        try:
            await _load_and_apply(settings, agent)
        except UsageError as error:
            log.warning("Kept the configuration: the files have errors", errors=error.problems)


async def _load_and_apply(settings: StandaloneSettings, agent: Agent) -> None:
    """Read the files and put what they say into force, all of it or nothing.

    Raises:
        UsageError: Something is wrong; nothing was changed.
    """
    wanted = await asyncio.to_thread(load, settings.files, settings.permissions)
    problems = [*await agent.configs.check(wanted), *misbindings(settings, wanted)]
    if problems:
        raise UsageError(problems)
    running = await agent.configs.replace(wanted)
    refused = [item.wanted.resource.id for item in running if item.refusal is not None]
    log.info("Applied the configuration", configs=len(running), refused=refused)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _environment(settings: AgentSettings, policy: AddressPolicy) -> BackendEnvironment:
    """Return what any namespace may do; which of them may is decided by `translate`."""
    permissions = settings.permissions
    roots = [root for given in permissions.localfs_roots.values() for root in given]
    return BackendEnvironment(
        policy=policy,
        localfs_roots=tuple(roots),
        allow_ambient=bool(permissions.ambient_namespaces),
        permit_insecure=bool(permissions.insecure_tls_namespaces),
    )


def _shares(settings: AgentSettings) -> Shares:
    """Return who may have how many descriptors, all taken that the administrator grants."""
    limit = raise_file_limit()
    shares = Shares.of(
        limit,
        connections_max=settings.connections_max,
        refusing_max=Limits().connections_refusing_max,
    )
    if shares.readers < settings.connections_max:
        log.warning(
            "Serves fewer readers at a time than --connections-max: the limit of open files is low",
            readers=shares.readers,
            open_files=limit,
        )
    return shares


def _filesystem_bytes(path: Path) -> int:
    """Return the size of the file system a directory is on, or will be."""
    existing = path if path.exists() else path.parent
    found = os.statvfs(existing)
    return found.f_blocks * found.f_frsize


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
