"""From the API server's LISTs to facts."""

import asyncio
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog
from pydantic import ValidationError

from blobcache_api.v1alpha1.common import MalformedError
from blobcache_api.v1alpha1.config import BlobCacheConfigStatus, from_resource
from blobcache_operator import errors
from blobcache_operator.discovery import SERVICE_LABEL, AgentAddress, find_agents
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.snapshot import ConfigFacts, NodeFacts

CONFIGS_PATH = "/apis/blobcache.dev/v1alpha1/blobcacheconfigs"
NODES_PATH = "/api/v1/nodes"
NODE_ADDRESS_COLUMNS = ("Internal-IP", "External-IP")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Listing:
    """
    One complete look at the cluster.

    Args:
        start_time: The loop time before the first request.
        time: The loop time after the last answer.
    """

    start_time: float
    time: float
    configs: tuple[ConfigFacts, ...]
    nodes: Mapping[str, NodeFacts]
    agents: Mapping[str, AgentAddress]
    server_addresses: tuple[str, ...]

    def denied_addresses(self) -> tuple[str, ...]:
        """Return what no origin may resolve to: nodes and the API server."""
        found = {address for node in self.nodes.values() for address in node.addresses}
        return tuple(sorted(found | set(self.server_addresses)))


def config_path(config: ConfigFacts) -> str:
    """Return the path of a config's object."""
    return (
        f"/apis/blobcache.dev/v1alpha1/namespaces/{config.namespace}/blobcacheconfigs/{config.name}"
    )


class Lister:
    """
    Lists everything a plan depends on.

    Args:
        kube: The API server.
        namespace: Of the agents' Service.
        service: Its name.
        by_hand: Agents outside the cluster.
        environment: Where a pod finds the API server's address.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        service: str,
        by_hand: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        self._kube = kube
        self.namespace = namespace
        self._by_hand = by_hand
        self._slices_selector = f"{SERVICE_LABEL}={service}"
        self.slices_path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._server_hosts = (
            environment.get("KUBERNETES_SERVICE_HOST", ""),
            urlsplit(kube.access.server).hostname or "",
        )

    async def list_all(self) -> Listing:
        """
        Return a complete look.

        Raises:
            KubeError: Any part of it failed; a part alone would be a wrong picture.
        """
        start_time = asyncio.get_running_loop().time()
        configs, nodes, slices, servers = await asyncio.gather(
            self._kube.list_all(CONFIGS_PATH),
            self._kube.list_table(NODES_PATH),
            self._kube.list_all(self.slices_path, labelSelector=self._slices_selector),
            self._server_addresses(),
        )
        read = await asyncio.to_thread(lambda: tuple(read_config(body) for body in configs))
        return Listing(
            start_time=start_time,
            time=asyncio.get_running_loop().time(),
            configs=read,
            nodes={str(meta["name"]): _read_node(meta, cells) for meta, cells in nodes},
            agents=find_agents(slices, self._by_hand),
            server_addresses=servers,
        )

    async def _server_addresses(self) -> tuple[str, ...]:
        """
        Return the API server's addresses: its Service's, its own, and the one we speak to.

        The operator may lack the right to see the `kubernetes` EndpointSlices of namespace
        `default`; then the rest must do.
        """
        hosts = list(self._server_hosts)
        path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
        try:
            slices = await self._kube.list_all(path, labelSelector=f"{SERVICE_LABEL}=kubernetes")
            for piece in slices:
                for endpoint in piece.get("endpoints") or []:
                    hosts += endpoint.get("addresses") or []
        except errors.Forbidden as error:
            log.debug("API server's endpoints may not be listed", error=str(error))
        return tuple(sorted(set(_deniable(hosts))))


def read_config(body: JSONObject) -> ConfigFacts:
    """Return a listed object's facts, whether or not its spec fits the model."""
    metadata = body["metadata"]
    spec, problem = None, ""
    try:
        spec = from_resource(_known_metadata(body)).spec
    except MalformedError as error:
        problem = str(error)
    return ConfigFacts(
        namespace=str(metadata["namespace"]),
        name=str(metadata["name"]),
        uid=str(metadata["uid"]),
        generation=int(metadata.get("generation") or 0),
        created=str(metadata.get("creationTimestamp") or ""),
        spec=spec,
        problem=problem,
        status=_read_status(body.get("status")),
    )


def _known_metadata(body: JSONObject) -> JSONObject:
    """Return the object without what is not its author's to write."""
    return {key: body[key] for key in ("apiVersion", "kind", "metadata", "spec") if key in body}


def _read_status(status: object) -> BlobCacheConfigStatus | None:
    try:
        return BlobCacheConfigStatus.model_validate(status) if status else None
    except ValidationError:
        return None  # somebody else's, or an older version's: it is written anew


def _read_node(metadata: JSONObject, cells: JSONObject) -> NodeFacts:
    # A Node's addresses are not in its metadata; kubectl's columns have them at no other cost.
    addresses = [str(cells.get(column) or "") for column in NODE_ADDRESS_COLUMNS]
    return NodeFacts(
        name=str(metadata["name"]),
        uid=str(metadata["uid"]),
        labels=metadata.get("labels") or {},
        addresses=tuple(_deniable(addresses)),
    )


def _deniable(hosts: Iterable[str]) -> list[str]:
    """
    Return the IP addresses among these.

    Loopback is left out: agents refuse it in any case unless their administrator permitted it,
    and a test cluster's API server on 127.0.0.1 must not take that permission back.
    """
    found = []
    for host in hosts:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified:
            found.append(str(address))
    return found
