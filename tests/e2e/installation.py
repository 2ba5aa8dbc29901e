"""The chart installed on a cluster, and pods that read through it."""

import json
import time
from typing import Any

from tests.e2e.images import ROOT, Images
from tests.e2e.local import LocalCluster

NAMESPACE = "blobcache-system"
TENANT = "demo"
WAIT = "--timeout=180s"

_READ = """\
import hashlib, sys, time, urllib.request
token = open("/var/run/blobcache/token").read()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + token})
began = time.monotonic()
with urllib.request.urlopen(request, timeout=30) as answer:
    digest = hashlib.sha256(answer.read()).hexdigest()
    print(digest, answer.headers["Cache-Status"], sep="|")
"""


def install(cluster: LocalCluster, built: Images) -> float:
    """Install as NOTES and README say; return when `helm install` began (monotonic)."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    label = "pod-security.kubernetes.io/enforce=privileged"
    cluster.kubectl("label", "namespace", NAMESPACE, label)
    cluster.kubectl("create", "namespace", TENANT)
    began = time.monotonic()
    chart = str(ROOT / "charts" / "blobcache")
    cluster.helm("install", "blobcache", chart, "-n", NAMESPACE, *values(cluster, built))
    return began


def values(cluster: LocalCluster, built: Images) -> list[str]:
    """Return helm's flags for these images and this cluster's origins."""
    chosen = {
        "agent.image.repository": built.agent.name,
        "agent.image.tag": built.agent.tag,
        "operator.image.repository": built.operator.name,
        "operator.image.tag": built.operator.tag,
        "agent.allowOriginCIDRs": f"{{{cluster.origin_address}/32}}",
        "agent.cache.minFree": "1Gi",
        "secretNamespaces": f"{{{TENANT}}}",
    }
    return [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]


def apply(cluster: LocalCluster, *objects: dict[str, Any]) -> None:
    """Apply objects."""
    for body in objects:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(body))


def wait_ready(cluster: LocalCluster) -> None:
    """Wait until the chart's pods are ready on every node."""
    for what in ("deployment/blobcache-operator", "daemonset/blobcache-agent"):
        cluster.kubectl("-n", NAMESPACE, "rollout", "status", what, WAIT, timeout=200)


def run_reader(cluster: LocalCluster, built: Images, node: str) -> str:
    """Start a pod of the tenant that can read, on a node, and return its name."""
    name = f"reader-{node}"
    token = {"audience": "blobcache.dev", "path": "token", "expirationSeconds": 3600}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": TENANT},
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "reader",
                    "image": built.base.reference,
                    "imagePullPolicy": "Never",
                    "volumeMounts": [{"name": "token", "mountPath": "/var/run/blobcache"}],
                }
            ],
            "volumes": [
                {"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}}
            ],
        },
    }
    apply(cluster, pod)
    cluster.kubectl("-n", TENANT, "wait", "--for=condition=Ready", f"pod/{name}", WAIT, timeout=200)
    return name


def read(cluster: LocalCluster, pod: str, blob: str) -> tuple[str, str]:
    """Let a pod read a blob by the Service's name; return its sha256 and `Cache-Status`."""
    url = f"http://blobcache-agent.{NAMESPACE}:7080/v1/blobs/{TENANT}/{blob}"
    told = cluster.kubectl("-n", TENANT, "exec", pod, "--", "python3", "-c", _READ, url)
    digest, status = told.strip().split("|")
    return digest, status
