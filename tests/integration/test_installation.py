"""Operator and three agents as processes over a real API server and real origins."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from tests.harness.controlplane import ControlPlane
from tests.harness.installation import AUDIENCE, Installation, as_list
from tests.harness.origins import WORTHLESS, RegistryServer, S3Credentials, S3Server
from tests.harness.process import poll_until

MIB = 1024 * 1024
NODES = ("node-1", "node-2", "node-3")
IDLE_SECONDS = float(os.environ.get("BLOBCACHE_TEST_IDLE_SECONDS", "20"))
pytestmark = [
    pytest.mark.xdist_group("installation"),
    pytest.mark.timeout(300 + int(IDLE_SECONDS)),
]
REST_SECONDS = 5.0
REST_SECONDS_MAX = 60.0
WRITES_PER_SECOND_MAX = 5.0
_WRITE = re.compile(
    r'apiserver_request_total\{[^}]*,resource="(?P<resource>[^"]*)"[^}]*'
    r'verb="(?:POST|PUT|PATCH|APPLY|DELETE)"[^}]*\} (?P<count>\S+)'
)


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    """One of its own: these tests kill operators and restart the API server."""
    with ControlPlane() as control_plane:
        arguments = ("--allow-origin-cidr=127.0.0.0/8", "--min-free=256Mi")
        with Installation(control_plane, NODES, agent_arguments=arguments) as made:
            yield made


@dataclass
class Tenant:
    """A namespace with three configurations and what their origins hold."""

    installation: Installation
    namespace: str
    token: str
    blobs: dict[str, bytes]
    """Bytes by path below `/v1/blobs/`."""

    def read_all(self, node: str) -> list[str]:
        """Read every blob through a node's agent, compare the bytes, return cache statuses."""
        statuses = []
        for path, data in self.blobs.items():
            answer = self.installation.agents[node].read(path, token=self.token)
            assert answer.status == 200, (path, answer.body[:300])
            assert hashlib.sha256(answer.body).digest() == hashlib.sha256(data).digest(), path
            statuses.append(answer.cache_status)
        return statuses

    def read_everywhere(self) -> list[str]:
        """Read every blob through every agent."""
        with ThreadPoolExecutor(len(NODES)) as pool:
            return [status for found in pool.map(self.read_all, NODES) for status in found]

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        """Merge-patch a configuration's spec."""
        self.installation.control_plane.kubectl(
            "patch", "bcc", name, "-n", self.namespace, "--type=merge",
            "-p", json.dumps({"spec": spec}),
        )  # fmt: skip


@pytest.fixture
def tenant(
    installation: Installation,
    s3_server: S3Server,
    registry_server: RegistryServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tenant:
    """A fresh namespace whose three configurations are Ready."""
    namespace = f"t{random.SystemRandom().randrange(10**9)}"
    source = random.Random(namespace)
    token = make_namespace(installation, namespace)
    s3_server.create_bucket(namespace)
    key = s3_server.create_reader(namespace, [namespace])
    shard, layer = source.randbytes(3 * MIB + 17), source.randbytes(2 * MIB)
    s3_server.put_object(namespace, "pre/shard", shard)
    digest = registry_server.push_blob(f"{namespace}/app", layer)
    http = source.randbytes(MIB)
    s3_server.client().put_object(Bucket=namespace, Key="public", Body=http)
    objects = [
        secret(namespace, "key", key),
        config(namespace, "models", s3_backend(s3_server, namespace, "key", prefix="pre/")),
        config(namespace, "layers", registry_backend(registry_server, f"{namespace}/app")),
        config(namespace, "again", s3_backend(s3_server, namespace, "key")),
    ]
    apply(installation, objects)
    for name in ("models", "layers", "again"):
        wait_for_all_nodes(installation, namespace, name)
    blobs = {
        f"{namespace}/models/shard": shard,
        f"{namespace}/layers/{digest}": layer,
        f"{namespace}/again/public": http,
    }
    return Tenant(installation, namespace, token, blobs)


def wait_for_all_nodes(installation: Installation, namespace: str, name: str) -> None:
    """Wait until every node runs it: Ready speaks of those that are available only."""
    installation.wait_for_condition(namespace, name, "Ready")

    def is_everywhere() -> bool:
        nodes = installation.get("bcc", name, namespace)["status"]["nodes"]
        return bool(nodes["ready"] == len(NODES))

    assert poll_until(is_everywhere, timeout=60)


def make_namespace(installation: Installation, namespace: str) -> str:
    """Make a namespace with its service account (no controller does) and a reader's token."""
    kubectl = installation.control_plane.kubectl
    kubectl("create", "namespace", namespace)
    kubectl("create", "serviceaccount", "reader", "-n", namespace)
    return installation.control_plane.create_token(namespace, "reader", audience=AUDIENCE)


def apply(installation: Installation, objects: list[dict[str, Any]]) -> None:
    """Apply objects as a user would."""
    installation.control_plane.kubectl("apply", "-f", "-", input=json.dumps(as_list(objects)))


def secret(
    namespace: str, name: str, key: S3Credentials, *, labelled: bool = True
) -> dict[str, Any]:
    """Return a Secret with an access key."""
    labels = {"blobcache.dev/credentials": "true"} if labelled else {}
    values = {"accessKeyID": key.access_key_id, "secretAccessKey": key.secret_access_key}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "data": {k: base64.b64encode(v.encode()).decode() for k, v in values.items()},
    }


def config(namespace: str, name: str, backend: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """Return a BlobCacheConfig."""
    return {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheConfig",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"backend": backend, "cache": {"capacity": "64Mi"}, **spec},
    }


def s3_backend(server: S3Server, bucket: str, secret: str, *, prefix: str = "") -> dict[str, Any]:
    """Return an S3 backend with a Secret."""
    section = {"endpoint": server.url, "region": "us-east-1", "bucket": bucket}
    section |= {"addressing": "Path"} | ({"prefix": prefix} if prefix else {})
    return {"type": "S3", "s3": section, "credentialsSecretRef": {"name": secret}}


def registry_backend(server: RegistryServer, repository: str) -> dict[str, Any]:
    """Return a registry backend without credentials."""
    section = {"host": server.host, "repository": repository, "scheme": "http"}
    return {"type": "Registry", "registry": section}


def make_all_hot(tenant: Tenant) -> None:
    """Read everything until every answer is a hit (chunks are recorded within a second)."""
    tenant.read_everywhere()
    assert poll_until(lambda: set(tenant.read_everywhere()) == {"hit"}, timeout=20)


def origin_bytes(*origins: S3Server | RegistryServer) -> int:
    """Return the bytes origins have sent for GETs."""
    return sum(origin.requests.body_bytes(method="GET") for origin in origins)


def running_operator(installation: Installation) -> str:
    """Return the name of an operator that runs."""
    return next(iter(installation.operators))


def converges_after_a_change(tenant: Tenant) -> None:
    """Change a spec; every agent must apply that very generation, and reads go on."""
    tenant.patch("models", {"cache": {"capacity": f"{random.randrange(70, 9000)}Mi"}})
    tenant.installation.wait_for_condition(tenant.namespace, "models", "Ready")
    assert set(tenant.read_everywhere()) == {"hit"}


def test_convergence_after_operator_kill(tenant: Tenant) -> None:
    """kill -9 of the operator loses nothing: its successor takes over and hits went on."""
    make_all_hot(tenant)
    name = running_operator(tenant.installation)
    tenant.installation.operators.pop(name).kill()
    assert set(tenant.read_everywhere()) == {"hit"}
    tenant.installation.start_operator(f"{name}-next")
    converges_after_a_change(tenant)


def test_convergence_after_apiserver_restart(tenant: Tenant) -> None:
    """An API server restart is waited out."""
    make_all_hot(tenant)
    tenant.installation.control_plane.restart_apiserver()
    converges_after_a_change(tenant)


def test_convergence_after_lease_deletion(tenant: Tenant) -> None:
    """A deleted Lease is made again, with a higher epoch that agents accept."""
    make_all_hot(tenant)
    tenant.installation.control_plane.kubectl(
        "delete", "lease", "--all", "-n", tenant.installation.namespace
    )
    converges_after_a_change(tenant)


def test_convergence_after_agent_restart(
    tenant: Tenant, s3_server: S3Server, registry_server: RegistryServer
) -> None:
    """An agent stopped or killed and started again serves what it had recorded by itself."""
    make_all_hot(tenant)
    agent = tenant.installation.agents[NODES[0]]
    # Stopped first: what was read within the last second is recorded by a stop, not by a kill.
    for end in (agent.stop, agent.kill):
        end()
        agent.start()
        assert poll_until(agent.is_ready, timeout=20)
        before = origin_bytes(s3_server, registry_server)
        assert poll_until(lambda: set(tenant.read_all(NODES[0])) == {"hit"}, timeout=20)
        assert origin_bytes(s3_server, registry_server) == before
    converges_after_a_change(tenant)


def test_convergence_with_two_operators(tenant: Tenant) -> None:
    """Of two operators one leads; when it is killed the other takes over."""
    make_all_hot(tenant)
    first = running_operator(tenant.installation)
    tenant.installation.start_operator(f"{first}-standby")
    converges_after_a_change(tenant)
    tenant.installation.operators.pop(first).kill()
    converges_after_a_change(tenant)


def test_worthless_secret_beside_a_hot_cache(tenant: Tenant, s3_server: S3Server) -> None:
    """Two configurations on one bucket share nothing: the one with a worthless key gets 403."""
    make_all_hot(tenant)
    apply(
        tenant.installation,
        [
            secret(tenant.namespace, "worthless", WORTHLESS),
            config(
                tenant.namespace,
                "thief",
                s3_backend(s3_server, tenant.namespace, "worthless", prefix="pre/"),
            ),
        ],
    )
    tenant.installation.wait_for_condition(tenant.namespace, "thief", "Ready")
    for agent in tenant.installation.agents.values():
        answer = agent.read(f"{tenant.namespace}/thief/shard", token=tenant.token)
        assert (answer.status, answer.code) == (403, "OriginDenied")
    assert set(tenant.read_everywhere()) == {"hit"}
    degraded = tenant.installation.wait_for_condition(tenant.namespace, "thief", "Degraded")
    assert "403" in degraded["message"]


def test_secret_problems_and_their_mending(tenant: Tenant, s3_server: S3Server) -> None:
    """A missing, unlabelled or malformed Secret is named with its remedy, and heals."""
    key = s3_server.create_another_key(tenant.namespace)
    backend = s3_backend(s3_server, tenant.namespace, "late", prefix="pre/")
    apply(tenant.installation, [config(tenant.namespace, "late", backend)])
    wait = tenant.installation.wait_for_condition
    wait(tenant.namespace, "late", "CredentialsValid", "False", "SecretNotFound")
    apply(tenant.installation, [secret(tenant.namespace, "late", key, labelled=False)])
    found = wait(tenant.namespace, "late", "CredentialsValid", "False", "SecretNotLabelled")
    command = f"kubectl -n {tenant.namespace} label secret late blobcache.dev/credentials=true"
    assert command in found["message"]
    tenant.installation.control_plane.kubectl(
        "label", "secret", "late", "-n", tenant.namespace, "blobcache.dev/credentials=true"
    )
    wait(tenant.namespace, "late", "CredentialsValid", "True")
    wait(tenant.namespace, "late", "Ready", "True")
    answer = tenant.installation.agents[NODES[0]].read(
        f"{tenant.namespace}/late/shard", token=tenant.token
    )
    assert answer.status == 200


def test_a_dead_agent_delays_nobody(tenant: Tenant) -> None:
    """An agent that is down is counted as failed with a reason; the others apply the change."""
    make_all_hot(tenant)
    agent = tenant.installation.agents[NODES[2]]
    agent.kill()
    try:
        tenant.patch("layers", {"cache": {"capacity": "77Mi"}})

        def others_have_it() -> bool:
            body = tenant.installation.get("bcc", "layers", tenant.namespace)
            nodes = body["status"]["nodes"]
            is_current = body["status"]["observedGeneration"] == body["metadata"]["generation"]
            return bool(is_current and nodes["ready"] == 2 and nodes["failed"] == 1)

        assert poll_until(others_have_it, timeout=60)
        failures = tenant.installation.get("bcc", "layers", tenant.namespace)["status"]["nodes"][
            "failures"
        ]
        assert [failure["node"] for failure in failures] == [NODES[2]]
        assert failures[0]["reason"]
    finally:
        agent.start()
    wait_for_all_nodes(tenant.installation, tenant.namespace, "layers")


def test_deletion_reaches_every_agent(tenant: Tenant) -> None:
    """A deleted configuration answers 404 and its bytes are gone."""
    make_all_hot(tenant)
    tenant.installation.control_plane.kubectl("delete", "bcc", "models", "-n", tenant.namespace)
    path = f"{tenant.namespace}/models/shard"
    for agent in tenant.installation.agents.values():
        assert poll_until(
            lambda agent=agent: agent.read(path, token=tenant.token).status == 404,  # type: ignore[misc]
            timeout=30,
        )


def test_status_equals_the_sums_of_the_agents_metrics(tenant: Tenant) -> None:
    """Usage and traffic in the status are the agents' own figures, summed."""
    make_all_hot(tenant)

    def summed(metric: str) -> int:
        name = f'{metric}{{name="models",namespace="{tenant.namespace}"}}'
        return sum(int(a.metrics().get(name, 0)) for a in tenant.installation.agents.values())

    def is_equal() -> bool:
        status = tenant.installation.get("bcc", "models", tenant.namespace)["status"]
        usage, traffic = status.get("usage", {}), status.get("traffic", {})
        return bool(
            usage.get("bytes") == summed("blobcache_agent_config_cached_bytes")
            and traffic.get("hitBytes") == summed("blobcache_agent_config_hit_bytes_total")
            and traffic.get("missBytes") == summed("blobcache_agent_config_miss_bytes_total")
            and traffic.get("originBytes") == summed("blobcache_agent_config_origin_bytes_total")
        )

    # Counters ride along with the next write, so make one that matters.
    tenant.patch("models", {"cache": {"capacity": "99Mi"}})
    assert poll_until(is_equal, timeout=60)


def api_writes(control_plane: ControlPlane) -> dict[str, float]:
    """Return how many writes the API server has served, by resource, Leases left out."""
    text = control_plane.kubectl("get", "--raw", "/metrics").stdout
    counts: dict[str, float] = {}
    for found in _WRITE.finditer(text):
        if found["resource"] not in ("leases", "tokenreviews", "subjectaccessreviews"):
            counts[found["resource"]] = counts.get(found["resource"], 0) + float(found["count"])
    return counts


def test_an_idle_system_writes_nothing_but_its_lease(tenant: Tenant) -> None:
    """Nothing is written while nothing happens, traffic of hits included."""
    make_all_hot(tenant)
    control_plane = tenant.installation.control_plane
    # What came before (this tenant's first reads, other tests) has to come to rest first.
    deadline = time.monotonic() + REST_SECONDS_MAX
    before, after = api_writes(control_plane), {"": -1.0}
    while before != after and time.monotonic() < deadline:
        time.sleep(REST_SECONDS)
        before, after = after, api_writes(control_plane)
    assert before == after, "the system does not come to rest"
    time.sleep(IDLE_SECONDS)
    assert api_writes(control_plane) == after


def test_steady_traffic_stays_within_the_write_budget(tenant: Tenant) -> None:
    """Under steady reads the cluster gets at most five writes a second."""
    make_all_hot(tenant)
    control_plane = tenant.installation.control_plane
    before, began = sum(api_writes(control_plane).values()), time.monotonic()
    while time.monotonic() - began < IDLE_SECONDS:
        tenant.read_everywhere()
    seconds = time.monotonic() - began
    writes = sum(api_writes(control_plane).values()) - before
    assert writes <= WRITES_PER_SECOND_MAX * (seconds + 1)
