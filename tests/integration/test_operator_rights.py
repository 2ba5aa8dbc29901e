"""The rights that the chart gives the operator are enough, and what is missing is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.harness.binaries import locate
from tests.integration.operator_stage import (  # noqa: F401 - fixtures
    Stage,
    plane_fixture,
    stage_fixture,
    until_true,
)
from tests.integration.test_operator_convergence import ACCESS_KEY, S3_SPEC

from blobcache_operator.kubeauth import from_kubeconfig

pytestmark = [pytest.mark.control_plane, pytest.mark.helm, pytest.mark.timeout(120)]

CHART = Path(__file__).resolve().parents[2] / "charts" / "blobcache"
KINDS = {
    "ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding",
}  # fmt: skip


def _rendered(namespace: str, secret_namespace: str | None) -> str:
    values = [f"--set=secretNamespaces={{{secret_namespace}}}"] if secret_namespace else []
    done = subprocess.run(
        [locate("helm"), "template", "blobcache", str(CHART), f"--namespace={namespace}", *values],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    objects = [item for item in yaml.safe_load_all(done.stdout) if item]
    rights = [item for item in objects if item["kind"] in KINDS]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": rights})


@pytest.mark.parametrize("may_read_secrets", [True, False])
async def test_the_charts_rights_suffice(stage: Stage, may_read_secrets: bool) -> None:
    """A config becomes Ready; a Secret of a namespace not named is SecretForbidden."""
    rights = await asyncio.to_thread(
        _rendered, stage.system, stage.tenant if may_read_secrets else None
    )
    await asyncio.to_thread(stage.plane.kubectl, "apply", "-f", "-", input=rights)
    kubeconfig = await asyncio.to_thread(
        stage.plane.kubeconfig_for_service_account, stage.system, "blobcache-operator"
    )
    stage.operator_access = await asyncio.to_thread(from_kubeconfig, str(kubeconfig))
    twin = await stage.add_node("one")
    await stage.create_secret("key", ACCESS_KEY)
    async with stage.running():
        await stage.apply("open")
        await stage.apply("private", S3_SPEC)
        await stage.condition("open", "Ready", "True")
        await until_true(lambda: twin.states)
        if may_read_secrets:
            await stage.condition("private", "Ready", "True")
        else:
            found = await stage.condition("private", "Ready", "False", "SecretForbidden")
            assert "secretNamespaces" in found["message"]
            assert "kubectl" in found["message"]
        node = await stage.node_object("one")
        assert node is not None
