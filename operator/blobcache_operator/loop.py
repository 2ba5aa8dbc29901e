"""
One leadership: collect, plan, act, again whenever a bell rings.

Two bells. `look` asks for new LISTs: a config, Node or EndpointSlice changed, or time passed.
`think` asks for a new plan from what is known: an agent reported, an object came to be. Passes are
spaced by how long they take, so that many changes cost as much as one.
"""

import asyncio
import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from blobcache_api.agent import EvictionResponse
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_api.v1alpha1.node import BlobCacheNodeStatus
from blobcache_operator import errors, evictions, facts, metrics
from blobcache_operator.agent_client import AgentClient
from blobcache_operator.budget import WriteBucket, config_urgency, node_urgency
from blobcache_operator.deletions import Deletions
from blobcache_operator.events import EventPoster
from blobcache_operator.eviction_book import EvictionBook
from blobcache_operator.guard import DropGuard, Loss
from blobcache_operator.jwks import TokenIssuer, read_token_issuer
from blobcache_operator.kube import Kube
from blobcache_operator.leadership import Term
from blobcache_operator.logs import tell_exception
from blobcache_operator.node_objects import COLLECTION, NodeObjects
from blobcache_operator.node_rollup import roll_up_node
from blobcache_operator.pushes import Commons, Fleet, FleetContext
from blobcache_operator.reconcile import Plan, Sealer, Verdict, reconcile
from blobcache_operator.rollup import roll_up
from blobcache_operator.secrets import SecretReader, secret_name
from blobcache_operator.settings import OperatorSettings
from blobcache_operator.snapshot import AgentFacts, ConfigFacts, Limits, Snapshot
from blobcache_operator.status_writer import Offer, StatusWriter, Written
from blobcache_operator.traffic import TrafficLedger

RELIST_SECONDS = 30.0
LIST_RETRY_SECONDS_MAX = 15.0
ISSUER_SECONDS = 300.0
PASS_INTERVAL_SECONDS_MIN = 0.2
PASS_LOAD_MAX = 3.0
"""A pass is followed by a pause of so many times its length: at most a quarter of a core."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Deed:
    """The result of a pass's pure part."""

    plan: Plan
    config_statuses: Mapping[str, BlobCacheConfigStatus]


class Leader:
    """
    What one leadership knows and does.

    Args:
        kube: The API server.
        client: Speaks to agents.
        settings: The administrator's.
        lister: Makes the LISTs.
        term: This leadership.
        identity: This process, for Events.
        is_credible: Tells a leader's epoch from nonsense.
    """

    def __init__(
        self,
        kube: Kube,
        client: AgentClient,
        settings: OperatorSettings,
        lister: facts.Lister,
        term: Term,
        identity: str,
        is_credible: Callable[[int], bool],
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._lister = lister
        self._loop = asyncio.get_running_loop()
        self._start_time = self._loop.time()
        self._look_bell = asyncio.Event()
        self._think = asyncio.Event()
        bucket = WriteBucket()
        self._writer = StatusWriter(kube, term, bucket, self._note_missing)
        self._events = EventPoster(kube, bucket, identity)
        self._node_objects = NodeObjects(kube, term, bucket)
        self._secrets = SecretReader(
            kube,
            interval_seconds=settings.secret_seconds,
            operator_namespace=lister.namespace,
        )
        self._deletions = Deletions(settings.drop_confirm_seconds)
        self._guard = DropGuard(settings.drop_confirm_seconds)
        self._traffic = TrafficLedger()
        self._book = EvictionBook()
        self._sealer = Sealer()
        self._issuer: TokenIssuer | None = None
        self._issuer_time = float("-inf")
        self._listing: facts.Listing | None = None
        self.fleet = Fleet(
            FleetContext(
                term=term,
                client=client,
                changed=self._think.set,
                evicted=self._note_evictions,
                clock=time.time,
                is_credible=is_credible,
                resync_seconds=settings.resync_seconds,
            )
        )
        self.last_turn = self._loop.time()

    async def run(self) -> None:
        """Lead until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._look_loop(), name="look")
                group.create_task(self._think_loop(), name="think")
                group.create_task(self._writer.run(), name="status writer")
                group.create_task(self._events.run(), name="event poster")
                group.create_task(self._run_node_objects(), name="node objects")
        finally:
            await self.fleet.close()

    def notice(self, deleted_uid: str | None = None) -> None:
        """Ring for a new look; a watch's word that a config was deleted is kept."""
        if deleted_uid is not None:
            self._deletions.witness(deleted_uid)
        self._look_bell.set()

    async def _run_node_objects(self) -> None:
        while True:
            try:
                await self._node_objects.load()
                break
            except errors.KubeError as error:
                log.warning("BlobCacheNodes could not be listed", error=str(error))
                await asyncio.sleep(LIST_RETRY_SECONDS_MAX / 3)
        self._think.set()
        await self._node_objects.run(self._think)

    async def _look_loop(self) -> None:
        failures = 0
        while True:
            self._look_bell.clear()
            try:
                await self._look()
                failures = 0
                pause = min(RELIST_SECONDS, self._secrets.seconds_until_due())
            except errors.KubeError as error:
                failures += 1
                pause = min(LIST_RETRY_SECONDS_MAX, 0.5 * 2.0 ** min(failures, 10))
                log.warning("Cluster could not be listed", error=str(error), retry_seconds=pause)
            except errors.LeadershipLost:
                raise
            except Exception as error:  # whatever one object has in it, the others' news must come
                failures += 1
                pause = LIST_RETRY_SECONDS_MAX
                await tell_exception(log, "Look at the cluster broke, trying again", error)
            self._think.set()
            await asyncio.sleep(PASS_INTERVAL_SECONDS_MIN if not failures else pause)
            await _wait(self._look_bell, pause)

    async def _look(self) -> None:
        """Take a complete look; what was known stays when any part of it fails."""
        listing = await self._lister.list_all()
        await self._secrets.refresh(listing.configs)
        await self._refresh_issuer()
        reported: set[str] = set()
        for agent in self.fleet.facts().values():
            if agent.report is not None:
                reported |= set(agent.report.configs) | agent.report.orphan_uids
        self._deletions.observe_list(
            (config.uid for config in listing.configs), reported, listing.time
        )
        self._listing = listing
        self._secrets.forget_unnamed()
        self.fleet.set_agents(listing.agents)

    async def _refresh_issuer(self) -> None:
        if self._loop.time() - self._issuer_time < ISSUER_SECONDS:
            return
        try:
            self._issuer = await read_token_issuer(self._kube)
        except errors.KubeUnavailable:
            # Agents may have the keys; a state without them would take them away.
            if self._issuer is None:
                raise
        except errors.KubeError as error:
            log.warning("Readers' tokens cannot be verified", error=str(error))
        self._issuer_time = self._loop.time()

    async def _think_loop(self) -> None:
        while True:
            await _wait(self._think, RELIST_SECONDS)
            self._think.clear()
            started = self._loop.time()
            self.last_turn = started
            if self._listing is not None:
                with metrics.PASS_SECONDS.time():
                    is_ok = await self._try_pass(self._listing)
                metrics.PASSES.labels(result="ok" if is_ok else "failed").inc()
                if is_ok:
                    metrics.LAST_PASS.set_to_current_time()
            length = self._loop.time() - started
            await asyncio.sleep(max(PASS_INTERVAL_SECONDS_MIN, PASS_LOAD_MAX * length))

    async def _try_pass(self, listing: facts.Listing) -> bool:
        """Make a pass; a mistake of ours in it must not end every tenant's service for good."""
        try:
            await self._pass(listing)
        except errors.LeadershipLost:
            raise
        except Exception as error:
            await tell_exception(log, "Pass broke, trying again at the next bell", error)
            return False
        return True

    async def _pass(self, listing: facts.Listing) -> None:
        snapshot = self._snapshot(listing)
        deed = await asyncio.to_thread(self._compute, snapshot)
        self._act(listing, snapshot, deed)

    def _snapshot(self, listing: facts.Listing) -> Snapshot:
        configs = tuple(self._with_status(config, listing) for config in listing.configs)
        return Snapshot(
            now=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
            configs=configs,
            nodes=listing.nodes,
            agents=self.fleet.facts(),
            credentials={
                config.uid: self._secrets.find(config) for config in configs if secret_name(config)
            },
            deleted_uids=self._deletions.confirmed(listing.time),
        )

    def _with_status(self, config: ConfigFacts, listing: facts.Listing) -> ConfigFacts:
        """Return the config with its newest status: ours, if we wrote since the LIST."""
        written = self._writer.written(facts.config_path(config), config.uid)
        if written is None or written.time < listing.start_time:
            return config
        assert isinstance(written.status, BlobCacheConfigStatus)
        return replace(config, status=written.status)

    def _compute(self, snapshot: Snapshot) -> Deed:
        """Do the pure part; runs in a thread, one at a time."""
        plan = reconcile(snapshot, self._limits(), self._sealer)
        statuses = {}
        for config in snapshot.configs:
            verdict = plan.verdicts[config.uid]
            try:
                statuses[config.uid] = self._roll_up(config, verdict, snapshot)
            except Exception:  # one config's status is not worth all the others'
                log.exception("Status could not be made", config=config.key)
        living = {config.uid for config in snapshot.configs}
        self._traffic.forget_all_but(living)
        self._book.forget_all_but(living)
        return Deed(plan, statuses)

    def _roll_up(
        self, config: ConfigFacts, verdict: Verdict, snapshot: Snapshot
    ) -> BlobCacheConfigStatus:
        self._book.open(config.uid, config.status)
        totals = self._traffic.update(
            config.uid, verdict.selected, snapshot.agents, config.status, snapshot.now
        )
        news = self._book.news(config.uid)
        return roll_up(config, verdict, snapshot.agents, totals, news, now=snapshot.now)

    def _limits(self) -> Limits:
        settings = self._settings
        return Limits(
            configs_per_node=settings.configs_per_node_max,
            configs_per_namespace=settings.configs_per_namespace_max,
            capacity=settings.capacity_max,
            namespace_capacity=settings.namespace_capacity_max,
            protected_percent=settings.protected_percent_max,
            origin_rate=settings.origin_rate_max,
            namespace_origin_rate=settings.namespace_origin_rate_max,
        )

    def _act(self, listing: facts.Listing, snapshot: Snapshot, deed: Deed) -> None:
        self._push(listing, deed.plan)
        for config in snapshot.configs:
            if config.uid in deed.config_statuses:
                self._offer_config(config, deed.config_statuses[config.uid])
        self._node_objects.set_wanted(set(listing.agents), set(self._settings.agent), listing.nodes)
        for name in self._node_objects.names():
            self._offer_node(name, snapshot.agents.get(name), snapshot.now)
        self._writer.forget_all_but(
            {facts.config_path(config) for config in snapshot.configs}
            | {f"{COLLECTION}/{name}" for name in self._node_objects.names()}
        )
        self._count(snapshot, deed.plan)

    def _push(self, listing: facts.Listing, plan: Plan) -> None:
        issuer = self._issuer
        commons = Commons(
            denied_addresses=listing.denied_addresses(),
            jwks={"keys": list(issuer.keys)} if issuer else {},
            issuer=issuer.issuer if issuer else "",
        )
        listed = {config.uid for config in listing.configs}
        for node, agent in self.fleet.agents().items():
            wanted = plan.nodes.get(node)
            # Without a report it is unknown what the node has, and so what it would lose.
            if wanted is None or agent.facts.report is None:
                continue
            known = agent.pushed_uids
            lost = known - {config.uid for config in wanted.configs}
            is_node_known = node in listing.nodes or node in self._settings.agent
            unexplained = {
                uid
                for uid in lost
                if not self._deletions.is_witnessed(uid) and not (uid in listed and is_node_known)
            }
            loss = Loss(len(known), len(unexplained))
            if self._guard.permits(node, loss, listing.time):
                agent.set_plan(wanted, commons)
            else:
                log.info("Push is held back until another LIST agrees", node=node, lost=len(lost))

    def _offer_config(self, config: ConfigFacts, wanted: BlobCacheConfigStatus) -> None:
        path = facts.config_path(config)
        age = self._age(self._writer.written(path, config.uid))
        urgency = config_urgency(config.status, wanted, age_seconds=age)
        self._writer.offer(Offer("config", path, config.uid, wanted, urgency))

    def _offer_node(self, name: str, agent: AgentFacts | None, now: datetime.datetime) -> None:
        path = f"{COLLECTION}/{name}"
        found = self._node_objects.find(name)
        if found is None:
            self._writer.forget(path)
            return
        written = self._writer.written(path, found.uid)
        before = written.status if written else found.status
        assert before is None or isinstance(before, BlobCacheNodeStatus)
        wanted = roll_up_node(agent, before, now=now)
        urgency = node_urgency(before, wanted, age_seconds=self._age(written))
        self._writer.offer(Offer("node", path, found.uid, wanted, urgency))

    def _age(self, written: Written | None) -> float:
        return self._loop.time() - (written.time if written else self._start_time)

    def _note_missing(self, path: str) -> None:
        if path.startswith(f"{COLLECTION}/"):
            self._node_objects.note_missing(path.removeprefix(f"{COLLECTION}/"))
        else:
            self._look_bell.set()

    def _note_evictions(
        self,
        node: str,
        decisions: tuple[evictions.Decision, ...],
        response: EvictionResponse | None,
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        notes = self._book.record(node, decisions, response, now.replace(microsecond=0))
        listed = {config.uid: config for config in self._listing.configs} if self._listing else {}
        for uid, note in notes.items():
            if uid in listed:
                self._events.post(
                    _reference(listed[uid]),
                    reason="BlobsEvicted",
                    action="Evict",
                    note=note,
                    now=now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                )
        self._think.set()

    def _count(self, snapshot: Snapshot, plan: Plan) -> None:
        refused = sum(verdict.refusal is not None for verdict in plan.verdicts.values())
        metrics.CONFIGS.labels(verdict="refused").set(refused)
        metrics.CONFIGS.labels(verdict="admitted").set(len(plan.verdicts) - refused)
        available = sum(agent.is_available for agent in snapshot.agents.values())
        metrics.AGENTS.labels(state="available").set(available)
        metrics.AGENTS.labels(state="unavailable").set(len(snapshot.agents) - available)


def _reference(config: ConfigFacts) -> dict[str, str]:
    return {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheConfig",
        "namespace": config.namespace,
        "name": config.name,
        "uid": config.uid,
    }


async def _wait(bell: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await bell.wait()
    except TimeoutError:
        return
