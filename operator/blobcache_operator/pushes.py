"""
One conversation per agent: report, push, evict; each with its own deadline and back-off.

A dead or slow agent costs its own task only. Of pushes at most `PUSHES_AT_ONCE_MAX` are under way.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from blobcache_api.agent import (
    ApplyResult,
    DesiredState,
    EvictionResponse,
    Report,
    dump_for_push,
    seal_state,
)
from blobcache_operator import evictions, metrics
from blobcache_operator.agent_client import (
    PRESSED_WAIT_SECONDS,
    REPORT_WAIT_SECONDS,
    AgentClient,
)
from blobcache_operator.discovery import AgentAddress
from blobcache_operator.errors import AgentError, LeadershipLost, NewerLeader, StateOutdated
from blobcache_operator.leadership import Term
from blobcache_operator.logs import tell_exception
from blobcache_operator.reconcile import NodePlan
from blobcache_operator.reports import condense
from blobcache_operator.snapshot import AgentFacts, Failure

PUSHES_AT_ONCE_MAX = 50
BACKOFF_SECONDS_MIN = 1.0
BACKOFF_SECONDS_MAX = 15.0
RESYNC_JITTER = 0.1
# An agent that answers its long poll at once, again and again, is held to this.
REPORT_INTERVAL_SECONDS_MIN = 0.5
EVICTION_INTERVAL_SECONDS_MIN = 10.0
# Learning an agent's revision takes one push; one that refuses more is in trouble.
OUTDATED_PUSHES_MAX = 2
REVISION_MAX = 2**53

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Commons:
    """What every node's state has alike."""

    denied_addresses: tuple[str, ...] = ()
    jwks: Mapping[str, Any] = field(default_factory=dict)
    issuer: str = ""


EvictionListener = Callable[[str, tuple[evictions.Decision, ...], EvictionResponse | None], None]


@dataclass(frozen=True, slots=True)
class FleetContext:
    """
    What all conversations of one leadership share.

    Args:
        term: Whose epoch fences the pushes.
        client: Speaks to agents.
        changed: Called after every report or failure that changed what is known.
        evicted: Called with each plan and what became of it.
        clock: Unix seconds.
        is_credible: Tells a leader's epoch from nonsense.
        resync_seconds: Time between pushes of the same state.
    """

    term: Term
    client: AgentClient
    changed: Callable[[], None]
    evicted: EvictionListener
    clock: Callable[[], float]
    is_credible: Callable[[int], bool]
    resync_seconds: float
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PUSHES_AT_ONCE_MAX))


class AgentTask:
    """
    The conversation with one agent.

    Args:
        address: Where it is.
        context: Shared by all.
    """

    def __init__(self, address: AgentAddress, context: FleetContext) -> None:
        self.address = address
        self.facts = AgentFacts(node=address.node)
        self._context = context
        self._plan: NodePlan | None = None
        self._commons = Commons()
        self._state: DesiredState | None = None
        self._revision = 0
        self._taken_uids: set[str] | None = None
        self._planned = asyncio.Event()
        self._reported = asyncio.Event()
        self._report_failures = 0
        self._push_failures = 0
        self._next_eviction = 0.0

    @property
    def pushed_uids(self) -> set[str]:
        """Uids of the configs the agent took in this leadership, else says it has."""
        if self._taken_uids is not None:
            return self._taken_uids
        report = self.facts.report
        return set(report.configs) if report else set()

    def set_plan(self, plan: NodePlan, commons: Commons) -> None:
        """Say what the node should run; a push follows if that is new."""
        if plan == self._plan and commons == self._commons:
            return
        self._plan, self._commons = plan, commons
        self._planned.set()

    async def run(self) -> None:
        """
        Converse until cancelled.

        Raises:
            NewerLeader: The agent follows a higher epoch.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report_loop())
            group.create_task(self._push_loop())

    async def _push_loop(self) -> None:
        while True:
            # The first report tells what the node has, which decides whether a loss is believed;
            # and an agent that does not report shall not hold one of the slots until a deadline.
            await self._reported.wait()
            try:
                is_pushed = await self._push()
            except AgentError as error:
                metrics.PUSHES.labels(result="failed").inc()
                self._push_failures += 1
                if isinstance(error, StateOutdated):
                    self._go_above(error.revision)
                    is_told = self._push_failures > OUTDATED_PUSHES_MAX
                else:
                    is_told = True
                if is_told:
                    self._tell(error)
                    self._update(push_failure=Failure(error.reason, error.message))
                await self._wait_for_plan(_backoff(self._push_failures))
                continue
            pause = self._context.resync_seconds if is_pushed else None
            if pause is not None:
                pause *= random.uniform(1 - RESYNC_JITTER, 1 + RESYNC_JITTER)  # noqa: S311
            await self._wait_for_plan(pause)

    def _go_above(self, revision: int) -> None:
        """Let the next state be newer than the agent's, unless it tells a revision nobody made."""
        self._state = None
        self._revision += 1
        if revision < REVISION_MAX:
            self._revision = max(self._revision, revision)

    async def _wait_for_plan(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._planned.wait()

    async def _push(self) -> bool:
        """Push the plan; return False when there is none yet."""
        self._planned.clear()
        plan, commons = self._plan, self._commons
        if plan is None:
            return False
        async with self._context.slots:
            self._context.term.check()
            state = await asyncio.to_thread(self._make_state, plan, commons)
            raw = await asyncio.to_thread(dump_for_push, state)
            with metrics.PUSH_SECONDS.time():
                try:
                    result = await self._context.client.push(
                        self.address.url, raw, epoch=state.epoch
                    )
                except NewerLeader as newer:
                    if self._context.is_credible(newer.epoch):
                        raise
                    raise AgentError(
                        "AgentNonsense",
                        "The agent claims an epoch far in the future. Check the node's disk, then "
                        "delete the agent's state file and restart it.",
                    ) from newer
        metrics.PUSHES.labels(result="ok").inc()
        self._take_result(result, state)
        return True

    def _make_state(self, plan: NodePlan, commons: Commons) -> DesiredState:
        """Return the sealed state; the same state keeps its revision."""
        state = seal_state(
            DesiredState(
                epoch=self._context.term.epoch,
                revision=self._revision,
                node=self.address.node,
                configs=plan.configs,
                tombstones=plan.tombstones,
                denied_addresses=commons.denied_addresses,
                jwks=dict(commons.jwks),
                issuer=commons.issuer,
            )
        )
        if self._state is not None and self._state.digest == state.digest:
            return self._state
        self._revision += 1
        self._state = state.model_copy(update={"revision": self._revision})
        return self._state

    def _take_result(self, result: ApplyResult, state: DesiredState) -> None:
        wanted = {config.uid for config in state.configs}
        refusals = {
            item.uid: Failure(item.reason or "Refused", item.message or "See the agent's log.")
            for item in result.configs
            if item.uid in wanted and not item.applied
        }
        self._push_failures = 0
        self._taken_uids = wanted
        self._update(refusals=refusals, push_failure=None)

    async def _report_loop(self) -> None:
        loop = asyncio.get_running_loop()
        after, wait = 0, 0
        while True:
            started = loop.time()
            try:
                report = await self._context.client.report(
                    self.address.url, wait_seconds=wait, after=after
                )
                self._check_identity(report)
            except AgentError as error:
                self._reported.clear()
                self._report_failures += 1
                self._tell(error)
                self._update(failure=Failure(error.reason, error.message), is_asked=True)
                after, wait = 0, 0
                await asyncio.sleep(_backoff(self._report_failures))
                continue
            after, wait = report.change, self._report_wait_seconds(report)
            facts = condense(report)
            before = self.facts.report
            is_new = before is not None and before.incarnation != facts.incarnation
            if self.facts.failure is not None or is_new:
                self._planned.set()  # it is back, perhaps without credentials: push now
            self._report_failures = 0
            self._update(failure=None, report=facts, is_asked=True)
            self._reported.set()
            await self._evict(report)
            await asyncio.sleep(max(0.0, REPORT_INTERVAL_SECONDS_MIN - (loop.time() - started)))

    def _report_wait_seconds(self, report: Report) -> int:
        """Return how long the agent may hold its next report back if nothing changes."""
        specs = {config.uid: config.spec for config in self._plan.configs} if self._plan else {}
        return PRESSED_WAIT_SECONDS if evictions.is_pressed(report, specs) else REPORT_WAIT_SECONDS

    def _check_identity(self, report: Report) -> None:
        node, uid = self.address.node, self.address.pod_uid
        if report.node != node:
            raise AgentError(
                "AgentNonsense",
                f"The agent at this node's address says it is on '{report.node[:253]}'. Check "
                "--node-name of the agents, or --agent of the operator.",
            )
        if uid and report.pod_uid and uid != report.pod_uid and len(uid) == 36:
            raise AgentError("AgentReplaced", "Another pod answers at this agent's address. Wait.")

    async def _evict(self, report: Report) -> None:
        """Decide and ask for evictions; failure only delays them, so it is told and that is all."""
        loop = asyncio.get_running_loop()
        if self._plan is None or loop.time() < self._next_eviction:
            return
        specs = {config.uid: config.spec for config in self._plan.configs}
        decisions = evictions.decide(report, specs, now=self._context.clock())
        if not decisions:
            return
        self._next_eviction = loop.time() + EVICTION_INTERVAL_SECONDS_MIN
        self._context.term.check()
        response = None
        try:
            response = await self._context.client.evict(
                self.address.url, evictions.make_request(decisions)
            )
        except AgentError as error:
            log.warning("Eviction was not carried out", node=self.address.node, error=str(error))
        for result in response.results if response else ():
            metrics.EVICTION_REQUESTS.labels(outcome=result.outcome.value).inc()
        self._context.evicted(self.address.node, decisions, response)

    def _tell(self, error: AgentError) -> None:
        """Log a failure once, not at every attempt."""
        known = (self.facts.failure, self.facts.push_failure)
        if all(failure is None or failure.reason != error.reason for failure in known):
            log.warning(
                "Agent failed", node=self.address.node, reason=error.reason, message=error.message
            )

    def _update(self, **changes: Any) -> None:
        before = self.facts
        values = {
            "failure": before.failure,
            "push_failure": before.push_failure,
            "report": before.report,
            "refusals": before.refusals,
            "is_asked": before.is_asked,
            **changes,
        }
        self.facts = AgentFacts(node=before.node, **values)
        if self.facts != before:
            self._context.changed()


def _backoff(failures: int) -> float:
    """Return seconds to wait: doubling with each failure, spread over the upper half."""
    longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2.0 ** min(failures - 1, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreading, not secrecy


class Fleet:
    """
    All conversations of one leadership.

    Args:
        context: Shared by them.
    """

    def __init__(self, context: FleetContext) -> None:
        self._context = context
        self._agents: dict[str, AgentTask] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.newer_leader: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def set_agents(self, addresses: Mapping[str, AgentAddress]) -> None:
        """Begin conversations with new agents and end those with agents that are gone."""
        for node in list(self._agents):
            if addresses.get(node) != self._agents[node].address:
                self._tasks.pop(node).cancel()
                del self._agents[node]
        for node, address in addresses.items():
            if node not in self._agents:
                self._agents[node] = AgentTask(address, self._context)
                self._tasks[node] = asyncio.create_task(
                    self._converse(self._agents[node]), name=f"agent {node}"
                )

    def agents(self) -> dict[str, AgentTask]:
        """Return the conversations by node."""
        return dict(self._agents)

    def facts(self) -> dict[str, AgentFacts]:
        """Return what is known of each agent."""
        return {node: agent.facts for node, agent in self._agents.items()}

    async def close(self) -> None:
        """End all conversations."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        self._agents.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _converse(self, agent: AgentTask) -> None:
        await _supervise(agent.run, agent.address.node, self._note_newer_leader)

    def _note_newer_leader(self, epoch: int) -> None:
        if not self.newer_leader.done():
            self.newer_leader.set_result(epoch)


async def _supervise(
    run: Callable[[], Coroutine[Any, Any, None]], node: str, newer: Callable[[int], None]
) -> None:
    """
    Run a conversation again when it breaks for a reason nobody foresaw.

    One node's trouble must not end the others' conversations, and must be seen.
    """
    is_superseded = False
    while not is_superseded:
        try:
            await run()
        except* NewerLeader as group:
            newer(max(_epochs(group)))
            is_superseded = True
        except* LeadershipLost:
            is_superseded = True
        except* Exception as group:
            event = "Conversation with an agent broke, starting it again"
            await tell_exception(log, event, group, node=node)
        await asyncio.sleep(BACKOFF_SECONDS_MIN)


def _epochs(group: BaseExceptionGroup[NewerLeader]) -> list[int]:
    epochs: list[int] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            epochs += _epochs(error)
        else:
            epochs.append(error.epoch)
    return epochs
