"""What the agent says of itself: built from managers' own figures, so that reports, metrics and
status agree to the byte.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blobcache_agent import __version__
from blobcache_agent.changes import Observation
from blobcache_agent.configs import Configs, Running
from blobcache_agent.node_state import NodeState
from blobcache_api.agent import (
    CANDIDATES_MAX,
    PROTOCOL_VERSION,
    Candidate,
    ConfigReport,
    DiskReport,
    PrefetchReport,
    ProtocolRange,
    Report,
)
from blobcache_api.v1alpha1.node import ConfigState
from blobcache_storage.cache.base import BlobUsage, ManagerStats
from blobcache_storage.cache.orphans import OrphanBlob
from blobcache_storage.cache.prefetch import EXCEEDS_CAPACITY
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.credentials import Pending
from blobcache_storage.errors import CacheBusy

MESSAGE_CHARS_MAX = 1024
BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
PROBLEM_OTHER = "PrefetchFailed"
PREFETCH_LIMITS = frozenset({EXCEEDS_CAPACITY, CacheBusy.reason})
"""Why a list is not warm though nothing fails."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports: the operator tells a restarted agent or machine from a ghost by it."""

    node: str
    boot_id: str
    pod_uid: str
    start_time: datetime

    @classmethod
    def read(cls, node: str, pod_uid: str) -> Identity:
        """Return this process's identity. Blocking."""
        boot_id = BOOT_ID_FILE.read_text().strip() if BOOT_ID_FILE.exists() else ""
        return cls(node, boot_id, pod_uid, datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of one configuration, as a report says it."""

    state: ConfigState
    reason: str = ""
    message: str = ""
    digest: str = ""
    """Of what runs; "" where nothing does, or not all that belongs to it."""


class Figures:
    """Gathers what reports and metrics show.

    Args:
        configs: The configurations in force.
        root: The cache root.
    """

    def __init__(self, configs: Configs, root: CacheRoot) -> None:
        self._configs = configs
        self._root = root
        self.filesystem_bytes = 0
        """Size of the file system; set by `refresh`."""
        self.free_bytes = 0

    async def refresh(self) -> None:
        """Look at the file system."""
        space = await asyncio.to_thread(self._root.disk.free_space, self._root.layout_fd)
        self.free_bytes, self.filesystem_bytes = space.free_bytes, space.total_bytes

    def running(self) -> Iterator[tuple[Running, ManagerStats]]:
        """Yield each configuration with its figures; zeros where it is not served."""
        for running in self._configs:
            stats = running.manager.stats() if running.manager else ManagerStats()
            yield running, stats

    def disk(self) -> DiskReport:
        """Return the disk's figures."""
        budget = self._root.budget
        return DiskReport(
            total_bytes=self.filesystem_bytes,
            available_bytes=max(0, self.free_bytes),
            used_bytes=budget.used_bytes,
            capacity_bytes=budget.capacity_bytes,
            min_free_bytes=budget.min_free_bytes,
            pressure=self.free_bytes < budget.min_free_bytes,
        )

    def orphan_bytes(self) -> int:
        """Return the bytes of configurations that are gone."""
        return sum(orphan.bytes for orphan in self._root.orphans())

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the blobs that may have to go first, coldest first.

        Orphans come before all, then blobs of configurations above their high watermark: a list
        of the node's coldest alone could leave out the very configuration that must shrink.
        """
        coldest = heapq.nsmallest(CANDIDATES_MAX, self._ranked(), key=lambda ranked: ranked[0])
        # Only what is shown is made a message: a node may hold many thousands of blobs.
        return tuple(_candidate(uid, blob) for (_, _, uid, _), blob in coldest)

    def _ranked(self) -> Iterator[tuple[tuple[int, float, str, str], OrphanBlob | BlobUsage]]:
        for orphan in self._root.orphans():
            yield (0, orphan.last_read_time, orphan.config_uid, orphan.blob_id), orphan
        for running in self._configs:
            if running.manager is None:
                continue
            rank = 1 if _is_above_high_watermark(running) else 2
            for usage in running.manager.usage():
                yield (rank, usage.last_read_time, running.uid, usage.blob_id), usage


def _is_above_high_watermark(running: Running) -> bool:
    if running.manager is None or running.config is None:
        return False
    cache = running.config.get_cache_config()
    if cache.capacity_bytes is None:
        return False
    held = running.manager.stats().bytes
    return held * 100 > cache.capacity_bytes * cache.high_watermark_percent


def _candidate(uid: str, blob: OrphanBlob | BlobUsage) -> Candidate:
    candidate = Candidate(
        config_uid=uid,
        blob_id=blob.blob_id,
        blob_version=blob.version,
        bytes=blob.bytes,
        last_read_time=max(0.0, blob.last_read_time),
        orphan=isinstance(blob, OrphanBlob),
    )
    if isinstance(blob, OrphanBlob):
        return candidate
    flags = {"in_use": blob.in_use, "pinned": blob.pinned, "wanted": blob.wanted}
    return candidate.model_copy(update=flags)


def verdict_of(running: Running, *, restored: bool) -> Verdict:
    """Return a configuration's state.

    Args:
        running: The configuration.
        restored: The state comes from disk, without the credentials it had: the configuration
            then is not what its digest says, and only a new push makes it so.
    """
    if running.refusal is not None:
        return Verdict(ConfigState.FAILED, running.refusal.reason, running.refusal.message)
    if running.config is None:
        return Verdict(ConfigState.PENDING, "Applying", "the configuration is being applied")
    if isinstance(running.config.get_backend_config().credentials, Pending):
        message = "the credentials have not arrived: hits are served, misses are answered 503"
        if restored:
            return Verdict(ConfigState.PENDING, "CredentialsPending", message)
        return Verdict(ConfigState.APPLIED, "CredentialsPending", message, running.wanted.digest)
    return Verdict(ConfigState.APPLIED, digest=running.wanted.digest)


def warm_percent(stats: ManagerStats) -> int:
    """Return how much of the prefetch list is there, rounded down; 100 only when all is."""
    if stats.prefetch_blobs_ready >= stats.prefetch_blobs:
        return 100
    if stats.prefetch_bytes <= 0:
        return 0
    return min(99, stats.prefetch_bytes_ready * 100 // stats.prefetch_bytes)


def observe(
    figures: Figures, state: NodeState, *, restored: bool
) -> tuple[Hashable, Mapping[str, Observation]]:
    """Return what moves the change number."""
    observations = {}
    for running, stats in figures.running():
        verdict = verdict_of(running, restored=restored)
        facts = (verdict, stats.degraded_reason, stats.prefetch_problem)
        observations[running.uid] = Observation(facts, stats.bytes, warm_percent(stats))
    extra = (state.epoch, state.digest, restored, figures.disk().pressure)
    return extra, observations


def build_report(
    identity: Identity, state: NodeState, figures: Figures, *, change: int, restored: bool
) -> Report:
    """Return the report."""
    return Report(
        node=identity.node,
        boot_id=identity.boot_id,
        pod_uid=identity.pod_uid,
        agent_version=__version__,
        start_time=identity.start_time,
        protocol=ProtocolRange(min=1, max=PROTOCOL_VERSION),
        epoch=state.epoch,
        revision=state.revision,
        digest=state.digest,
        change=change,
        disk=figures.disk(),
        configs=tuple(_config_reports(figures, restored=restored)),
        candidates=figures.candidates(),
        orphan_bytes=figures.orphan_bytes(),
    )


def _config_reports(figures: Figures, *, restored: bool) -> Iterable[ConfigReport]:
    for running, stats in figures.running():
        verdict = verdict_of(running, restored=restored)
        degraded_reason, degraded_message = degradation_of(stats)
        yield ConfigReport(
            namespace=running.namespace,
            name=running.name,
            uid=running.uid,
            applied_digest=verdict.digest,
            state=verdict.state,
            reason=verdict.reason or None,
            message=verdict.message[:MESSAGE_CHARS_MAX],
            bytes=stats.bytes,
            blobs=stats.blobs,
            requests=stats.requests,
            hit_bytes=stats.hit_bytes,
            miss_bytes=stats.miss_bytes,
            origin_bytes=stats.origin_bytes,
            origin_errors=stats.origin_errors,
            evicted_blobs=stats.evicted_blobs,
            evicted_bytes=stats.evicted_bytes,
            prefetch=_prefetch_report(stats),
            degraded_reason=degraded_reason or None,
            degraded_message=degraded_message[:MESSAGE_CHARS_MAX],
        )


def degradation_of(stats: ManagerStats) -> tuple[str, str]:
    """
    Return reason and message of what fails: for readers, else for the prefetch list.

    A reader may ask for what there is not; a list that names it is wrong, and its user must learn
    which blob that is.
    """
    if stats.degraded_reason:
        return stats.degraded_reason, stats.degraded_message
    reason, _, message = stats.prefetch_problem.partition(": ")
    return ("", "") if reason in PREFETCH_LIMITS else (reason, message)


def _prefetch_report(stats: ManagerStats) -> PrefetchReport | None:
    if stats.prefetch_blobs == 0:
        return None
    return PrefetchReport(
        blobs=stats.prefetch_blobs,
        blobs_ready=stats.prefetch_blobs_ready,
        bytes=stats.prefetch_bytes,
        bytes_ready=stats.prefetch_bytes_ready,
        # `Reason: sentence`; the sentence stands in `degraded_message`, if anywhere.
        problem=stats.prefetch_problem.partition(":")[0] or None,
    )
