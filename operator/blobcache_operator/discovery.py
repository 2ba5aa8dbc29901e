"""
Which agents there are: the endpoints of a headless Service, or names given by hand.

Endpoints count whether ready or not, for an agent that has no state yet is not ready and wants
exactly our push. Pure; the loop lists the EndpointSlices.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blobcache_operator.kube import JSONObject

CONTROL_PORT_NAME = "control"
CONTROL_PORT_DEFAULT = 7443
SERVICE_LABEL = "kubernetes.io/service-name"


@dataclass(frozen=True)
class AgentAddress:
    """Where one node's agent listens; `pod_uid` is None when it was named by hand."""

    node: str
    url: str
    pod_uid: str | None = None


def find_agents(
    slices: Iterable[JSONObject], by_hand: Mapping[str, str]
) -> dict[str, AgentAddress]:
    """
    Return one agent per node.

    While a DaemonSet replaces a pod two may exist: a ready one is preferred, then the one whose
    pod uid sorts first, so that every replica and every pass chooses alike. Names given by hand
    win over discovered ones.
    """
    candidates: dict[str, list[tuple[bool, str, str]]] = {}
    for piece in slices:
        port = _control_port(piece)
        for endpoint in piece.get("endpoints") or []:
            conditions = endpoint.get("conditions") or {}
            node, addresses = endpoint.get("nodeName"), endpoint.get("addresses") or []
            if not node or not addresses or conditions.get("terminating"):
                continue
            address = str(addresses[0])
            host = f"[{address}]" if ":" in address else address
            uid = str((endpoint.get("targetRef") or {}).get("uid") or address)
            is_unready = conditions.get("ready") is False
            candidates.setdefault(str(node), []).append((is_unready, uid, f"https://{host}:{port}"))
    agents = {}
    for node, found in candidates.items():
        _, uid, url = min(found)
        agents[node] = AgentAddress(node, url, uid)
    agents |= {node: AgentAddress(node, url) for node, url in by_hand.items()}
    return agents


def _control_port(piece: JSONObject) -> int:
    """Return the port named `control`, else the only one, else the default."""
    ports = piece.get("ports") or []
    for port in ports:
        if port.get("name") == CONTROL_PORT_NAME and port.get("port"):
            return int(port["port"])
    if len(ports) == 1 and ports[0].get("port"):
        return int(ports[0]["port"])
    return CONTROL_PORT_DEFAULT
