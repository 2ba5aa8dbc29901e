"""Operators in this process and twins of agents around a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import socket
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.harness.controlplane import ControlPlane
from tests.integration.operator_twin import Twin

from blobcache_operator import errors
from blobcache_operator.facts import CONFIGS_PATH
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import from_kubeconfig
from blobcache_operator.node_objects import COLLECTION
from blobcache_operator.program import Program
from blobcache_operator.settings import OperatorSettings

T = TypeVar("T")
CRDS = Path(__file__).resolve().parents[2] / "crds"
WAIT_SECONDS = 30.0
HTTP_SPEC: dict[str, Any] = {
    "backend": {"type": "HTTPProxy", "httpProxy": {"address": "http://origin.example.com"}}
}
_WRITE = re.compile(
    r'apiserver_request_total\{[^}]*,resource="(?P<resource>[^"]*)"[^}]*'
    r'verb="(?:POST|PUT|PATCH|APPLY|DELETE)"[^}]*\} (?P<count>\S+)'
)


async def until(probe: Callable[[], Awaitable[T]], *, seconds: float = WAIT_SECONDS) -> T:
    """Return the probe's first truthy answer; fails with its last one."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        answer = await probe()
        if answer:
            return answer
        if loop.time() > deadline:
            raise AssertionError(f"not so within {seconds} s; last: {answer!r}")
        await asyncio.sleep(0.05)


async def until_true(probe: Callable[[], object], *, seconds: float = WAIT_SECONDS) -> None:
    """Wait for a condition of this process."""

    async def ask() -> bool:
        return bool(probe())

    await until(ask, seconds=seconds)


class Stage:
    """One test's namespaces, nodes, twins and operators."""

    def __init__(self, plane: ControlPlane, kube: Kube, folder: Path) -> None:
        self.plane = plane
        self.kube = kube
        self.tls = folder / "tls"
        suffix = uuid.uuid4().hex[:8]
        self.system = f"system-{suffix}"
        self.tenant = f"tenant-{suffix}"
        self.twins: dict[str, Twin] = {}
        self.operator_access = kube.access

    async def prepare(self) -> None:
        """Make the namespaces."""
        for name in (self.system, self.tenant):
            await self.kube.create("/api/v1/namespaces", {"metadata": {"name": name}})

    async def clean(self) -> None:
        """Delete what would disturb the next test."""
        for path in (CONFIGS_PATH, COLLECTION, "/api/v1/nodes"):
            for body in await self.kube.list_all(path):
                metadata = body["metadata"]
                collection, kind = path.rsplit("/", 1)
                where = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
                with contextlib.suppress(errors.NotFound):
                    await self.kube.delete(f"{collection}{where}/{kind}/{metadata['name']}")

    async def add_node(self, name: str, labels: dict[str, str] | None = None) -> Twin:
        """Make a Node and a twin that does not listen yet."""
        body = {"metadata": {"name": name, "labels": labels or {}}}
        await self.kube.create("/api/v1/nodes", body)
        return self.add_twin(name)

    def add_twin(self, name: str) -> Twin:
        """Make a twin with a port of its own, without a Node."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        twin = self.twins[name] = Twin(name, port=port)
        return twin

    def settings(self, **changed: Any) -> OperatorSettings:
        """Return settings that wait for nothing long."""
        values: dict[str, Any] = {
            "namespace": self.system,
            "agent": {twin.node: twin.url for twin in self.twins.values()},
            "write_agent_certs": self.tls,
            "health_listen": "127.0.0.1:0",
            "secret_seconds": 1.0,
            "lease_seconds": 3.0,
            "drop_confirm_seconds": 2.0,
        }
        return OperatorSettings(**{**values, **changed})

    @contextlib.asynccontextmanager
    async def operator(self, **changed: Any) -> AsyncIterator[Program]:
        """Run an operator beside the body; it must not have failed by the end."""
        program = Program(self.settings(**changed), self.operator_access, {"POD_NAME": "operator"})
        task = asyncio.create_task(program.run())
        try:
            yield program
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @contextlib.asynccontextmanager
    async def running(self, **changed: Any) -> AsyncIterator[Program]:
        """Run an operator and all twins beside the body."""
        async with self.operator(**changed) as program, contextlib.AsyncExitStack() as stack:
            await self.serve_twins(stack)
            yield program

    async def serve_twins(self, stack: contextlib.AsyncExitStack) -> None:
        """Let all twins listen until the stack ends, once there are certificates."""
        await until_true(lambda: (self.tls / "tls.key").exists())
        for twin in self.twins.values():
            await stack.enter_async_context(twin.serving(self.tls))

    def configs_path(self, namespace: str | None = None) -> str:
        """Return the path of a namespace's configs."""
        return (
            f"/apis/blobcache.dev/v1alpha1/namespaces/{namespace or self.tenant}/blobcacheconfigs"
        )

    async def apply(self, name: str, spec: dict[str, Any] | None = None) -> dict[str, Any]:
        """Create a config in the tenant's namespace."""
        body = {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheConfig",
            "metadata": {"name": name},
            "spec": {**HTTP_SPEC, **(spec or {})},
        }
        return await self.kube.create(self.configs_path(), body)

    async def patch(self, name: str, spec: dict[str, Any]) -> None:
        """Merge-patch a config's spec."""
        await self.kube.merge_patch(f"{self.configs_path()}/{name}", {"spec": spec})

    async def delete(self, name: str) -> None:
        """Delete a config."""
        await self.kube.delete(f"{self.configs_path()}/{name}")

    async def get(self, name: str) -> dict[str, Any]:
        """Return a config."""
        return await self.kube.get(f"{self.configs_path()}/{name}")

    async def status(self, name: str) -> dict[str, Any]:
        """Return a config's status."""
        return dict((await self.get(name)).get("status") or {})

    async def condition(
        self, name: str, kind: str, status: str, reason: str | None = None
    ) -> dict[str, Any]:
        """Wait for a condition of the current generation and return it."""
        seen: list[Any] = []

        async def probe() -> dict[str, Any] | None:
            body = await self.get(name)
            conditions = (body.get("status") or {}).get("conditions") or []
            found = next((item for item in conditions if item["type"] == kind), None)
            seen[:] = [conditions]
            matches = (
                found is not None
                and found["status"] == status
                and reason in (None, found["reason"])
                and found["observedGeneration"] == body["metadata"]["generation"]
            )
            return found if matches else None

        try:
            found = await until(probe)
        except AssertionError:
            raise AssertionError(f"no {kind}={status} {reason}; conditions: {seen}") from None
        assert found is not None
        return found

    async def node_object(self, name: str) -> dict[str, Any] | None:
        """Return a BlobCacheNode, None if there is none."""
        try:
            return await self.kube.get(f"{COLLECTION}/{name}")
        except errors.NotFound:
            return None

    async def create_secret(
        self, name: str, data: dict[str, str], *, labelled: bool = True, kind: str = "Opaque"
    ) -> None:
        """Create a Secret in the tenant's namespace."""
        labels = {"blobcache.dev/credentials": "true"} if labelled else {}
        await self.kube.create(
            f"/api/v1/namespaces/{self.tenant}/secrets",
            {"metadata": {"name": name, "labels": labels}, "type": kind, "stringData": data},
        )

    async def lease(self) -> dict[str, Any]:
        """Return the Lease."""
        return await self.kube.get(self.lease_path)

    @property
    def lease_path(self) -> str:
        """The Lease's path."""
        return f"/apis/coordination.k8s.io/v1/namespaces/{self.system}/leases/blobcache-operator"

    async def count_writes(self) -> dict[str, float]:
        """Return how often the API server was asked to write, by resource."""
        shown = await asyncio.to_thread(self.plane.kubectl, "get", "--raw", "/metrics")
        counts: dict[str, float] = {}
        for found in _WRITE.finditer(shown.stdout):
            resource = found["resource"]
            counts[resource] = counts.get(resource, 0.0) + float(found["count"])
        return counts


@pytest.fixture(scope="module", name="plane")
def plane_fixture() -> Iterator[ControlPlane]:
    """One of its own: an operator acts on every config of a cluster."""
    with ControlPlane() as plane:
        plane.kubectl("apply", "--server-side", "-f", str(CRDS))
        yield plane


@pytest.fixture(name="stage")
async def stage_fixture(plane: ControlPlane, tmp_path: Path) -> AsyncIterator[Stage]:
    """Fresh namespaces and no node."""
    access = await asyncio.to_thread(from_kubeconfig, str(plane.admin_kubeconfig))
    async with Kube(access) as kube:
        made = Stage(plane, kube, tmp_path)
        await made.prepare()
        yield made
        await made.clean()
    # A connection that was cut while TLS said goodbye is kopf's or aiohttp's, and no leak of ours:
    # it must not be found, and warned of, in somebody else's test.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
