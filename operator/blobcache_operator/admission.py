"""
Which configs may run at all: the administrator's bounds, oldest config first.

Pure. A config that is refused keeps nothing back from others: what it would have taken is not
counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from blobcache_api.quantity import format_quantity
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
from blobcache_operator.snapshot import ConfigFacts, Failure, Limits

# One namespace must not fill the message every node gets; see STATE_SIZE_BYTES_MAX there.
NAMESPACE_SPEC_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Admitted:
    """A config that may run, with the caps put into its spec."""

    spec: BlobCacheConfigSpec
    spec_bytes: int


@dataclass(slots=True)
class _Namespace:
    """What a namespace has taken so far."""

    configs: int = 0
    capacity: int = 0
    rate: int = 0
    spec_bytes: int = 0


def admit(
    configs: tuple[ConfigFacts, ...], limits: Limits
) -> tuple[Mapping[str, Admitted], Mapping[str, Failure]]:
    """Return by uid what may run and why the rest may not."""
    admitted: dict[str, Admitted] = {}
    refused: dict[str, Failure] = {}
    taken: dict[str, _Namespace] = {}
    for config in sorted(configs, key=age_order):
        outcome = _admit_one(config, taken.setdefault(config.namespace, _Namespace()), limits)
        if isinstance(outcome, Admitted):
            admitted[config.uid] = outcome
        else:
            refused[config.uid] = outcome
    return admitted, refused


def age_order(config: ConfigFacts) -> tuple[str, str, str]:
    """Sort the oldest first; creation times have seconds only, so names break ties."""
    return (config.created, config.namespace, config.name)


def _admit_one(config: ConfigFacts, taken: _Namespace, limits: Limits) -> Admitted | Failure:
    if config.spec is None:
        return Failure("InvalidSpec", f"{config.problem}. Correct these fields and apply it again.")
    if taken.configs >= limits.configs_per_namespace:
        return Failure(
            "TooManyConfigs",
            f"Namespace '{config.namespace}' has its {limits.configs_per_namespace} "
            "BlobCacheConfigs already, and older ones go first. Delete one, or ask the "
            "administrator to raise --configs-per-namespace-max.",
        )
    size = len(config.spec.model_dump_json(exclude_none=True))
    if taken.spec_bytes + size > NAMESPACE_SPEC_BYTES_MAX:
        return Failure(
            "TooManyConfigs",
            f"The specs of namespace '{config.namespace}' would take "
            f"{taken.spec_bytes + size} bytes, more than {NAMESPACE_SPEC_BYTES_MAX}. Shorten "
            "the lists of pinned and prefetched blobs.",
        )
    capacity = _bounded(
        config.spec.cache.capacity, limits.capacity, limits.namespace_capacity, taken.capacity
    )
    rate = _bounded(
        config.spec.backend.bytes_per_second_limit,
        limits.origin_rate,
        limits.namespace_origin_rate,
        taken.rate,
    )
    if isinstance(capacity, _Excess):
        return _refusal("`spec.cache.capacity`", "", capacity, config.namespace)
    if isinstance(rate, _Excess):
        return _refusal("`spec.backend.bytesPerSecondLimit`", "/s", rate, config.namespace)
    taken.configs += 1
    taken.spec_bytes += size
    taken.capacity += capacity or 0
    taken.rate += rate or 0
    return Admitted(_with_caps(config.spec, capacity, rate), size)


@dataclass(frozen=True, slots=True)
class _Excess:
    asked: int | None
    limit: int
    in_namespace: bool


def _bounded(
    asked: int | None, limit: int | None, namespace_limit: int | None, taken: int
) -> int | _Excess | None:
    """Return what the config gets: what it asked, or as much as there is if it asked nothing."""
    left = None if namespace_limit is None else namespace_limit - taken
    if asked is not None:
        if limit is not None and asked > limit:
            return _Excess(asked, limit, in_namespace=False)
        if left is not None and asked > left:
            return _Excess(asked, max(left, 0), in_namespace=True)
        return asked
    if left is not None and left <= 0:
        return _Excess(None, 0, in_namespace=True)
    bounds = [bound for bound in (limit, left) if bound is not None]
    return min(bounds) if bounds else None


def _refusal(field: str, unit: str, excess: _Excess, namespace: str) -> Failure:
    asked = "nothing" if excess.asked is None else f"{format_quantity(excess.asked)}{unit}"
    limit = f"{format_quantity(excess.limit)}{unit}"
    where = (
        f"namespace '{namespace}' has {limit} left per node"
        if excess.in_namespace
        else f"the administrator permits {limit} per node"
    )
    return Failure(
        "CapacityRefused", f"{field} asks for {asked}, but {where}. Ask for less, or for more room."
    )


def _with_caps(
    spec: BlobCacheConfigSpec, capacity: int | None, rate: int | None
) -> BlobCacheConfigSpec:
    if capacity == spec.cache.capacity and rate == spec.backend.bytes_per_second_limit:
        return spec
    cache = spec.cache.model_copy(update={"capacity": capacity})
    backend = spec.backend.model_copy(update={"bytes_per_second_limit": rate})
    return spec.model_copy(update={"cache": cache, "backend": backend})
