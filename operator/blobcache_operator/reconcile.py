"""
The pure core: from facts to what every node should run and what to say about every config.

Nothing here waits, reads a clock or remembers; the same snapshot gives the same plan.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from blobcache_api.agent import PROTOCOL_VERSION, CredentialsState, PushedConfig, seal_config
from blobcache_api.quantity import format_quantity
from blobcache_api.v1alpha1.config import BLOBS_MAX, BlobCacheConfigSpec
from blobcache_operator.admission import Admitted, admit, age_order
from blobcache_operator.snapshot import (
    AgentFacts,
    ConfigFacts,
    ConfigFigures,
    CredentialFacts,
    Failure,
    Limits,
    Snapshot,
)

# Below STATE_SIZE_BYTES_MAX of the messages, with room for credentials, keys and addresses.
NODE_SPEC_BYTES_MAX = 12 * 1024 * 1024
TOMBSTONES_PER_NODE_MAX = 4096

# Features beyond the first protocol version: name, and which specs need it. Empty so far.
Features = tuple[tuple[str, Callable[[BlobCacheConfigSpec], bool]], ...]
FEATURES: Features = ()


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node should run."""

    configs: tuple[PushedConfig, ...] = ()
    tombstones: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of one config.

    Args:
        refusal: Why no node gets it; None when it is admitted.
        credentials: What its Secret gave.
        selected: Nodes that the selector matches and that have an agent, sorted.
        wanted: The digest each of these nodes should run.
        withheld: Nodes that do not get it although they are selected, and why.
        waiting: Nodes whose turn to warm has not come.
    """

    refusal: Failure | None = None
    credentials: CredentialFacts = field(default_factory=CredentialFacts)
    selected: tuple[str, ...] = ()
    wanted: Mapping[str, str] = field(default_factory=dict)
    withheld: Mapping[str, Failure] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """Desired states by node, verdicts by config uid."""

    nodes: Mapping[str, NodePlan]
    verdicts: Mapping[str, Verdict]


class Sealer:
    """
    Seals pushed configs, each form once: specs may be large, and most never change.

    The cache is what makes a pass over many configs cheap; it changes no result.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[tuple[object, ...], PushedConfig]] = {}

    def seal(
        self, config: ConfigFacts, spec: BlobCacheConfigSpec, found: CredentialFacts, form: str
    ) -> PushedConfig:
        """Return the sealed config; `form` names the variant of the spec."""
        slot = (config.uid, form)
        depends_on = (config.generation, spec, found)
        known = self._last.get(slot)
        if known is not None and known[0] == depends_on:
            return known[1]
        sealed = seal_config(
            PushedConfig(
                namespace=config.namespace,
                name=config.name,
                uid=config.uid,
                generation=config.generation,
                spec=spec,
                credentials=found.credentials,
                credentials_state=_credentials_state(spec, found),
            ),
            secret_version=found.version,
        )
        self._last[slot] = (depends_on, sealed)
        return sealed

    def forget_all_but(self, uids: Iterable[str]) -> None:
        """Drop what belongs to other configs."""
        kept = set(uids)
        self._last = {slot: value for slot, value in self._last.items() if slot[0] in kept}


def reconcile(
    snapshot: Snapshot, limits: Limits, sealer: Sealer | None = None, features: Features = FEATURES
) -> Plan:
    """Return the plan for a snapshot."""
    sealer = sealer or Sealer()
    admitted, refused = admit(snapshot.configs, limits)
    room = {node: _Room(limits.configs_per_node) for node in snapshot.agents}
    verdicts: dict[str, Verdict] = {}
    for config in sorted(snapshot.configs, key=age_order):
        if config.uid in refused:
            selected = _select(snapshot, config.spec.node_selector) if config.spec else ()
            verdicts[config.uid] = Verdict(refusal=refused[config.uid], selected=selected)
        else:
            verdicts[config.uid] = _place(
                snapshot, config, admitted[config.uid], limits, room, sealer, features
            )
    living = {config.uid for config in snapshot.configs}
    sealer.forget_all_but(living)
    tombstones = _tombstones(living, snapshot.deleted_uids)
    return Plan(
        nodes={node: NodePlan(tuple(room[node].configs), tombstones) for node in snapshot.agents},
        verdicts=verdicts,
    )


@dataclass(slots=True)
class _Room:
    """What one node still takes."""

    configs_left: int
    bytes_left: int = NODE_SPEC_BYTES_MAX
    configs: list[PushedConfig] = field(default_factory=list)


def _place(
    snapshot: Snapshot,
    config: ConfigFacts,
    admitted: Admitted,
    limits: Limits,
    room: Mapping[str, _Room],
    sealer: Sealer,
    features: Features,
) -> Verdict:
    """Put one config on the nodes it selects, as far as they may take it."""
    found = snapshot.credentials.get(config.uid, CredentialFacts())
    selected = _select(snapshot, admitted.spec.node_selector)
    withheld: dict[str, Failure] = {}
    for node in selected:
        refusal = _node_refusal(snapshot.agents[node], admitted, limits, room[node], features)
        if refusal is not None:
            withheld[node] = refusal
    takers = [node for node in selected if node not in withheld]
    full = sealer.seal(config, admitted.spec, found, "full")
    waiting = _waiting(snapshot, config.uid, admitted.spec, takers, full.digest)
    later = full
    if waiting:
        later = sealer.seal(config, _without_prefetch(admitted.spec), found, "waiting")
    wanted = {}
    for node in takers:
        pushed = later if node in waiting else full
        room[node].configs.append(pushed)
        room[node].configs_left -= 1
        room[node].bytes_left -= admitted.spec_bytes
        wanted[node] = pushed.digest
    return Verdict(
        credentials=found,
        selected=selected,
        wanted=wanted,
        withheld=withheld,
        waiting=frozenset(waiting),
    )


def _select(snapshot: Snapshot, selector: Mapping[str, str]) -> tuple[str, ...]:
    """Return the nodes with an agent whose labels match; one without a Node object has none."""
    matching = []
    for node in sorted(snapshot.agents):
        labels = snapshot.nodes[node].labels if node in snapshot.nodes else {}
        if all(labels.get(key) == value for key, value in selector.items()):
            matching.append(node)
    return tuple(matching)


def _node_refusal(
    agent: AgentFacts, admitted: Admitted, limits: Limits, room: _Room, features: Features
) -> Failure | None:
    """Return why this node may not take the config."""
    if room.configs_left <= 0 or admitted.spec_bytes > room.bytes_left:
        return Failure(
            "TooManyConfigs",
            f"The node has its {limits.configs_per_node} BlobCacheConfigs or "
            f"{NODE_SPEC_BYTES_MAX} bytes of them already, and older ones go first. Narrow a "
            "nodeSelector, or delete one.",
        )
    report = agent.report
    if report is None:
        return None
    if not report.protocol.min <= PROTOCOL_VERSION <= report.protocol.max:
        return Failure(
            "AgentTooOld" if report.protocol.max < PROTOCOL_VERSION else "AgentTooNew",
            f"The agent speaks protocol {report.protocol.min} to {report.protocol.max}, the "
            f"operator {PROTOCOL_VERSION}. Bring both to the same version.",
        )
    missing = [
        name for name, needs in features if needs(admitted.spec) and name not in report.features
    ]
    if missing:
        return Failure(
            "AgentTooOld",
            f"The agent, version {report.agent_version}, lacks {', '.join(missing)}. Upgrade it.",
        )
    return _protection_refusal(agent, admitted.spec, limits)


def _protection_refusal(
    agent: AgentFacts, spec: BlobCacheConfigSpec, limits: Limits
) -> Failure | None:
    """Refuse a prefetch list that would hold on to too much of a node that others use too."""
    if spec.prefetch is None or agent.report is None:
        return None
    disk = agent.report.disk
    node_bytes = disk.capacity_bytes or max(disk.total_bytes - disk.min_free_bytes, 0)
    listed = sum(blob.size or 0 for blob in spec.prefetch.blobs)
    if spec.cache.capacity is not None:
        # Beyond its own low watermark nothing of a config is protected anyway.
        own = spec.cache.capacity * spec.eviction.low_watermark_percent // 100
        listed = min(listed, own)
    permitted = node_bytes * limits.protected_percent // 100
    if listed <= permitted:
        return None
    return Failure(
        "CapacityRefused",
        f"The prefetch list would protect {format_quantity(listed)}, but one configuration may "
        f"protect {format_quantity(permitted)} on this node, {limits.protected_percent} % of its "
        f"{format_quantity(node_bytes)}. Shorten the list or lower `spec.cache.capacity`.",
    )


def _waiting(
    snapshot: Snapshot, uid: str, spec: BlobCacheConfigSpec, takers: list[str], digest: str
) -> set[str]:
    """
    Return the nodes whose turn to warm has not come.

    Nodes that are warm keep the list. Of the others those that already began go on, then the
    first by name begin, until `maxNodes` are at it. A node that is away or cannot go on (its
    list exceeds its room) does not hold up the line.
    """
    if spec.prefetch is None or not spec.prefetch.blobs:
        return set()
    at_it: list[tuple[bool, str]] = []
    for node in takers:
        agent = snapshot.agents[node]
        figures = agent.report.configs.get(uid) if agent.report else None
        began = figures is not None and figures.applied_digest == digest
        if not agent.is_available or (began and is_settled(figures)):
            continue
        at_it.append((not began, node))
    return {node for _, node in sorted(at_it)[spec.prefetch.max_nodes :]}


def is_settled(figures: ConfigFigures | None) -> bool:
    """Say whether a node's prefetching has come to its end, good or bad."""
    if figures is None or figures.prefetch is None:
        return False
    done = figures.prefetch.blobs_ready >= figures.prefetch.blobs
    return done or figures.prefetch.problem is not None


def _without_prefetch(spec: BlobCacheConfigSpec) -> BlobCacheConfigSpec:
    """
    Return the spec of a node that waits for its turn: nothing is fetched, nothing listed is lost.

    What the node has of the list (from readers, or from an earlier list) stays protected, as
    pinned blobs are.
    """
    assert spec.prefetch is not None
    listed = [blob.id for blob in spec.prefetch.blobs]
    pinned = tuple(dict.fromkeys([*spec.eviction.pinned, *listed]))[:BLOBS_MAX]
    eviction = spec.eviction.model_copy(update={"pinned": pinned})
    return spec.model_copy(update={"prefetch": None, "eviction": eviction})


def _credentials_state(spec: BlobCacheConfigSpec, found: CredentialFacts) -> CredentialsState:
    if spec.backend.credentials_secret_ref is None:
        return CredentialsState.NOT_REQUIRED
    return CredentialsState.PRESENT if found.credentials else CredentialsState.PENDING


def _tombstones(living: set[str], deleted: frozenset[str]) -> tuple[str, ...]:
    """
    Return the uids whose bytes nodes should delete: what is confirmed gone, the same on all nodes.

    A uid that a LIST has is never among them, whatever was confirmed before. That a node reports
    a uid no LIST has is not enough: see `deletions`.
    """
    return tuple(sorted(deleted - living)[:TOMBSTONES_PER_NODE_MAX])
