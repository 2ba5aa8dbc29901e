"""What keeps a whole operator from its work is told with the command that mends it."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.harness.binaries import locate
from tests.harness.controlplane import ControlPlane
from tests.integration.operator_stage import (  # noqa: F401 - fixtures
    CRDS,
    Stage,
    plane_fixture,
    stage_fixture,
    until,
    until_true,
)

from blobcache_api import REVISION_ANNOTATION
from blobcache_operator import certificates, errors
from blobcache_operator.certificate_store import AGENT_SECRET, CA_SECRET, CertificateStore
from blobcache_operator.installed_schema import find_schema_problem
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import from_kubeconfig
from blobcache_operator.program import Program

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(120)]

NODES_CRD = "blobcachenodes.blobcache.dev"
CONFIGS_CRD = "blobcacheconfigs.blobcache.dev"
COMMAND = "kubectl apply --server-side -f crds/ --force-conflicts"


def _obstacle(program: Program) -> str:
    return program._find_obstacle() or ""


@pytest.fixture(name="annotate")
async def annotate_fixture(
    plane: ControlPlane,
) -> AsyncIterator[Callable[[str, str], Any]]:
    """Set a CRD's revision, as kubectl's user would see it; the true ones return afterwards."""

    async def annotate(crd: str, change: str) -> None:
        key = f"{REVISION_ANNOTATION}{change}"
        await asyncio.to_thread(plane.kubectl, "annotate", "--overwrite", "crd", crd, key)

    yield annotate
    flags = ["--server-side", "--force-conflicts", "-f", str(CRDS)]
    await asyncio.to_thread(plane.kubectl, "apply", *flags)


@pytest.mark.parametrize("crd", [CONFIGS_CRD, NODES_CRD])
@pytest.mark.parametrize("change", ["=0", "-", "=nonsense"])
async def test_an_older_crd_is_refused_until_it_is_upgraded(
    stage: Stage, annotate: Callable[[str, str], Any], crd: str, change: str
) -> None:
    """The operator says the command, leads nobody, and goes on by itself once it was run."""
    await annotate(crd, change)
    async with stage.operator() as program:
        await until_true(lambda: _obstacle(program))
        assert COMMAND in _obstacle(program)
        assert crd in _obstacle(program)
        with pytest.raises(errors.NotFound):
            await stage.lease()
        flags = ["--server-side", "--force-conflicts", "-f", str(CRDS)]
        await asyncio.to_thread(stage.plane.kubectl, "apply", *flags)
        await until_true(lambda: not _obstacle(program))

        async def leads() -> bool:
            try:
                return bool((await stage.lease())["spec"]["holderIdentity"])
            except errors.NotFound:
                return False

        await until(leads)


@pytest.mark.helm
def test_the_command_mends_what_helm_installed(tmp_path: Path) -> None:
    """Where Helm installed older CRDs, the command as it is printed upgrades them."""
    chart = tmp_path / "older"
    (chart / "crds").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("{apiVersion: v2, name: older, version: 0.0.1}")
    for path in CRDS.glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        del crd["metadata"]["annotations"]
        version = crd["spec"]["versions"][0]
        del version["additionalPrinterColumns"]
        version["schema"]["openAPIV3Schema"]["properties"]["status"]["description"] = "older"
        (chart / "crds" / path.name).write_text(yaml.safe_dump(crd))
    with ControlPlane() as plane:
        access = f"--kubeconfig={plane.admin_kubeconfig}"
        subprocess.run(
            [locate("helm"), "install", "older", str(chart), access],
            capture_output=True, check=True, timeout=60,
            env={"PATH": os.defpath, "HOME": str(tmp_path)},
        )  # fmt: skip

        async def problem() -> str | None:
            async with Kube(from_kubeconfig(str(plane.admin_kubeconfig))) as kube:
                return await find_schema_problem(kube)

        assert COMMAND in (asyncio.run(problem()) or "")
        words = COMMAND.replace("crds/", f"{CRDS}/").split()
        plane.kubectl(*words[1:])
        assert asyncio.run(problem()) is None


async def test_a_newer_crd_is_none_of_our_business(
    stage: Stage, annotate: Callable[[str, str], Any]
) -> None:
    """CRDs go first in an upgrade, and stay in a rollback."""
    await annotate(CONFIGS_CRD, "=999")
    assert await find_schema_problem(stage.kube) is None


async def test_a_secret_of_another_type_is_told(stage: Stage) -> None:
    """Its type cannot be changed and its content may be somebody's: he is told what to do."""
    secrets = f"/api/v1/namespaces/{stage.system}/secrets"
    body = {"metadata": {"name": AGENT_SECRET}, "type": "Opaque", "stringData": {"mine": "x"}}
    await stage.kube.create(secrets, body)
    async with stage.operator() as program:
        await until_true(lambda: _obstacle(program))
        remedy = f"kubectl -n {stage.system} delete secret {AGENT_SECRET}"
        assert remedy in _obstacle(program)
        assert "Opaque" in _obstacle(program)
        kept = await stage.kube.get(f"{secrets}/{AGENT_SECRET}")
        assert list(kept["data"]) == ["mine"]
        await asyncio.to_thread(stage.plane.kubectl, *remedy.split()[1:])
        await until_true(lambda: not _obstacle(program))
        made = await stage.kube.get(f"{secrets}/{AGENT_SECRET}")
        assert made["type"] == "kubernetes.io/tls"


async def test_an_expired_authority_is_replaced_at_once(stage: Stage) -> None:
    """What it signs nobody accepts: there is no time to publish a next one first."""
    store = CertificateStore(stage.kube, namespace=stage.system, deployment=None)
    now = datetime.datetime.now(datetime.UTC)
    long_ago = now - datetime.timedelta(days=3651)
    await store.ensure(long_ago)
    path = f"/api/v1/namespaces/{stage.system}/secrets/{CA_SECRET}"
    old = await stage.kube.get(path)
    operator, agent = await store.ensure(now)
    new = await stage.kube.get(path)
    assert json.dumps(new["data"]) != json.dumps(old["data"])
    for leaf in (operator, agent):
        assert certificates.expiry(leaf.bundle) > now
        assert certificates.expiry(leaf.certificate) > now
    assert (await store.ensure(now)) == (operator, agent)
