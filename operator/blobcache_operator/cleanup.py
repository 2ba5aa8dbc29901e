"""
The end of an uninstallation: what the operator made goes, and every node says that it is done.

Runs in the chart's post-delete hook, beside a DaemonSet whose pods become ready when their node is
as it was before. Nodes that cannot be reached must not keep anybody from uninstalling: the wait is
bounded and the nodes are named.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from blobcache_operator import errors
from blobcache_operator.certificate_store import AGENT_SECRET, CA_SECRET, OPERATOR_SECRET
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.node_objects import COLLECTION as NODE_OBJECTS

POLL_SECONDS = 1.0
OPERATOR_END_SECONDS = 60.0
TEST_POD = "blobcache-test"
OPERATOR_PODS = "app.kubernetes.io/name=blobcache,app.kubernetes.io/component=operator"


@dataclass(frozen=True)
class Leftover:
    """A node that did not say it is done."""

    node: str
    why: str


class Cleanup:
    """
    One run.

    Args:
        kube: The API server, as an account with the hook's rights.
        namespace: The release's.
        lease_name: The operator's Lease.
        tell: Takes a line for whoever uninstalls.
    """

    def __init__(
        self, kube: Kube, *, namespace: str, lease_name: str, tell: Callable[[str], None]
    ) -> None:
        self._kube = kube
        self._core = f"/api/v1/namespaces/{namespace}"
        self._apps = f"/apis/apps/v1/namespaces/{namespace}"
        self._lease = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{lease_name}"
        self._tell = tell

    async def run(self, *, daemonset: str | None, timeout_seconds: float) -> tuple[Leftover, ...]:
        """
        Clean up; return the nodes that were not done in time.

        Args:
            daemonset: Whose pods put nodes back; None where nodes have nothing of ours.
            timeout_seconds: Bound of the whole.

        Raises:
            KubeError: The API server refused something, or gave no answer in this time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        await self._wait_for_operators(min(deadline, loop.time() + OPERATOR_END_SECONDS))
        await self._delete_objects(deadline)
        if daemonset is None:
            return ()
        leftovers: tuple[Leftover, ...] = (Leftover("", "nothing is known of its pods"),)
        while True:
            with contextlib.suppress(errors.KubeUnavailable):
                leftovers = await self._ask_nodes(daemonset)
            if not leftovers or loop.time() >= deadline:
                return leftovers
            await asyncio.sleep(POLL_SECONDS)

    async def _wait_for_operators(self, deadline: float) -> None:
        """Wait until no operator is left that could make its objects anew; not for ever."""
        loop = asyncio.get_running_loop()
        while loop.time() < deadline:
            with contextlib.suppress(errors.KubeUnavailable):
                pods = await self._kube.list_all(f"{self._core}/pods", labelSelector=OPERATOR_PODS)
                if not pods:
                    return
            await asyncio.sleep(POLL_SECONDS)
        self._tell("an operator's pod is still there; going on without waiting for it")

    async def _delete_objects(self, deadline: float) -> None:
        secrets = [
            f"{self._core}/secrets/{name}" for name in (CA_SECRET, OPERATOR_SECRET, AGENT_SECRET)
        ]
        for path in (self._lease, *secrets, f"{self._core}/pods/{TEST_POD}", NODE_OBJECTS):
            if await self._delete(path, deadline):
                self._tell(f"deleted {path.rpartition('/')[2]}")

    async def _delete(self, path: str, deadline: float) -> bool:
        """Delete an object or a collection; return whether it was there."""
        while True:
            try:
                await self._kube.delete(path)
            except errors.NotFound:
                return False
            except errors.KubeUnavailable:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                await asyncio.sleep(POLL_SECONDS)
            else:
                return True

    async def _ask_nodes(self, daemonset: str) -> tuple[Leftover, ...]:
        found = await self._kube.get(f"{self._apps}/daemonsets/{daemonset}")
        status = found.get("status") or {}
        if (status.get("observedGeneration") or 0) < found["metadata"]["generation"]:
            return (Leftover("", "the DaemonSet's controller has not begun"),)
        wanted = int(status.get("desiredNumberScheduled") or 0)
        if int(status.get("numberReady") or 0) >= wanted:
            self._tell(f"{wanted} nodes are as they were")
            return ()
        labels: Mapping[str, str] = found["spec"]["selector"]["matchLabels"]
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        pods = await self._kube.list_all(f"{self._core}/pods", labelSelector=selector)
        return tuple(_leftovers(pods, wanted))


def _leftovers(pods: Sequence[JSONObject], wanted: int) -> Iterable[Leftover]:
    for pod in sorted(pods, key=_node_of):
        conditions = (pod.get("status") or {}).get("conditions") or []
        if not any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
            yield Leftover(_node_of(pod), _explain(pod))
    if len(pods) < wanted:
        yield Leftover("", f"{wanted - len(pods)} nodes have no pod yet")


def _node_of(pod: JSONObject) -> str:
    """Return where a pod runs, or is meant to: a DaemonSet says so before it is scheduled."""
    spec = pod.get("spec") or {}
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    node_affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or []:
        for field in term.get("matchFields") or []:
            if field.get("key") == "metadata.name" and field.get("values"):
                return str(field["values"][0])
    return ""


def _explain(pod: JSONObject) -> str:
    """Return why a pod is not done: what its container said, or what it waits for."""
    status = pod.get("status") or {}
    containers = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    for container in containers:
        ended = (container.get("lastState") or {}).get("terminated") or (
            container.get("state") or {}
        ).get("terminated")
        if ended and ended.get("exitCode"):
            said = " ".join(str(ended.get("message") or ended.get("reason") or "").split())
            return f"'{container['name']}' failed: {said[:500]}"
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") not in (None, "PodInitializing"):
            said = " ".join(str(waiting.get("message") or "").split())
            return f"'{container['name']}' waits: {waiting['reason']} {said[:500]}".rstrip()
    return f"its pod is {status.get('phase') or 'unknown'}"
