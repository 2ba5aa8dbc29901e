"""The end of an uninstallation on a real API server, with exactly the rights the chart gives it."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.harness.binaries import locate
from tests.harness.controlplane import ControlPlane

from blobcache_operator.__main__ import main

CHART = Path(__file__).resolve().parents[2] / "charts" / "blobcache"
CRDS = CHART / "crds"
pytestmark = [pytest.mark.control_plane, pytest.mark.helm]
RIGHTS = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


class Scene:
    """A namespace after `helm uninstall`, in which the hook's objects were made."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.namespace = f"cleanup-{secrets.token_hex(4)}"
        plane.kubectl("apply", "--server-side", "-f", str(CRDS))
        plane.kubectl("create", "namespace", self.namespace)
        rendered = subprocess.run(
            [
                locate("helm"), "template", "b", str(CHART), "-n", self.namespace,
                "--set=cleanup.cache=true", "--kube-version=1.34.3",
            ],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        bodies = [body for body in yaml.safe_load_all(rendered) if body]
        self.hooks = [
            body
            for body in bodies
            if (body["metadata"].get("annotations") or {}).get("helm.sh/hook") == "post-delete"
        ]
        self.apply(*(body for body in self.hooks if body["kind"] in RIGHTS))

    def apply(self, *bodies: dict[str, Any]) -> None:
        """Make objects."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(bodies)}
        self.plane.kubectl("apply", "-n", self.namespace, "-f", "-", input=json.dumps(items))

    def clean_up(self, *flags: str) -> Result:
        """Run the hook's command as its account."""
        access = self.plane.kubeconfig_for_service_account(self.namespace, "blobcache-cleanup")
        common = ["--namespace", self.namespace, "--kubeconfig", str(access)]
        return CliRunner().invoke(main, [*common, "cleanup", *flags])

    def names(self, kind: str) -> str:
        """Return what there is of a kind."""
        flags = ["-o", "name", "-n", self.namespace]
        return self.plane.kubectl("get", kind, *flags).stdout

    def start_daemonset(self, desired: int, ready: int) -> None:
        """Make the DaemonSet as its controller would have it by now."""
        (daemonset,) = (body for body in self.hooks if body["kind"] == "DaemonSet")
        self.apply(daemonset)
        status = {
            "observedGeneration": 1,
            "desiredNumberScheduled": desired,
            "currentNumberScheduled": desired,
            "numberMisscheduled": 0,
            "numberReady": ready,
        }
        self.plane.kubectl(
            "patch", "daemonset", "blobcache-cleanup", "-n", self.namespace,
            "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}),
        )  # fmt: skip


@pytest.fixture(name="scene")
def scene_fixture(control_plane: ControlPlane) -> Iterator[Scene]:
    """A fresh one; what of it is the whole cluster's goes again, as Helm would see to it."""
    yield Scene(control_plane)
    kinds = "clusterrole,clusterrolebinding"
    control_plane.kubectl("delete", kinds, "blobcache-cleanup", "--ignore-not-found")


def test_what_the_operator_made_goes(scene: Scene) -> None:
    """Lease, certificates and node objects; nobody else's Secret, and no config."""
    meta = {"apiVersion": "v1", "kind": "Secret"}
    for name in ("blobcache-ca", "blobcache-operator-tls", "blobcache-agent-tls", "mine"):
        scene.apply({**meta, "metadata": {"name": name}})
    scene.apply(
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "blobcache-operator"},
        },
        {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheNode",
            "metadata": {"name": "n"},
        },
        {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheConfig",
            "metadata": {"name": "kept"},
            "spec": {
                "backend": {"type": "HTTPProxy", "httpProxy": {"address": "http://a.example"}}
            },
        },
    )
    done = scene.clean_up()
    assert done.exit_code == 0, done.output
    assert "deleted blobcache-ca" in done.output
    assert scene.names("secrets").split() == ["secret/mine"]
    assert not scene.names("leases")
    assert not scene.names("blobcachenodes")
    assert "kept" in scene.names("blobcacheconfigs")
    assert scene.clean_up().exit_code == 0


def test_every_node_done_is_success(scene: Scene) -> None:
    """The count of nodes is told."""
    scene.start_daemonset(3, 3)
    done = scene.clean_up("--daemonset", "blobcache-cleanup", "--timeout-seconds", "20")
    assert done.exit_code == 0, done.output
    assert "3 nodes are as they were" in done.output


def test_nodes_that_are_not_reached_are_named(scene: Scene) -> None:
    """The wait ends, the exit code is its own, and node and reason are said."""
    scene.start_daemonset(2, 0)
    (daemonset,) = (body for body in scene.hooks if body["kind"] == "DaemonSet")
    template = daemonset["spec"]["template"]
    template["spec"].pop("priorityClassName")
    spec = {**template["spec"], "nodeName": "node-7", "serviceAccountName": "blobcache-cleanup"}
    metadata = {"name": "cleanup-x", "labels": template["metadata"]["labels"]}
    scene.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    status = {
        "initContainerStatuses": [
            {
                "name": "cache", "image": "i", "imageID": "", "ready": False, "restartCount": 0,
                "state": {"waiting": waiting},
            }
        ]
    }  # fmt: skip
    scene.plane.kubectl(
        "patch", "pod", "cleanup-x", "-n", scene.namespace,
        "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}),
    )  # fmt: skip
    done = scene.clean_up("--daemonset", "blobcache-cleanup", "--timeout-seconds", "2")
    assert done.exit_code == 3, done.output
    assert "node 'node-7': 'cache' waits: ImagePullBackOff no such image" in done.output
    assert "1 nodes have no pod yet" in done.output


def test_the_hook_may_do_that_and_nothing_else(scene: Scene) -> None:
    """Verb by verb: no list of Secrets, no creation, no other names."""
    own = ["-n", scene.namespace]
    may = {
        ("delete", "secrets/blobcache-ca", *own): True,
        ("delete", "leases/blobcache-operator", *own): True,
        ("list", "pods", *own): True,
        ("delete", "pods/blobcache-test", *own): True,
        ("get", "daemonsets/blobcache-cleanup", *own): True,
        ("deletecollection", "blobcachenodes", "-A"): True,
        ("delete", "secrets/mine", *own): False,
        ("get", "secrets/blobcache-ca", *own): False,
        ("list", "secrets", *own): False,
        ("create", "daemonsets", *own): False,
        ("delete", "daemonsets/blobcache-cleanup", *own): False,
        ("delete", "pods/other", *own): False,
        ("create", "pods", *own): False,
        ("list", "pods", "-n", "default"): False,
        ("get", "blobcacheconfigs", "-A"): False,
        ("deletecollection", "blobcacheconfigs", "-A"): False,
        ("get", "nodes", "-A"): False,
    }
    user = f"--as=system:serviceaccount:{scene.namespace}:blobcache-cleanup"
    for what, expected in may.items():
        answer = scene.plane.kubectl("auth", "can-i", user, *what, check=False)
        assert (answer.stdout.strip() == "yes") is expected, what


def test_hook_objects_go_afterwards(scene: Scene) -> None:
    """Each is deleted by Helm, made anew next time, and made after what it needs."""
    assert {body["kind"] for body in scene.hooks} == RIGHTS | {"DaemonSet", "Job"}
    weights = {}
    for body in scene.hooks:
        annotations = body["metadata"]["annotations"]
        policy = annotations["helm.sh/hook-delete-policy"].split(",")
        assert set(policy) == {"before-hook-creation", "hook-succeeded"}
        weights[body["kind"]] = int(annotations["helm.sh/hook-weight"])
    assert max(weights, key=lambda kind: weights[kind]) == "Job"
