"""What one tenant, node or Secret does must not end what the operator does for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.operator.makers import (
    NOW,
    S3,
    agent,
    config,
    figures,
    plan,
    prefetch,
    snapshot,
)

from blobcache_api.agent import ApplyResult, DesiredState, Report, StaleState, parse_state
from blobcache_api.v1alpha1.common import INT64_MAX
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_operator import errors, secrets
from blobcache_operator.budget import Urgency, WriteBucket
from blobcache_operator.discovery import AgentAddress
from blobcache_operator.leadership import Leadership, Term
from blobcache_operator.pushes import AgentTask, Commons, FleetContext
from blobcache_operator.reconcile import NodePlan
from blobcache_operator.rollup import EvictionNews, roll_up
from blobcache_operator.secrets import SecretReader
from blobcache_operator.snapshot import AgentFacts, ConfigFacts
from blobcache_operator.status_writer import Offer, StatusWriter
from blobcache_operator.traffic import DEPARTED_MAX, TrafficLedger

HUGE = {"blobs": [{"id": f"b{number}", "size": 2**53} for number in range(1000)]}


def _status(of: ConfigFacts, *agents: AgentFacts) -> BlobCacheConfigStatus:
    facts = snapshot(of, agents=agents)
    verdict = plan(facts).verdicts[of.uid]
    totals = TrafficLedger().update(of.uid, verdict.selected, facts.agents, None, NOW)
    return roll_up(of, verdict, facts.agents, totals, EvictionNews(), now=NOW)


def test_sizes_that_a_tenant_claims_do_not_break_the_roll_up() -> None:
    """Their sum has more than 64 bits; the API server accepts each of them."""
    greedy = config("a", prefetch=HUGE, cache={"capacity": "8Pi"})
    status = _status(greedy, *(agent(f"node-{number}") for number in range(1500)))
    assert status.prefetch is not None
    assert status.usage is not None
    assert status.prefetch.bytes == status.usage.capacity_bytes == INT64_MAX
    assert status.prefetch.percent == 0


def test_figures_that_agents_claim_do_not_break_the_roll_up() -> None:
    """One node that says anything must not stop the whole cluster's status."""
    of = config("a", prefetch={"blobs": [{"id": "x"}]})
    names = ("requests", "hit_bytes", "miss_bytes", "origin_bytes", "origin_errors", "bytes",
             "blobs", "evicted_blobs", "evicted_bytes")  # fmt: skip
    mad = figures(
        of, prefetch=prefetch(INT64_MAX, INT64_MAX, size=1), **dict.fromkeys(names, INT64_MAX)
    )
    status = _status(of, agent("one", mad), agent("two", mad))
    assert status.traffic is not None
    assert status.traffic.requests == INT64_MAX
    assert status.traffic.hit_ratio_percent == 50


def test_a_node_that_comes_back_is_not_counted_twice() -> None:
    """Its endpoint was away for a moment, its agent counted on."""
    of = config("a")
    ledger = TrafficLedger()

    def count(requests: int | None) -> int:
        there = () if requests is None else (agent("one", figures(of, requests=requests)),)
        agents = {item.node: item for item in there}
        return ledger.update(of.uid, tuple(agents), agents, None, NOW)["requests"]

    assert [count(10), count(None), count(12), count(None), count(3)] == [10, 10, 12, 12, 15]


def test_departed_nodes_are_remembered_within_a_bound() -> None:
    """Their counts are never lost."""
    of = config("a")
    ledger = TrafficLedger()
    for number in range(DEPARTED_MAX * 2):
        only = agent(f"node-{number}", figures(of, requests=1))
        totals = ledger.update(of.uid, (only.node,), {only.node: only}, None, NOW)
    assert totals["requests"] == DEPARTED_MAX * 2
    assert len(ledger._accounts[of.uid].readings) <= DEPARTED_MAX + 1


class Server:
    """Stands for the API server's Secrets; what is not among them fails as told."""

    def __init__(self) -> None:
        self.failure: errors.KubeError | None = None
        self.reads = 0

    async def get(self, path: str) -> dict[str, Any]:
        """Return a Secret of this name."""
        self.reads += 1
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        name = path.rsplit("/", 1)[1]
        labels = {"blobcache.dev/credentials": "true"}
        metadata = {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}
        return {"metadata": metadata, "data": {"accessKeyID": "YQ==", "secretAccessKey": "YQ=="}}


def _naming(secret: str, generation: int) -> ConfigFacts:
    made = config("a", backend={**S3, "credentialsSecretRef": {"name": secret}})
    return ConfigFacts(**{name: getattr(made, name) for name in ("namespace", "name", "uid")},
                       generation=generation, created=made.created, spec=made.spec)  # fmt: skip


async def test_the_last_complete_look_keeps_its_secrets_while_the_next_fails() -> None:
    """Plans go on being made from it; without its Secret they would break, or lose credentials."""
    server = Server()
    reader = SecretReader(server, interval_seconds=30, operator_namespace="system")  # type: ignore[arg-type]
    before, after = _naming("old", 1), _naming("new", 2)
    await reader.refresh([before])
    reader.forget_unnamed()
    server.failure = errors.KubeUnavailable(500, "InternalError", "etcd is away")
    with pytest.raises(errors.KubeUnavailable):
        await reader.refresh([after])
    assert reader.find(before).credentials is not None
    server.failure = None
    await reader.refresh([after])
    assert reader.find(before).credentials is not None
    reader.forget_unnamed()
    assert reader.find(after).credentials is not None
    assert set(reader._known) == {("demo", "new")}


async def test_a_secret_that_cannot_be_read_is_kept_and_not_asked_for_at_once() -> None:
    """Each attempt lists the whole cluster; the server is in trouble already."""
    server = Server()
    reader = SecretReader(server, interval_seconds=0.01, operator_namespace="system")  # type: ignore[arg-type]
    of = _naming("key", 1)
    await reader.refresh([of])
    await asyncio.sleep(0.02)
    reader._interval_seconds = secrets.PROBLEM_INTERVAL_SECONDS * 3
    reader._read_time.clear()
    server.failure = errors.KubeUnavailable(500, "InternalError", "the key service is away")
    await reader.refresh([of])
    assert reader.find(of).credentials is not None
    assert 5 < reader.seconds_until_due() <= secrets.PROBLEM_INTERVAL_SECONDS


class Agent:
    """Stands for the client of an agent whose disk remembers a state of this very leader."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.pushed: list[int] = []

    async def push(self, url: str, state: bytes, *, epoch: int) -> ApplyResult:
        """Refuse what is older, as agents do."""
        pushed: DesiredState = parse_state(state)
        self.pushed.append(pushed.revision)
        if pushed.revision <= self.revision:
            raise errors.StateOutdated(StaleState(epoch=epoch, revision=self.revision).revision)
        self.revision = pushed.revision
        return ApplyResult(epoch=epoch, revision=pushed.revision, digest=pushed.digest)

    async def report(self, url: str, *, wait_seconds: int, after: int) -> Report:
        """Say that all is well, then nothing more."""
        if wait_seconds:
            await asyncio.Event().wait()
        return Report.model_validate({
            "node": "one", "bootId": "b", "agentVersion": "1", "startTime": NOW, "change": 1,
            "protocol": {"min": 1, "max": 1},
            "disk": {"totalBytes": 1, "availableBytes": 1, "usedBytes": 0, "minFreeBytes": 0},
        })  # fmt: skip


async def _until(probe: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while True:
            if probe():
                return
            await asyncio.sleep(0.01)


async def test_a_replaced_pod_that_found_its_state_is_up_to_date_after_two_pushes() -> None:
    """The conversation is new, the revision on the node's disk is not."""
    twin = Agent(revision=1000)
    loop = asyncio.get_running_loop()
    context = FleetContext(
        term=Term(7, loop.time() + 60),
        client=twin,  # type: ignore[arg-type]
        changed=lambda: None,
        evicted=lambda *_: None,
        clock=lambda: 0.0,
        is_credible=lambda _: True,
        resync_seconds=60,
    )
    conversation = AgentTask(AgentAddress("one", "https://127.0.0.1:1"), context)
    conversation.set_plan(NodePlan(), Commons())
    task = asyncio.create_task(conversation.run())
    await _until(lambda: twin.revision > 1000)
    assert twin.pushed == [1, 1001]
    assert conversation.facts.push_failure is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Statuses:
    """Stands for the API server's statuses."""

    async def merge_patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take any."""
        return {}


async def test_the_writer_remembers_objects_that_exist_only() -> None:
    """Names come and go by the thousand; one made again is another object."""
    loop = asyncio.get_running_loop()
    writer = StatusWriter(
        Statuses(),  # type: ignore[arg-type]
        Term(7, loop.time() + 60),
        WriteBucket(),
        lambda _: None,
    )
    task = asyncio.create_task(writer.run())
    for path in ("a", "b"):
        writer.offer(Offer("config", path, "first", BlobCacheConfigStatus(), Urgency.CONDITIONS))
    await _until(lambda: writer.written("a", "first") and writer.written("b", "first"))
    assert writer.written("a", "second") is None
    writer.forget_all_but({"b"})
    assert writer.written("a", "first") is None
    assert writer.written("b", "first") is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Leases:
    """Stands for an API server with a Lease that somebody edited."""

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    async def get(self, path: str) -> dict[str, Any]:
        """Return a Lease nobody holds."""
        annotations = {"blobcache.dev/epoch": 'not;a"number'}
        return {
            "metadata": {"resourceVersion": "1", "annotations": annotations},
            "spec": {"leaseTransitions": 2**31 - 1},
        }

    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take what the API server would."""
        assert body["spec"]["leaseTransitions"] < 2**31
        self.written = body
        return body


async def test_a_lease_that_somebody_edited_can_be_taken() -> None:
    """Its counter is at its end and its epoch is no number; still somebody must lead."""
    server = Leases()
    leadership = Leadership(server, namespace="system", name="lease", identity="me")  # type: ignore[arg-type]
    taken = await leadership._try_acquire()
    assert taken is not None
    assert server.written["spec"]["holderIdentity"] == "me"
    assert server.written["metadata"]["annotations"]["blobcache.dev/epoch"] == str(taken[1].epoch)
