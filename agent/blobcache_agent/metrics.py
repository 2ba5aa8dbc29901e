"""The agent's metrics, on a registry of their own.

Figures of configurations come from the managers at the moment of the scrape, the same that
reports show: a status in the cluster is the sum of these over its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blobcache_agent import __version__
from blobcache_agent.configs import Running
from blobcache_agent.report import Figures
from blobcache_storage.cache.base import ManagerStats

PREFIX = "blobcache_agent_"
_LABELS = ("namespace", "name")


@dataclass(frozen=True, slots=True)
class _Figure:
    """A metric of each configuration."""

    name: str
    help: str
    value: Callable[[ManagerStats], int]
    is_counter: bool = True


_FIGURES = (
    _Figure("requests", "Reads by readers.", lambda stats: stats.requests),
    _Figure("hit_bytes", "Bytes served from the cache.", lambda stats: stats.hit_bytes),
    _Figure("miss_bytes", "Bytes served that were fetched.", lambda stats: stats.miss_bytes),
    _Figure(
        "origin_bytes",
        "Bytes fetched from the origin, prefetch included.",
        lambda stats: stats.origin_bytes,
    ),
    _Figure("origin_requests", "Requests to the origin.", lambda stats: stats.origin_requests),
    _Figure("origin_errors", "Failed requests to the origin.", lambda stats: stats.origin_errors),
    _Figure("evicted_bytes", "Bytes evicted.", lambda stats: stats.evicted_bytes),
    _Figure("evicted_blobs", "Blobs evicted.", lambda stats: stats.evicted_blobs),
    _Figure("cached_bytes", "Bytes on disk.", lambda stats: stats.bytes, is_counter=False),
    _Figure(
        "cached_blobs",
        "Blobs of which something is on disk.",
        lambda stats: stats.blobs,
        is_counter=False,
    ),
    _Figure(
        "prefetch_bytes",
        "Bytes of the prefetch list, as far as sizes are known.",
        lambda stats: stats.prefetch_bytes,
        is_counter=False,
    ),
    _Figure(
        "prefetch_ready_bytes",
        "Bytes of the prefetch list that are on disk.",
        lambda stats: stats.prefetch_bytes_ready,
        is_counter=False,
    ),
)


class AgentCollector(Collector):
    """Yields the figures of configurations and of the disk at each scrape.

    Args:
        figures: Where they come from.
        state_revision: Returns epoch and revision of the state in force.
    """

    def __init__(self, figures: Figures, state_revision: Callable[[], tuple[int, int]]) -> None:
        self._figures = figures
        self._state_revision = state_revision

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: the registry need not know the names before the first scrape."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        running = list(self._figures.running())
        for figure in _FIGURES:
            kind = CounterMetricFamily if figure.is_counter else GaugeMetricFamily
            family = kind(f"{PREFIX}config_{figure.name}", figure.help, labels=_LABELS)
            for item, stats in running:
                family.add_metric((item.namespace, item.name), figure.value(stats))
            yield family
        yield self._applied(item for item, _ in running)
        yield from self._node()

    @staticmethod
    def _applied(running: Iterator[Running]) -> Metric:
        family = GaugeMetricFamily(
            f"{PREFIX}config_applied", "1 if the configuration is served, else 0.", labels=_LABELS
        )
        for item in running:
            family.add_metric((item.namespace, item.name), int(item.config is not None))
        return family

    def _node(self) -> Iterator[Metric]:
        disk = self._figures.disk()
        epoch, revision = self._state_revision()
        gauges = {
            "cache_used_bytes": ("Bytes the cache takes on disk.", disk.used_bytes),
            "cache_min_free_bytes": ("Free space that is left to others.", disk.min_free_bytes),
            "cache_orphan_bytes": (
                "Bytes of configurations that are gone.",
                self._figures.orphan_bytes(),
            ),
            "filesystem_free_bytes": ("Free space of the file system.", disk.available_bytes),
            "filesystem_size_bytes": ("Size of the file system.", disk.total_bytes),
            "state_epoch": ("Epoch of the operator's state in force; 0 without.", epoch),
            "state_revision": ("Revision of the state in force.", revision),
        }
        if disk.capacity_bytes is not None:
            gauges["cache_capacity_bytes"] = ("What the cache may take.", disk.capacity_bytes)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        info = GaugeMetricFamily(f"{PREFIX}build_info", "Always 1.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info


def create_registry() -> CollectorRegistry:
    """Return a registry with the process's own figures."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
