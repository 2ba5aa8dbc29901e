"""The process: certificates, health and leadership; what leads is `loop.Leader`."""

import asyncio
import contextlib
import datetime
import os
import signal
import socket
import ssl
import uuid
from collections.abc import Mapping

import structlog

from blobcache_operator import certificates, errors, wakeups
from blobcache_operator.agent_client import AgentClient
from blobcache_operator.certificate_store import (
    CertificateStore,
    client_context,
    renew_context,
    write_leaf,
)
from blobcache_operator.facts import NODES_PATH, Lister
from blobcache_operator.health import Health, health_served
from blobcache_operator.installed_schema import find_schema_problem
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import NAMESPACE_DEFAULT, KubeAccess
from blobcache_operator.leadership import Leadership, LeaseTimes, Term
from blobcache_operator.logs import tell_exception
from blobcache_operator.loop import Leader
from blobcache_operator.settings import OperatorSettings

# A pod cannot start without its Secret: one that somebody deleted must soon be there again.
CERTIFICATE_SECONDS = 60.0
CERTIFICATE_RETRY_SECONDS = 5.0
TURN_SECONDS_MAX = 180.0
SCHEMA_RETRY_SECONDS = 5.0
# Two operators that share agents but no Lease would overbid each other; this bounds how fast.
SUPERSEDED_SECONDS = 2.0

log = structlog.get_logger(__name__)


class Keeper:
    """
    Keeps this process's certificate, and the agents' on request, up to date.

    Args:
        store: The Secrets.
        settings: Where to write the agents' files, if anywhere.
    """

    def __init__(self, store: CertificateStore, settings: OperatorSettings) -> None:
        self._store = store
        self._settings = settings
        self._context: ssl.SSLContext | None = None
        self._is_there = asyncio.Event()
        self._known: tuple[certificates.Leaf, certificates.Leaf] | None = None
        self.problem: str | None = None
        """Why there are no certificates, with the remedy, while somebody must mend it."""

    async def context(self) -> ssl.SSLContext:
        """Return the context for agents, once there is one; it is renewed in place."""
        await self._is_there.wait()
        assert self._context is not None
        return self._context

    async def run(self) -> None:
        """Look after the certificates until cancelled."""
        while True:
            try:
                pause = await self._turn()
                self.problem = None
            except errors.SecretUnusable as error:
                pause = CERTIFICATE_RETRY_SECONDS
                self.problem = str(error)
                log.error("A certificate's Secret cannot be used", remedy=self.problem)  # noqa: TRY400
            except errors.KubeError as error:
                pause = CERTIFICATE_RETRY_SECONDS
                log.warning(
                    "Certificates were not brought up to date; the operator's namespace must exist "
                    "and its Secrets be writable",
                    error=str(error),
                )
            except Exception as error:  # whatever somebody put into a Secret, agents are served on
                pause = CERTIFICATE_RETRY_SECONDS
                await tell_exception(log, "Certificates were not brought up to date", error)
            await asyncio.sleep(pause)

    async def _turn(self) -> float:
        now = datetime.datetime.now(datetime.UTC)
        operator, agent = await self._store.ensure(now)
        if (operator, agent) == self._known:
            return CERTIFICATE_SECONDS
        if self._context is None:
            self._context = await asyncio.to_thread(client_context, operator)
        else:
            await asyncio.to_thread(renew_context, self._context, operator)
        if self._settings.write_agent_certs is not None:
            await write_leaf(agent, self._settings.write_agent_certs)
            log.info(
                "Agents' certificates written", directory=str(self._settings.write_agent_certs)
            )
        self._known = (operator, agent)
        self._is_there.set()
        return CERTIFICATE_SECONDS


class Program:
    """
    One replica.

    Args:
        settings: The administrator's.
        access: The API server.
        environment: Of the process.
    """

    def __init__(
        self,
        settings: OperatorSettings,
        access: KubeAccess,
        environment: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._namespace = settings.namespace or access.namespace or NAMESPACE_DEFAULT
        self._kube = Kube(access)
        host = environment.get("POD_NAME") or socket.gethostname()
        self._identity = f"{host[:200]}_{uuid.uuid4().hex[:8]}"
        self._leadership = Leadership(
            self._kube,
            namespace=self._namespace,
            name=settings.lease_name,
            identity=self._identity,
            times=LeaseTimes.of(settings.lease_seconds),
        )
        self._keeper = Keeper(
            CertificateStore(self._kube, namespace=self._namespace, deployment=settings.deployment),
            settings,
        )
        self._leader: Leader | None = None
        self._schema_problem: str | None = None

    async def run(self) -> None:
        """Run until cancelled."""
        host, port = self._settings.health_address
        health = Health(
            lambda: self._leadership.last_contact, self._is_loop_alive, self._find_obstacle
        )
        log.info(
            "Operator started",
            identity=self._identity,
            namespace=self._namespace,
            server=self._kube.access.server,
        )
        async with self._kube, health_served(health, host, port), asyncio.TaskGroup() as group:
            group.create_task(self._keeper.run(), name="certificates")
            group.create_task(self._run_leadership(), name="leadership")

    def _find_obstacle(self) -> str | None:
        return self._schema_problem or self._keeper.problem

    async def _run_leadership(self) -> None:
        """
        Take part in the election, once the cluster's CRDs are new enough for it.

        Until then this replica is alive but not ready, so a rolling upgrade leaves the old one at
        work, and goes on by itself when the CRDs were upgraded.
        """
        while True:
            try:
                self._schema_problem = await find_schema_problem(self._kube)
            except errors.KubeError as error:
                log.warning("CRDs could not be read", error=str(error))
            else:
                if self._schema_problem is None:
                    break
                log.error("The installed CRDs cannot be used", remedy=self._schema_problem)
            await asyncio.sleep(SCHEMA_RETRY_SECONDS)
        await self._leadership.run(self._lead)

    def _is_loop_alive(self) -> bool:
        leader = self._leader
        if leader is None:
            return True
        return asyncio.get_running_loop().time() - leader.last_turn < TURN_SECONDS_MAX

    async def _lead(self, term: Term) -> None:
        """Lead for one term; returns when an agent turns out to follow a higher epoch."""
        context = await self._keeper.context()
        async with AgentClient(context) as client:
            try:
                await self._lead_with(term, client)
            except* errors.LeadershipLost as group:
                log.warning("Acting ended with the leadership", error=str(group.exceptions[0]))
            finally:
                self._leader = None

    async def _lead_with(self, term: Term, client: AgentClient) -> None:
        lister = Lister(
            self._kube,
            namespace=self._namespace,
            service=self._settings.agent_service,
            by_hand=self._settings.agent,
            environment=self._environment,
        )
        leader = self._leader = Leader(
            self._kube,
            client,
            self._settings,
            lister,
            term,
            self._identity,
            self._leadership.is_credible,
        )
        async with asyncio.TaskGroup() as group:
            acting = [
                group.create_task(leader.run(), name="leader"),
                group.create_task(self._run_kopf(leader), name="kopf"),
            ]
            for path in (NODES_PATH, lister.slices_path):
                watch = wakeups.watch_changes(self._kube, path, leader.notice)
                acting.append(group.create_task(watch, name=f"watch {path}"))
            epoch = await leader.fleet.newer_leader
            log.warning("An agent follows a higher epoch, acquiring a higher one", epoch=epoch)
            self._leadership.raise_epoch_above(epoch)
            for task in acting:
                task.cancel()
        await asyncio.sleep(SUPERSEDED_SECONDS)

    async def _run_kopf(self, leader: Leader) -> None:
        async with wakeups.kopf_running(self._kube.access, leader.notice):
            await asyncio.get_running_loop().create_future()


async def run_until_signalled(program: Program) -> None:
    """Run a program; SIGTERM and SIGINT end it in order, the Lease released."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(program.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    log.info("Operator stopped")


def environment() -> dict[str, str]:
    """Return the process's environment, read once."""
    return dict(os.environ)
