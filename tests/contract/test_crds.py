"""The CRDs on a real API server: every rule accepts and refuses, columns, explanations, status."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.contract.crd_cases import BASE, CASES, UPDATES, Update, apply_patch
from tests.harness.controlplane import ControlPlane

from blobcache_api.v1alpha1.config import from_resource

CRDS = Path(__file__).resolve().parents[2] / "crds"
KINDS = ("blobcacheconfigs", "blobcachenodes")
TIME = "2026-11-24T12:00:00Z"

pytestmark = [pytest.mark.control_plane, pytest.mark.xdist_group("crds")]


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    """A control plane that knows our kinds."""
    control_plane.kubectl("apply", "-f", str(CRDS))
    names = [f"crd/{kind}.blobcache.dev" for kind in KINDS]
    control_plane.kubectl("wait", "--for=condition=Established", *names, "--timeout=30s")
    _wait_until_explained(control_plane)
    return control_plane


def _wait_until_explained(plane: ControlPlane) -> None:
    """The server publishes explanations some time after a kind is established."""
    deadline = time.monotonic() + 60
    while any(plane.kubectl("explain", kind, check=False).returncode for kind in KINDS):
        assert time.monotonic() < deadline, "the API server explains our kinds"
        time.sleep(0.2)


@pytest.fixture
def namespace(plane: ControlPlane) -> str:
    """A namespace of the test's own; nothing here would finish deleting it."""
    name = f"crds-{secrets.token_hex(4)}"
    plane.kubectl("create", "namespace", name)
    return name


def _create_dry(plane: ControlPlane, body: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return plane.kubectl(
        "create", "--dry-run=server", "-f", "-", "-o", "json", input=json.dumps(body), check=False
    )


def test_api_server_judges_every_case(plane: ControlPlane) -> None:
    """Each constraint accepts what it should and refuses the rest with its sentence."""
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda case: _create_dry(plane, case.body()), CASES)
    faults = []
    for case, answer in zip(CASES, answers, strict=True):
        wanted = case.says or case.server
        is_right = answer.returncode == 0 if case.is_accepted else wanted in answer.stderr
        if not is_right or (answer.returncode == 0) != case.is_accepted:
            faults.append(f"{case.name}: wanted '{wanted}', got: {answer.stderr[:400]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.name)
def test_api_server_judges_updates(plane: ControlPlane, namespace: str, update: Update) -> None:
    """Immutable fields may not change, others may."""
    where = {"metadata.namespace": namespace}
    old, new = (apply_patch(BASE, {**patch, **where}) for patch in (update.old, update.new))
    plane.kubectl("create", "-f", "-", input=json.dumps(old))
    answer = plane.kubectl("replace", "-f", "-", input=json.dumps(new), check=False)
    assert (answer.returncode == 0) == (update.says == ""), answer.stderr
    assert update.says in answer.stderr


def test_stored_object_shows_defaults(plane: ControlPlane) -> None:
    """The server fills in the defaults of the models, and the models read the result."""
    stored = json.loads(_create_dry(plane, BASE).stdout)
    assert stored["spec"]["cache"] == {"type": "FileCache", "chunkSize": "64Ki", "validate": True}
    assert stored["spec"]["eviction"] == {
        "policy": "LRU",
        "highWatermarkPercent": 90,
        "lowWatermarkPercent": 80,
    }
    assert stored["spec"]["readers"] == "Namespace"
    assert from_resource(stored).spec == from_resource(BASE).spec


def _condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "observedGeneration": 1,
        "lastTransitionTime": TIME,
    }


def test_config_columns(plane: ControlPlane, namespace: str) -> None:
    """`kubectl get` shows what people look for; status is a resource of its own."""
    body = apply_patch(BASE, {"metadata.namespace": namespace})
    body["status"] = {"observedGeneration": 7}
    plane.kubectl("create", "-f", "-", input=json.dumps(body))
    assert plane.kubectl("get", "bcc", "-n", namespace, "-o", "jsonpath={..status}").stdout == ""
    _patch_status(plane, "bcc/models", _config_status(), namespace=namespace)

    rows = plane.kubectl("get", "bcc", "-n", namespace).stdout.splitlines()
    header, row = (line.split() for line in rows)
    assert " ".join(header) == "NAME BACKEND NODES CACHED HIT % WARM % READY AGE"
    assert row[:-1] == ["models", "S3", "3/5", "50Gi", "87", "100", "True"]
    wide = plane.kubectl("get", "bcc", "-n", namespace, "-o", "wide").stdout
    assert "Applied" in wide
    assert "all 3 nodes applied it" in wide
    category = plane.kubectl("get", "blobcache", "-n", namespace, "-o", "name").stdout
    assert "blobcacheconfig.blobcache.dev/models" in category
    selected = ["--field-selector", "spec.backend.type=OSS"]
    assert plane.kubectl("get", "bcc", "-n", namespace, *selected, "-o", "name").stdout == ""


def _patch_status(
    plane: ControlPlane, name: str, status: dict[str, Any], *, namespace: str = ""
) -> None:
    where = ["-n", namespace] if namespace else []
    patch = json.dumps({"status": status})
    plane.kubectl("patch", name, *where, "--subresource=status", "--type=merge", "-p", patch)


def _config_status() -> dict[str, Any]:
    return {
        "observedGeneration": 1,
        "conditions": [_condition("Ready", "True", "Applied", "all 3 nodes applied it")],
        "nodes": {"selected": 5, "available": 3, "ready": 3, "failed": 0, "summary": "3/5"},
        "usage": {"bytes": 50 * 2**30, "blobs": 7, "cached": "50Gi"},
        "traffic": {
            "since": TIME,
            "requests": 2**63 - 1,
            "hitBytes": 87,
            "missBytes": 13,
            "originBytes": 13,
            "originErrors": 0,
            "hitRatioPercent": 87,
        },
        "prefetch": {"blobs": 1, "blobsReady": 1, "bytes": 1, "bytesReady": 1, "percent": 100},
        "eviction": {"lastTime": TIME, "reasons": {"Watermark": 3}, "plan": []},
    }


def test_node_columns(plane: ControlPlane) -> None:
    """A node's object is cluster-wide and shows agent, bytes and readiness."""
    node = {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheNode",
        "metadata": {"name": "columns.node.test"},
    }
    plane.kubectl("create", "-f", "-", input=json.dumps(node))
    disk = {"totalBytes": 2, "availableBytes": 1, "usedBytes": 1, "minFreeBytes": 1, "cached": "1"}
    conditions = [
        _condition("Ready", "True", "Reporting", "it reports"),
        _condition("DiskPressure", "False", "EnoughSpace", "there is space"),
    ]
    status = {"agentVersion": "0.1.0", "conditions": conditions, "disk": disk}
    _patch_status(plane, "bcn/columns.node.test", status)
    rows = plane.kubectl("get", "bcn").stdout.splitlines()
    assert rows[0].split() == ["NAME", "AGENT", "CACHED", "PRESSURE", "READY", "AGE"]
    assert rows[1].split()[:-1] == ["columns.node.test", "0.1.0", "1", "False", "True"]
    plane.kubectl("delete", "bcn", "columns.node.test")


def test_node_configs_are_bounded(plane: ControlPlane) -> None:
    """256 configs fit into a node's status, one more does not, and none comes twice."""
    node = {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheNode",
        "metadata": {"name": "bounded"},
    }
    plane.kubectl("create", "-f", "-", input=json.dumps(node))
    configs = [
        {"namespace": "a", "name": f"c{index}", "uid": "u", "state": "Applied"}
        for index in range(257)
    ]
    patch = ["patch", "bcn/bounded", "--subresource=status", "--type=merge", "-p"]

    def answer(listed: list[dict[str, str]]) -> subprocess.CompletedProcess[str]:
        return plane.kubectl(*patch, json.dumps({"status": {"configs": listed}}), check=False)

    assert answer(configs[:256]).returncode == 0
    assert "must have at most 256 items" in answer(configs).stderr
    assert "Duplicate value" in answer([configs[0], configs[0]]).stderr
    plane.kubectl("delete", "bcn", "bounded")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("blobcacheconfig", "how the nodes of the cluster cache them"),
        ("blobcacheconfig.spec.backend", "keeps its cached version until evicted"),
        ("blobcacheconfig.spec.cache.capacity", "of each node's disk at most"),
        ("blobcacheconfig.spec.backend.credentialsSecretRef", "exactly one set"),
        (
            "blobcachenode.status.configs.appliedDigest",
            "Digest of the configuration the agent runs",
        ),
    ],
)
def test_kubectl_explains(plane: ControlPlane, path: str, words: str) -> None:
    """`kubectl explain` tells what the models' docstrings tell."""
    told = " ".join(plane.kubectl("explain", path).stdout.split())
    assert words in told
