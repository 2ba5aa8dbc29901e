"""One long scenario on a real cluster: each part starts from what the one before left."""

import base64
import hashlib
import os
import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e import installation
from tests.e2e.images import Images
from tests.e2e.installation import NAMESPACE, TENANT, read
from tests.e2e.local import LocalCluster
from tests.harness.origins import S3Credentials, S3Server
from tests.harness.process import poll_until

pytestmark = pytest.mark.timeout(900)

BLOB = os.urandom(8 << 20)
DIGEST = hashlib.sha256(BLOB).hexdigest()


@pytest.fixture(scope="module")
def s3(cluster: LocalCluster) -> Iterator[S3Server]:
    """An S3 server that pods reach, with one bucket and one blob."""
    with S3Server(listen=cluster.origin_address) as server:
        server.create_bucket("models")
        server.put_object("models", "shard-0", BLOB)
        yield server


def test_scenario(cluster: LocalCluster, built: Images, s3: S3Server) -> None:
    """Install, read, then lose the operator, both containerds and an agent."""
    began = installation.install(cluster, built)
    installation.wait_ready(cluster)
    _apply_config(cluster, s3.create_reader("tenant", ["models"]), s3.url)
    pods = {node: installation.run_reader(cluster, built, node) for node in cluster.nodes}
    _first_cached_read(cluster, pods["node-1"], began)
    _hits_survive(cluster, pods, s3)


def _apply_config(cluster: LocalCluster, credentials: S3Credentials, endpoint: str) -> None:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "s3",
            "namespace": TENANT,
            "labels": {"blobcache.dev/credentials": "true"},
        },
        "data": {
            "accessKeyID": _encoded(credentials.access_key_id),
            "secretAccessKey": _encoded(credentials.secret_access_key),
        },
    }
    config = {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheConfig",
        "metadata": {"name": "models", "namespace": TENANT},
        "spec": {
            "backend": {
                "type": "S3",
                "s3": {"endpoint": endpoint, "region": "us-east-1", "bucket": "models"},
                "credentialsSecretRef": {"name": "s3"},
            },
            "cache": {"type": "FileCache", "capacity": "256Mi"},
        },
    }
    config["spec"]["backend"]["s3"]["addressing"] = "Path"  # type: ignore[index]
    installation.apply(cluster, secret, config)
    wait = ["wait", "--for=condition=Ready", "bcc/models", "--timeout=120s"]
    cluster.kubectl("-n", TENANT, *wait, timeout=150)


def _first_cached_read(cluster: LocalCluster, pod: str, began: float) -> None:
    assert read(cluster, pod, "models/shard-0")[0] == DIGEST
    assert poll_until(lambda: read(cluster, pod, "models/shard-0")[1].endswith("hit"), timeout=60)
    took = time.monotonic() - began
    print(f"helm install to first cached read: {took:.1f} s", file=sys.__stderr__)


def _hits_survive(cluster: LocalCluster, pods: dict[str, str], s3: S3Server) -> None:
    """Kill the operator, restart containerd, then a node's agent: every read is right."""
    for pod in pods.values():
        assert read(cluster, pod, "models/shard-0")[0] == DIGEST
    asked = s3.requests.count(path_prefix="/models/")
    cluster.kubectl(
        *("-n", NAMESPACE, "delete", "pod", "--force", "--grace-period=0", "--wait=false"),
        *("-l", "app.kubernetes.io/component=operator"),
    )
    for pod in pods.values():
        assert read(cluster, pod, "models/shard-0") == (DIGEST, "blobcache; hit")
    for node in cluster.nodes.values():
        node.containerd.stop_containerd()
        node.containerd.start_containerd()
    for pod in pods.values():
        assert poll_until(lambda pod=pod: _can_exec(cluster, pod), timeout=60)  # type: ignore[misc]
        assert read(cluster, pod, "models/shard-0") == (DIGEST, "blobcache; hit")
    _kill_agent(cluster, "node-1")
    assert poll_until(lambda: _reads_right(cluster, pods["node-1"]), timeout=10)
    installation.wait_ready(cluster)
    assert read(cluster, pods["node-1"], "models/shard-0") == (DIGEST, "blobcache; hit")
    assert s3.requests.count(path_prefix="/models/") == asked, "a restart forgot what was cached"


def _kill_agent(cluster: LocalCluster, node: str) -> None:
    cluster.kubectl(
        *("-n", NAMESPACE, "delete", "pod", "--force", "--grace-period=0", "--wait=false"),
        *("-l", "app.kubernetes.io/component=agent", f"--field-selector=spec.nodeName={node}"),
    )


def _can_exec(cluster: LocalCluster, pod: str) -> bool:
    done = cluster.control_plane.kubectl("-n", TENANT, "exec", pod, "--", "true", check=False)
    return done.returncode == 0


def _reads_right(cluster: LocalCluster, pod: str) -> bool:
    """Say whether a read succeeds now: right bytes, or an error, never others."""
    try:
        digest, _ = read(cluster, pod, "models/shard-0")
    except Exception:
        return False
    assert digest == DIGEST
    return True


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
