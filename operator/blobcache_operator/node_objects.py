"""The BlobCacheNode objects: one for each Node with an agent, owned by it, gone with it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from pydantic import ValidationError

from blobcache_api.v1alpha1.node import BlobCacheNodeStatus
from blobcache_operator import errors
from blobcache_operator.budget import WriteBucket
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.leadership import Term
from blobcache_operator.snapshot import NodeFacts
from blobcache_operator.status_writer import take_token

COLLECTION = "/apis/blobcache.dev/v1alpha1/blobcachenodes"
RELIST_SECONDS = 600.0
RETRY_SECONDS = 5.0
# A thousand new nodes take minutes at the cluster's rate; conditions of configs must not wait.
SPARE_TOKENS = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeObject:
    """One BlobCacheNode as it is on the server."""

    uid: str
    owner_uid: str | None
    status: BlobCacheNodeStatus | None


class NodeObjects:
    """
    Creates and deletes objects; their statuses are the status writer's.

    Args:
        kube: The API server.
        term: Checked before each write.
        bucket: The budget of all writers.
    """

    def __init__(self, kube: Kube, term: Term, bucket: WriteBucket) -> None:
        self._kube = kube
        self._term = term
        self._bucket = bucket
        self._objects: dict[str, NodeObject] = {}
        self._wanted: dict[str, str | None] = {}
        self._list_time = float("-inf")
        self._bell = asyncio.Event()

    def set_wanted(
        self, agents: set[str], by_hand: set[str], nodes: Mapping[str, NodeFacts]
    ) -> None:
        """
        Say which objects there should be.

        A node that had an agent keeps its object while the Node exists. An agent named by hand
        needs no Node; then its object has no owner.
        """
        wanted: dict[str, str | None] = {
            name: nodes[name].uid for name in agents | self._objects.keys() if name in nodes
        }
        wanted |= {name: None for name in by_hand if name not in nodes}
        if wanted != self._wanted:
            self._wanted = wanted
            self._bell.set()

    def names(self) -> list[str]:
        """Return the names of the objects there are or should be."""
        return sorted(self._objects.keys() | self._wanted.keys())

    def find(self, name: str) -> NodeObject | None:
        """Return an object that exists and belongs to today's Node."""
        found = self._objects.get(name)
        if found is None or name not in self._wanted or found.owner_uid != self._wanted[name]:
            return None
        return found

    def note_missing(self, name: str) -> None:
        """Somebody deleted the object."""
        self._objects.pop(name, None)
        self._bell.set()

    async def load(self) -> None:
        """List what exists; needed before anything else."""
        found: dict[str, NodeObject] = {}
        for body in await self._kube.list_all(COLLECTION):
            found[str(body["metadata"]["name"])] = _read(body)
        self._objects = found
        self._list_time = asyncio.get_running_loop().time()

    async def run(self, changed: asyncio.Event) -> None:
        """Keep objects as wanted until cancelled; ring `changed` when one came to be."""
        loop = asyncio.get_running_loop()
        while True:
            self._bell.clear()
            pause = self._list_time + RELIST_SECONDS - loop.time()
            try:
                if pause <= 0:
                    await self.load()
                    pause = RELIST_SECONDS
                if await self._converge():
                    changed.set()
            except errors.KubeError as error:
                log.warning("BlobCacheNodes were not brought up to date", error=str(error))
                pause = RETRY_SECONDS
            try:
                async with asyncio.timeout(pause):
                    await self._bell.wait()
            except TimeoutError:
                continue

    async def _converge(self) -> bool:
        """Create and delete; return whether anything was done."""
        wanted = dict(self._wanted)
        is_changed = False
        for name, found in list(self._objects.items()):
            if name in wanted and found.owner_uid == wanted[name]:
                continue
            if name not in wanted and await self._node_exists(name):
                continue  # the LIST was incomplete, or the Node has just come
            await self._delete(name, found)
            is_changed = True
        for name, owner_uid in wanted.items():
            if name not in self._objects:
                await self._create(name, owner_uid)
                is_changed = True
        return is_changed

    async def _node_exists(self, name: str) -> bool:
        try:
            await self._kube.get(f"/api/v1/nodes/{name}")
        except errors.NotFound:
            return False
        return True

    async def _delete(self, name: str, found: NodeObject) -> None:
        await take_token(self._bucket, spare=SPARE_TOKENS)
        self._term.check()
        try:
            await self._kube.delete(f"{COLLECTION}/{name}", uid=found.uid)
        except (errors.NotFound, errors.Conflict) as error:
            log.debug("BlobCacheNode was gone already", node=name, error=str(error))
        self._objects.pop(name, None)

    async def _create(self, name: str, owner_uid: str | None) -> None:
        metadata: JSONObject = {"name": name}
        if owner_uid is not None:
            metadata["ownerReferences"] = [
                {"apiVersion": "v1", "kind": "Node", "name": name, "uid": owner_uid}
            ]
        body = {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheNode",
            "metadata": metadata,
        }
        await take_token(self._bucket, spare=SPARE_TOKENS)
        self._term.check()
        try:
            created = await self._kube.create(COLLECTION, body)
        except errors.Conflict:
            created = await self._kube.get(f"{COLLECTION}/{name}")
        self._objects[name] = _read(created)


def _read(body: JSONObject) -> NodeObject:
    metadata = body["metadata"]
    owners = metadata.get("ownerReferences") or []
    owner = next((item["uid"] for item in owners if item.get("kind") == "Node"), None)
    status = None
    if body.get("status"):
        try:
            status = BlobCacheNodeStatus.model_validate(body["status"])
        except ValidationError:
            status = None  # an older version's: it is written anew
    return NodeObject(str(metadata["uid"]), owner, status)
