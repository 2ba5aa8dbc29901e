"""From verdicts and reports to a config's status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.makers import (
    GIB,
    NOW,
    S3,
    START,
    agent,
    config,
    figures,
    plan,
    prefetch,
    snapshot,
)

from blobcache_api.v1alpha1.common import ConditionStatus
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_api.v1alpha1.node import ConfigState
from blobcache_operator.rollup import EvictionNews, roll_up
from blobcache_operator.snapshot import AgentFacts, ConfigFacts, CredentialFacts, Failure
from blobcache_operator.traffic import FIELDS, Totals

ZERO = Totals(START, (0,) * len(FIELDS))
DEAD = Failure("AgentUnreachable", "See its pod.")


def _roll(
    one: ConfigFacts,
    agents: tuple[AgentFacts, ...],
    *,
    totals: Totals = ZERO,
    credentials: CredentialFacts | None = None,
    **limits: Any,
) -> BlobCacheConfigStatus:
    found = {one.uid: credentials} if credentials else {}
    facts = snapshot(one, agents=agents, credentials=found)
    made = plan(facts, **limits)
    return roll_up(one, made.verdicts[one.uid], facts.agents, totals, EvictionNews(), now=NOW)


def _digest(one: ConfigFacts) -> str:
    return plan(snapshot(one, agents=(agent("x"),))).nodes["x"].configs[0].digest


def _says(status: BlobCacheConfigStatus) -> dict[str, str]:
    return {
        condition.type: f"{condition.status.value} {condition.reason}"
        for condition in status.conditions
    }


def test_all_conditions_are_set_at_first_sight() -> None:
    """The very first status has them all, of the generation seen."""
    one = config("a")
    status = _roll(one, (AgentFacts("one"),))
    assert _says(status) == {
        "Ready": "Unknown AskingAgents",
        "Degraded": "Unknown AskingAgents",
        "CredentialsValid": "True NotRequired",
        "Warm": "True NotRequired",
    }
    assert all(condition.observed_generation == 1 for condition in status.conditions)
    assert status.observed_generation == 1


@pytest.mark.parametrize(
    ("agents", "ready", "degraded", "summary"),
    [
        ("", "False NoAgents", "True NoAgents", "0/0"),
        ("r", "True Applied", "False AsExpected", "1/1"),
        ("rp", "False Applying", "False AsExpected", "1/2"),
        ("rd", "True Applied", "True AgentUnreachable", "1/2"),
        ("dd", "False AgentsUnavailable", "True AgentUnreachable", "0/2"),
        ("rf", "False OriginRefused", "True OriginRefused", "1/2"),
        ("rR", "False StateRefused", "True StateRefused", "1/2"),
        ("rD", "True Applied", "True OriginTimeout", "2/2"),
        ("o", "False Applying", "False AsExpected", "0/1"),
    ],
)
def test_ready_is_about_available_nodes_and_degraded_names_trouble(
    agents: str, ready: str, degraded: str, summary: str
) -> None:
    """r ready, p pending, d dead, f failed, R refuses the push, D degraded, o older config."""
    one = config("a")
    digest = _digest(one)
    made = {
        "r": lambda node: agent(node, figures(one, digest)),
        "p": lambda node: agent(node, figures(one, state=ConfigState.PENDING)),
        "d": lambda node: replace(agent(node, figures(one, digest)), failure=DEAD),
        "f": lambda node: agent(
            node,
            figures(one, state=ConfigState.FAILED, failure=Failure("OriginRefused", "Allow it.")),
        ),
        "R": lambda node: replace(agent(node), push_failure=Failure("StateRefused", "See.")),
        "D": lambda node: agent(
            node, figures(one, digest, degraded=Failure("OriginTimeout", "Slow."))
        ),
        "o": lambda node: agent(node, figures(one, "0" * 64)),
    }
    facts = tuple(made[kind](f"node-{index}") for index, kind in enumerate(agents))
    status = _roll(one, facts)
    assert _says(status)["Ready"] == ready
    assert _says(status)["Degraded"] == degraded
    assert status.nodes is not None
    assert status.nodes.summary == summary


def test_a_selector_that_matches_nothing_is_told() -> None:
    """Agents without the labels are NoNodesSelected, with the remedy."""
    status = _roll(config("a", nodeSelector={"x": "y"}), (agent("one"),))
    assert _says(status)["Ready"] == "False NoNodesSelected"
    assert "kubectl label node" in status.conditions[0].message
    assert _says(status)["Degraded"] == "False NoNodesSelected"
    assert "No node runs" in status.conditions[1].message


def test_a_daemonset_without_pods_is_told() -> None:
    """Pod security refuses agents silently; the one sentence that helps is where people look."""
    status = _roll(config("a"), ())
    for condition in status.conditions[:2]:
        assert condition.reason == "NoAgents"
        assert "pod-security.kubernetes.io/enforce=privileged" in condition.message


def test_a_secrets_problem_is_told_in_three_conditions() -> None:
    """Nobody has to guess why it is not Ready."""
    problem = CredentialFacts(problem=Failure("SecretNotFound", "Create it."))
    status = _roll(config("a", backend=S3), (agent("one"),), credentials=problem)
    said = _says(status)
    assert said["Ready"] == said["CredentialsValid"] == "False SecretNotFound"
    assert said["Degraded"] == "True SecretNotFound"


@pytest.mark.parametrize(
    ("states", "suspended", "warm", "percent"),
    [
        ([(2, 2), (2, 2)], False, "True AllBlobsCached", 100),
        ([(2, 2), (1, 2)], False, "False Prefetching", 75),
        ([(2, 2), None], False, "False Prefetching", 50),
        ([(0, 2), (0, 2)], True, "False Suspended", 0),
        ([(2, 2), "PrefetchExceedsCapacity"], False, "False PrefetchExceedsCapacity", 50),
    ],
)
def test_warm_waits_for_every_available_node(
    states: list[Any], suspended: bool, warm: str, percent: int
) -> None:
    """The percentage is floored and is 100 only when everything is there."""
    one = config(
        "a",
        suspend=suspended,
        prefetch={"blobs": [{"id": "x", "size": 10}, {"id": "y", "size": 10}]},
    )
    digest = _digest(one)
    agents = []
    for index, state in enumerate(states):
        progress = None
        if isinstance(state, tuple):
            progress = prefetch(*state)
        elif isinstance(state, str):
            progress = prefetch(0, 2, problem=state)
        agents.append(agent(f"node-{index}", figures(one, digest, prefetch=progress)))
    status = _roll(one, tuple(agents))
    assert _says(status)["Warm"] == warm
    assert status.prefetch is not None
    assert status.prefetch.percent == percent


def test_almost_everything_is_not_a_hundred_percent() -> None:
    """One byte short of a large list stays at 99."""
    one = config("a", prefetch={"blobs": [{"id": "x"}]})
    progress = prefetch(0, 1, size=10**12).model_copy(update={"bytes_ready": 10**12 - 1})
    status = _roll(one, (agent("one", figures(one, _digest(one), prefetch=progress)),))
    assert status.prefetch is not None
    assert status.prefetch.percent == 99


def test_usage_counts_dead_nodes_as_last_seen() -> None:
    """A node that is away still has its bytes."""
    one = config("a", cache={"capacity": "10Gi"})
    alive = agent("alive", figures(one, _digest(one), bytes=3 * GIB, blobs=3))
    dead = replace(agent("dead", figures(one, _digest(one), bytes=2 * GIB, blobs=1)), failure=DEAD)
    status = _roll(one, (alive, dead))
    assert status.usage is not None
    assert (status.usage.bytes, status.usage.blobs) == (5 * GIB, 4)
    assert status.usage.capacity_bytes == 20 * GIB
    assert status.usage.cached == "5Gi"


def test_transition_times_move_only_with_the_status() -> None:
    """A new reason or message keeps the time; a new status takes the present one."""
    one = config("a")
    first = _roll(one, (agent("one", figures(one, _digest(one))),))
    earlier = tuple(
        condition.model_copy(update={"last_transition_time": START})
        for condition in first.conditions
    )
    one = replace(one, status=first.model_copy(update={"conditions": earlier}))
    again = _roll(one, (agent("one", figures(one, _digest(one))),))
    assert {item.last_transition_time for item in again.conditions} == {START}
    broken = _roll(one, (replace(agent("one"), failure=DEAD),))
    times = {item.type: item.last_transition_time for item in broken.conditions}
    assert times["Ready"] == times["Degraded"] == NOW
    assert times["Warm"] == START


def test_failures_are_a_bounded_sample() -> None:
    """A thousand dead nodes are ten lines and a number."""
    one = config("a")
    agents = tuple(replace(agent(f"node-{index:04}"), failure=DEAD) for index in range(1000))
    status = _roll(one, agents)
    assert status.nodes is not None
    assert status.nodes.failed == 1000
    assert len(status.nodes.failures) == 10
    assert len(status.model_dump_json()) < 16 * 1024
    assert "1000 of 1000 nodes" in status.conditions[0].message


def test_evictions_nobody_here_decided_are_the_nodes_own() -> None:
    """The agents' own evictions are counted apart from the operator's."""
    one = config("a")
    totals = Totals(START, (0, 0, 0, 0, 0, 7, 700))
    facts = snapshot(one, agents=(agent("one"),))
    verdict = plan(facts).verdicts[one.uid]
    news = EvictionNews(reasons={"Capacity": 4, "TTLExpired": 1})
    status = roll_up(one, verdict, facts.agents, totals, news, now=NOW)
    assert status.eviction is not None
    assert status.eviction.reasons == {"Capacity": 4, "NodeLimits": 2, "TTLExpired": 1}
    assert status.eviction.evicted_blobs == 7
    assert status.eviction.last_time == NOW


def test_no_message_is_empty_and_none_exceeds_its_bound() -> None:
    """Every condition says something."""
    one = config("a")
    failure = Failure("OriginRefused", "x" * 1024)
    broken = agent("one", figures(one, state=ConfigState.FAILED, failure=failure))
    for status in (_roll(one, ()), _roll(one, (broken,))):
        assert all(0 < len(item.message) <= 1024 for item in status.conditions)
        assert {item.status for item in status.conditions} <= set(ConditionStatus)
