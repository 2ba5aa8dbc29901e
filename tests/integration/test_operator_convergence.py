"""What users do to configs reaches the nodes, and what nodes say reaches the status."""

from __future__ import annotations

import asyncio

import pytest
from tests.integration.operator_stage import (  # noqa: F401 - fixtures
    HTTP_SPEC,
    Stage,
    plane_fixture,
    stage_fixture,
    until,
    until_true,
)
from tests.integration.operator_twin import GIB

from blobcache_api.agent import Candidate, CredentialsState, DiskReport

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(120)]

S3_SPEC = {
    "backend": {
        "type": "S3",
        "s3": {"endpoint": "http://s3.example.com", "bucket": "models"},
        "credentialsSecretRef": {"name": "key"},
    }
}
ACCESS_KEY = {"accessKeyID": "id", "secretAccessKey": "canary-secret"}


async def test_a_config_is_pushed_and_becomes_ready(stage: Stage) -> None:
    """Applying a config makes every agent run it and its status say so."""
    one, two = await stage.add_node("one"), await stage.add_node("two")
    async with stage.running():
        await until_true(lambda: one.states and two.states)
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        status = await stage.status("models")
        assert status["nodes"]["summary"] == "2/2"
        assert {item["type"]: item["status"] for item in status["conditions"]} == {
            "Ready": "True",
            "Degraded": "False",
            "CredentialsValid": "True",
            "Warm": "True",
        }
        assert one.names == two.names == {"models"}
        assert one.state is not None
        assert one.state.issuer == "https://kubernetes.default.svc.cluster.local"
        assert one.state.jwks["keys"]
        config = await stage.get("models")
        assert "finalizers" not in config["metadata"]
        assert "annotations" not in config["metadata"]


async def test_an_edit_reaches_the_agents_with_the_new_generation(stage: Stage) -> None:
    """A changed spec is pushed at once and Ready is of the new generation."""
    twin = await stage.add_node("one")
    async with stage.running():
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        await stage.patch("models", {"suspend": True})
        await until_true(lambda: twin.config("models").spec.suspend)
        ready = await stage.condition("models", "Ready", "True")
        assert ready["observedGeneration"] == 2


async def test_a_selector_takes_nodes_by_label(stage: Stage) -> None:
    """Only nodes with the labels run it; a label that goes takes it away."""
    fast, slow = await stage.add_node("fast", {"disk": "nvme"}), await stage.add_node("slow")
    async with stage.running():
        await stage.apply("models", {"nodeSelector": {"disk": "nvme"}})
        await stage.condition("models", "Ready", "True")
        assert fast.names == {"models"}
        assert slow.names == set()
        await stage.kube.merge_patch("/api/v1/nodes/fast", {"metadata": {"labels": {"disk": None}}})
        await stage.condition("models", "Ready", "False", "NoNodesSelected")
        await until_true(lambda: fast.names == set())
        assert fast.state is not None
        assert fast.state.tombstones == ()


async def test_a_deleted_config_leaves_a_tombstone(stage: Stage) -> None:
    """Deletion takes it from the agents at once and names its uid for its bytes to be deleted."""
    twin = await stage.add_node("one")
    async with stage.running(drop_confirm_seconds=3600):
        made = await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        await stage.delete("models")
        await until_true(lambda: twin.names == set())
        assert twin.state is not None
        await until_true(lambda: made["metadata"]["uid"] in twin.state.tombstones)


async def test_a_deletion_nobody_led_through_is_found_from_the_report(stage: Stage) -> None:
    """What a node still has though no config has that uid goes once two LISTs agree."""
    twin = await stage.add_node("one")
    async with stage.running():
        made = await stage.apply("models")
        await stage.condition("models", "Ready", "True")
    await stage.delete("models")
    async with stage.running():
        await until_true(lambda: twin.names == set())
        uid = made["metadata"]["uid"]
        await until_true(lambda: twin.state is not None and uid in twin.state.tombstones)


async def test_secrets_are_judged_told_and_healed(stage: Stage) -> None:
    """Missing, unlabelled and malformed Secrets each say how to mend them; mending suffices."""
    twin = await stage.add_node("one")
    secret = f"/api/v1/namespaces/{stage.tenant}/secrets/key"
    async with stage.running():
        await stage.apply("open")
        await stage.apply("private", S3_SPEC)
        missing = await stage.condition("private", "CredentialsValid", "False", "SecretNotFound")
        assert f"kubectl -n {stage.tenant} create secret" in missing["message"]
        await stage.condition("private", "Ready", "False", "SecretNotFound")
        await stage.condition("open", "Ready", "True")
        assert twin.config("private").credentials_state is CredentialsState.PENDING

        await stage.create_secret("key", ACCESS_KEY, labelled=False)
        unlabelled = await stage.condition(
            "private", "CredentialsValid", "False", "SecretNotLabelled"
        )
        assert "label secret key blobcache.dev/credentials=true" in unlabelled["message"]
        label = {"metadata": {"labels": {"blobcache.dev/credentials": "true"}}}
        await stage.kube.merge_patch(secret, label)
        await stage.condition("private", "Ready", "True")
        credentials = twin.config("private").credentials
        assert credentials is not None
        assert credentials.secret_access_key is not None
        assert credentials.secret_access_key.get_secret_value() == "canary-secret"

        await stage.kube.merge_patch(secret, {"data": {"secretAccessKey": None}})
        await stage.condition("private", "CredentialsValid", "False")
        assert twin.config("private").credentials is None
        assert "canary" not in str(await stage.get("private"))


async def test_a_rotated_secret_reaches_agents(stage: Stage) -> None:
    """A new value is pushed by itself and changes the digest."""
    twin = await stage.add_node("one")
    async with stage.running():
        await stage.create_secret("key", ACCESS_KEY)
        await stage.apply("private", S3_SPEC)
        await stage.condition("private", "Ready", "True")
        before = twin.config("private").digest
        await stage.kube.merge_patch(
            f"/api/v1/namespaces/{stage.tenant}/secrets/key",
            {"stringData": {"secretAccessKey": "newer"}},
        )
        await until_true(lambda: twin.config("private").digest != before)
        credentials = twin.config("private").credentials
        assert credentials is not None
        assert "newer" in credentials.secret_values()


async def test_a_service_account_token_is_refused(stage: Stage) -> None:
    """A token of the cluster is never sent to an origin, labelled or not."""
    await stage.add_node("one")
    accounts = f"/api/v1/namespaces/{stage.tenant}/serviceaccounts"
    await stage.kube.create(accounts, {"metadata": {"name": "robot"}})
    await stage.kube.create(
        f"/api/v1/namespaces/{stage.tenant}/secrets",
        {
            "metadata": {
                "name": "key",
                "labels": {"blobcache.dev/credentials": "true"},
                "annotations": {"kubernetes.io/service-account.name": "robot"},
            },
            "type": "kubernetes.io/service-account-token",
            "stringData": {"token": "x"},
        },
    )
    async with stage.running():
        await stage.apply("private", S3_SPEC)
        await stage.condition("private", "CredentialsValid", "False", "SecretRefused")


async def test_too_many_configs_of_a_namespace_are_refused(stage: Stage) -> None:
    """The oldest run; the rest say TooManyConfigs, until there is room."""
    twin = await stage.add_node("one")
    async with stage.running(configs_per_namespace_max=2):
        for name in ("a", "b", "c"):
            await stage.apply(name)
            # Creation times have seconds; the order must be theirs, not the names'.
            await asyncio.sleep(1.1)
        refused = await stage.condition("c", "Ready", "False", "TooManyConfigs")
        assert "--configs-per-namespace-max" in refused["message"]
        assert twin.names == {"a", "b"}
        await stage.delete("a")
        await stage.condition("c", "Ready", "True")
        assert twin.names == {"b", "c"}


async def test_capacity_beyond_the_cap_is_refused_with_numbers(stage: Stage) -> None:
    """The refusal names what was asked and what is permitted."""
    await stage.add_node("one")
    async with stage.running(capacity_max="10Gi"):
        await stage.apply("models", {"cache": {"capacity": "20Gi"}})
        refused = await stage.condition("models", "Ready", "False", "CapacityRefused")
        assert "20Gi" in refused["message"]
        assert "10Gi" in refused["message"]


async def test_without_agents_the_remedy_is_told(stage: Stage) -> None:
    """No agent at all is NoAgents, not an endless wait."""
    async with stage.operator():
        await stage.apply("models")
        found = await stage.condition("models", "Ready", "False", "NoAgents")
        assert "DaemonSet" in found["message"]


async def test_status_is_the_sum_over_selected_nodes(stage: Stage) -> None:
    """Usage and traffic are sums, and do not go backwards when an agent starts anew."""
    one, two = await stage.add_node("one"), await stage.add_node("two")
    one.figures["models"] = {
        "bytes": 3 * GIB, "blobs": 3, "requests": 10, "hit_bytes": 900, "miss_bytes": 100,
        "origin_bytes": 150, "origin_errors": 1,
    }  # fmt: skip
    two.figures["models"] = {
        "bytes": 2 * GIB, "blobs": 2, "requests": 5, "hit_bytes": 100, "miss_bytes": 300,
        "origin_bytes": 350,
    }  # fmt: skip
    async with stage.running():
        await stage.apply("models", {"cache": {"capacity": "10Gi"}})

        async def is_summed() -> bool:
            status = await stage.status("models")
            return (status.get("usage") or {}).get("bytes") == 5 * GIB

        await until(is_summed)
        status = await stage.status("models")
        assert status["usage"] == {
            "bytes": 5 * GIB, "blobs": 5, "capacityBytes": 20 * GIB, "cached": "5Gi",
        }  # fmt: skip
        assert status["traffic"] == {
            "since": "2026-01-01T00:00:00Z", "requests": 15, "hitBytes": 1000, "missBytes": 400,
            "originBytes": 500, "originErrors": 1, "hitRatioPercent": 71,
        }  # fmt: skip
        # The agent of `one` starts anew; a byte step makes the counters ride along.
        one.start_time = one.start_time.replace(year=2027)
        one.figures["models"] = {"bytes": GIB, "blobs": 3, "requests": 1, "hit_bytes": 10}
        one.touch()

        async def is_fallen() -> bool:
            return bool((await stage.status("models"))["usage"]["bytes"] == 3 * GIB)

        await until(is_fallen)
        traffic = (await stage.status("models"))["traffic"]
        assert traffic["requests"] == 16
        assert traffic["hitBytes"] == 1010
        assert traffic["since"] == "2026-01-01T00:00:00Z"


async def test_counters_survive_a_new_leader(stage: Stage) -> None:
    """A new leader starts from what its predecessor wrote, not from zero."""
    twin = await stage.add_node("one")
    twin.figures["models"] = {"bytes": GIB, "requests": 100, "hit_bytes": 1000}
    async with stage.running():
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        await until(lambda: _requests_are(stage, 100))
    twin.start_time = twin.start_time.replace(year=2027)
    twin.figures["models"] = {"bytes": 2 * GIB, "requests": 1, "hit_bytes": 10}
    async with stage.running():
        await until(lambda: _bytes_are(stage, 2 * GIB))
        assert (await stage.status("models"))["traffic"]["requests"] >= 100


async def _requests_are(stage: Stage, count: int) -> bool:
    return bool((await stage.status("models"))["traffic"]["requests"] == count)


async def _bytes_are(stage: Stage, count: int) -> bool:
    return bool((await stage.status("models"))["usage"]["bytes"] == count)


async def test_warming_goes_by_turns_and_can_be_waited_for(stage: Stage) -> None:
    """At most maxNodes nodes have the list while none is done; Warm is True when all are."""
    twins = [await stage.add_node(name) for name in ("a", "b", "c")]
    for twin in twins:
        twin.warms = False
    async with stage.running():
        await stage.apply(
            "models", {"prefetch": {"maxNodes": 1, "blobs": [{"id": "x", "size": 5}]}}
        )
        await stage.condition("models", "Ready", "True")
        await stage.condition("models", "Warm", "False", "Prefetching")
        having = [twin.node for twin in twins if twin.config("models").spec.prefetch]
        assert having == ["a"]
        waiting = twins[1].config("models").spec
        assert waiting.eviction.pinned == ("x",)
        assert (await stage.status("models"))["prefetch"]["percent"] == 0
        for twin in twins:
            twin.warms = True
            twin.touch()
        await stage.condition("models", "Warm", "True")
        status = await stage.status("models")
        assert status["prefetch"] == {
            "blobs": 3, "blobsReady": 3, "bytes": 15, "bytesReady": 15, "percent": 100,
        }  # fmt: skip


async def test_node_objects_follow_nodes(stage: Stage) -> None:
    """A BlobCacheNode is owned by its Node, tells its configs, and goes with it."""
    await stage.add_node("one")
    stage.add_twin("outside")
    async with stage.running():
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")

        async def is_told() -> bool:
            found = await stage.node_object("one")
            return bool(found and (found.get("status") or {}).get("configs"))

        await until(is_told)
        node = await stage.kube.get("/api/v1/nodes/one")
        found = await stage.node_object("one")
        assert found is not None
        assert found["metadata"]["ownerReferences"] == [
            {"apiVersion": "v1", "kind": "Node", "name": "one", "uid": node["metadata"]["uid"]}
        ]
        config = found["status"]["configs"][0]
        assert (config["namespace"], config["name"]) == (stage.tenant, "models")
        assert config["state"] == "Applied"
        assert config["appliedDigest"]
        by_hand = await stage.node_object("outside")
        assert by_hand is not None
        assert "ownerReferences" not in by_hand["metadata"]
    await stage.kube.delete("/api/v1/nodes/one")
    del stage.twins["one"]
    async with stage.running():

        async def is_gone() -> bool:
            return await stage.node_object("one") is None

        await until(is_gone)


async def test_above_the_high_watermark_the_coldest_go(stage: Stage) -> None:
    """A plan down to the low watermark is carried out, told in status and by one Event."""
    twin = await stage.add_node("one")
    async with stage.running():
        made = await stage.apply("models", {"cache": {"capacity": "10Gi"}})
        await stage.condition("models", "Ready", "True")
        uid = made["metadata"]["uid"]
        twin.candidates = tuple(
            Candidate(
                config_uid=uid, blob_id=f"blob-{number}", blob_version="v", bytes=GIB,
                last_read_time=1000.0 + number, pinned=number == 0,
            )
            for number in range(10)
        )  # fmt: skip
        twin.figures["models"] = {"bytes": 10 * GIB, "blobs": 10}
        twin.touch()
        await until_true(lambda: twin.evictions)
        victims = [victim.blob_id for victim in twin.evictions[0].victims]
        assert victims == ["blob-1", "blob-2"]
        assert all(victim.last_read_before < 1010 for victim in twin.evictions[0].victims)

        async def is_told() -> bool:
            return bool((await stage.status("models"))["eviction"]["plan"])

        await until(is_told)
        eviction = (await stage.status("models"))["eviction"]
        assert eviction["plan"][0] == {
            "node": "one", "blob": "blob-1", "bytes": GIB, "reason": "Capacity",
        }  # fmt: skip
        assert eviction["reasons"]["Capacity"] == 2
        events_path = f"/apis/events.k8s.io/v1/namespaces/{stage.tenant}/events"

        async def find_events() -> list[str]:
            found = await stage.kube.list_all(events_path)
            return [event["note"] for event in found if event["reason"] == "BlobsEvicted"]

        await until(find_events)
        assert len(await find_events()) == 1


async def test_a_full_node_gives_up_orphans_first(stage: Stage) -> None:
    """Above the node's own high watermark orphans go before anything of a config."""
    twin = await stage.add_node("one")
    async with stage.running():
        made = await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        twin.disk = DiskReport(
            total_bytes=20 * GIB, available_bytes=10 * GIB, used_bytes=9 * GIB + 1,
            capacity_bytes=10 * GIB, min_free_bytes=GIB,
        )  # fmt: skip
        twin.candidates = (
            Candidate(
                config_uid=made["metadata"]["uid"], blob_id="own", blob_version="v",
                bytes=2 * GIB, last_read_time=1.0,
            ),
            Candidate(
                config_uid="gone", blob_id="orphan", blob_version="v",
                bytes=2 * GIB, last_read_time=1000.0, orphan=True,
            ),
        )  # fmt: skip
        twin.touch()
        await until_true(lambda: twin.evictions)
        assert [victim.blob_id for victim in twin.evictions[0].victims] == ["orphan"]


async def test_an_invalid_change_is_told_without_a_push(stage: Stage) -> None:
    """What the agent refuses appears by node, with its own words."""
    twin = await stage.add_node("one")
    twin.refusals["models"] = ("InsecureTLSRefused", "must not skip verification here")
    async with stage.running():
        await stage.apply("models", HTTP_SPEC)
        found = await stage.condition("models", "Ready", "False", "InsecureTLSRefused")
        assert "must not skip verification here" in found["message"]
        status = await stage.status("models")
        assert status["nodes"]["failures"] == [
            {
                "node": "one", "reason": "InsecureTLSRefused",
                "message": "must not skip verification here",
            }
        ]  # fmt: skip
