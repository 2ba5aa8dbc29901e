"""From facts to what every node should run."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from tests.unit.operator.makers import (
    GIB,
    S3,
    agent,
    config,
    figures,
    names,
    plan,
    prefetch,
    snapshot,
)

from blobcache_api.agent import CredentialsState, ProtocolRange, PushedCredentials
from blobcache_operator.reconcile import Sealer, reconcile
from blobcache_operator.snapshot import CredentialFacts, Failure, Limits

CREDENTIALS = PushedCredentials(access_key_id="id", secret_access_key=SecretStr("secret"))


def test_every_node_with_an_agent_runs_a_config_without_a_selector() -> None:
    """An empty selector is every node."""
    made = plan(snapshot(config("a"), agents=(agent("one"), agent("two"))))
    assert names(made, "one") == names(made, "two") == ["a"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, ("bare", "fast", "fast-gpu")),
        ({"disk": "nvme"}, ("fast", "fast-gpu")),
        ({"disk": "nvme", "gpu": "yes"}, ("fast-gpu",)),
        ({"disk": "hdd"}, ()),
    ],
)
def test_selectors_take_nodes_that_have_all_labels(
    selector: dict[str, str], expected: tuple[str, ...]
) -> None:
    """All labels must match; a node without labels matches only the empty selector."""
    labels = {"fast": {"disk": "nvme"}, "fast-gpu": {"disk": "nvme", "gpu": "yes"}}
    agents = (agent("fast"), agent("fast-gpu"), agent("bare"))
    facts = snapshot(config("a", nodeSelector=selector), agents=agents, labels=labels)
    made = plan(facts)
    assert made.verdicts["uid-demo-a"].selected == expected
    assert {node for node in made.nodes if names(made, node)} == set(expected)


def test_the_oldest_configs_get_a_node_that_is_full() -> None:
    """Beyond the bound of a node the younger are withheld and told so."""
    configs = [config(f"c{age}", age=age, namespace=f"n{age}") for age in range(5)]
    made = plan(snapshot(*configs, agents=(agent("one"),)), configs_per_node=3)
    assert names(made, "one") == ["c4", "c3", "c2"]
    assert made.verdicts["uid-n0-c0"].withheld["one"].reason == "TooManyConfigs"


def test_a_full_node_withholds_only_there() -> None:
    """A config keeps the nodes that have room."""
    old = config("old", age=9, nodeSelector={"zone": "a"})
    young = config("young", age=1)
    facts = snapshot(old, young, agents=(agent("a"), agent("b")), labels={"a": {"zone": "a"}})
    made = plan(facts, configs_per_node=1)
    assert names(made, "a") == ["old"]
    assert names(made, "b") == ["young"]


def test_credentials_change_the_digest_of_their_config_alone() -> None:
    """A Secret's new version is a new digest for what uses it."""
    private, public = config("private", backend=S3), config("public")
    digests = []
    for version in ("uid/1", "uid/2"):
        found = {private.uid: CredentialFacts(CREDENTIALS, version)}
        made = plan(snapshot(private, public, agents=(agent("one"),), credentials=found))
        digests.append({item.name: item.digest for item in made.nodes["one"].configs})
    assert digests[0]["private"] != digests[1]["private"]
    assert digests[0]["public"] == digests[1]["public"]


def test_a_config_without_its_secret_stays_so_that_hits_are_served() -> None:
    """What is cached is still served: the agent keeps the config, its credentials pending."""
    private = config("private", backend=S3)
    problem = CredentialFacts(problem=Failure("SecretNotFound", "Create it."))
    made = plan(snapshot(private, agents=(agent("one"),), credentials={private.uid: problem}))
    (pushed,) = made.nodes["one"].configs
    assert pushed.credentials_state is CredentialsState.PENDING
    assert pushed.credentials is None


@pytest.mark.parametrize(
    ("low", "high", "reason"), [(1, 1, None), (1, 9, None), (2, 3, "AgentTooNew")]
)
def test_agents_of_other_protocols_get_nothing_they_cannot_read(
    low: int, high: int, reason: str | None
) -> None:
    """A range without our version is withheld, with the direction of the remedy."""
    other = agent("one", protocol=ProtocolRange(min=low, max=high))
    found = plan(snapshot(config("a"), agents=(other,))).verdicts["uid-demo-a"].withheld
    assert (found["one"].reason if found else None) == reason


def test_a_missing_feature_withholds_only_what_needs_it() -> None:
    """A config that uses what an old agent lacks waits for the upgrade; others run."""
    features = (("warp", lambda spec: spec.suspend),)
    agents = (agent("old"), agent("new", features=frozenset({"warp"})))
    facts = snapshot(config("needs", suspend=True), config("plain"), agents=agents)
    made = reconcile(facts, Limits(), features=features)
    assert names(made, "old") == ["plain"]
    assert sorted(names(made, "new")) == ["needs", "plain"]
    assert made.verdicts["uid-demo-needs"].withheld["old"].reason == "AgentTooOld"


WARM_SPEC: dict[str, Any] = {"prefetch": {"maxNodes": 2, "blobs": [{"id": "x", "size": 10}]}}


def _full_digest(warm: Any) -> str:
    return plan(snapshot(warm, agents=(agent("z"),))).nodes["z"].configs[0].digest


def test_only_so_many_nodes_warm_at_once() -> None:
    """The first by name begin; the rest run the config without the list and protect its blobs."""
    warm = config("w", **WARM_SPEC)
    made = plan(snapshot(warm, agents=tuple(agent(name) for name in "dcba")))
    assert made.verdicts[warm.uid].waiting == {"c", "d"}
    waiting = made.nodes["d"].configs[0].spec
    assert waiting.prefetch is None
    assert waiting.eviction.pinned == ("x",)


def test_a_turn_passes_when_a_node_is_done() -> None:
    """Done nodes keep the list and give up their place; those at it keep theirs."""
    warm = config("w", **WARM_SPEC)
    digest = _full_digest(warm)
    agents = (
        agent("a", figures(warm, digest, prefetch=prefetch(1, 1))),
        agent("b"),
        agent("c"),
        agent("d", figures(warm, digest, prefetch=prefetch(0, 1))),
    )
    made = plan(snapshot(warm, agents=agents))
    assert made.verdicts[warm.uid].waiting == {"c"}
    assert made.nodes["a"].configs[0].spec.prefetch is not None


@pytest.mark.parametrize("trouble", ["away", "stuck"])
def test_a_node_in_trouble_does_not_hold_up_the_line(trouble: str) -> None:
    """A node that is away, or whose list does not fit, gives its place to the next."""
    warm = config("w", **WARM_SPEC)
    digest = _full_digest(warm)
    stuck = prefetch(0, 1, problem="PrefetchExceedsCapacity")
    agents = [agent(name, figures(warm, digest, prefetch=stuck)) for name in "ab"]
    if trouble == "away":
        failure = Failure("AgentUnreachable", "")
        agents = [replace(agent(name), failure=failure) for name in "ab"]
    made = plan(snapshot(warm, agents=(*agents, agent("c"), agent("d"))))
    assert made.verdicts[warm.uid].waiting == set()


def test_a_new_list_starts_a_new_round() -> None:
    """Nodes that finished an older list are not done with this one."""
    warm = config("w", **WARM_SPEC)
    agents = tuple(agent(name, figures(warm, "0" * 64, prefetch=prefetch(1, 1))) for name in "abc")
    assert plan(snapshot(warm, agents=agents)).verdicts[warm.uid].waiting == {"c"}


def test_tombstones_name_what_is_surely_gone() -> None:
    """Only uids that are confirmed gone and not listed; a listed one is never deleted."""
    kept = config("kept")
    facts = snapshot(kept, agents=(agent("one"),), deleted=frozenset({"gone", kept.uid}))
    assert plan(facts).nodes["one"].tombstones == ("gone",)


def test_what_a_node_has_is_not_deleted_on_one_look() -> None:
    """A uid that only a report knows is no tombstone before it is confirmed."""
    stray = figures(config("stray"))
    assert plan(snapshot(agents=(agent("one", stray),))).nodes["one"].tombstones == ()


def test_a_list_that_protects_too_much_of_a_node_is_withheld_there() -> None:
    """The refusal has both numbers; a bigger node takes it."""
    big = config("big", prefetch={"blobs": [{"id": "x", "size": 60 * GIB}]})
    large_disk = agent("large").report
    assert large_disk is not None
    disk = large_disk.disk.model_copy(update={"total_bytes": 400 * GIB})
    made = plan(snapshot(big, agents=(agent("small"), agent("large", disk=disk))))
    refusal = made.verdicts[big.uid].withheld["small"]
    assert refusal.reason == "CapacityRefused"
    assert "60Gi" in refusal.message
    assert "50Gi" in refusal.message
    assert names(made, "large") == ["big"]


@given(order=st.randoms(use_true_random=False), count=st.integers(0, 12))
def test_the_plan_does_not_depend_on_the_order_of_lists(order: random.Random, count: int) -> None:
    """The same facts in another order give the same plan."""
    configs = [config(f"c{index}", age=index % 3) for index in range(count)]
    agents = [agent(name) for name in "abc"]
    first = plan(snapshot(*configs, agents=tuple(agents)), configs_per_namespace=5)
    order.shuffle(configs)
    order.shuffle(agents)
    second = plan(snapshot(*configs, agents=tuple(agents)), configs_per_namespace=5)
    assert first == second


def test_a_sealer_gives_what_sealing_anew_would() -> None:
    """Its memory shows in no result, whatever changed in between."""
    sealer = Sealer()
    one = config("a")
    for changed in (one, replace(one, generation=2), one):
        facts = snapshot(changed, agents=(agent("one"),))
        assert reconcile(facts, Limits(), sealer) == reconcile(facts, Limits())
