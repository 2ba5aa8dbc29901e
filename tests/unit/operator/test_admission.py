"""Which configs may run at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.makers import GIB, config

from blobcache_operator.admission import admit
from blobcache_operator.snapshot import Limits


def _outcome(*configs: Any, **limits: Any) -> dict[str, str]:
    admitted, refused = admit(tuple(configs), Limits(**limits))
    found = {uid: failure.reason for uid, failure in refused.items()}
    return {**found, **dict.fromkeys(admitted, "admitted")}


def test_the_oldest_of_a_namespace_are_admitted() -> None:
    """Age decides, then the name; other namespaces are not affected."""
    configs = [config("b", age=1), config("a", age=1), config("old", age=5)]
    other = config("x", namespace="other")
    assert _outcome(*configs, other, configs_per_namespace=2) == {
        "uid-demo-old": "admitted",
        "uid-demo-a": "admitted",
        "uid-demo-b": "TooManyConfigs",
        "uid-other-x": "admitted",
    }


def test_a_refused_config_takes_no_ones_place() -> None:
    """What is refused for its size does not count towards the number."""
    configs = [
        config("huge", age=3, cache={"capacity": "20Gi"}),
        config("small", age=2, cache={"capacity": "5Gi"}),
    ]
    assert _outcome(*configs, configs_per_namespace=1, capacity=10 * GIB) == {
        "uid-demo-huge": "CapacityRefused",
        "uid-demo-small": "admitted",
    }


@pytest.mark.parametrize(
    ("asked", "cap", "namespace_cap", "effective"),
    [
        (None, None, None, None),
        (3, None, None, 3),
        (None, 5, None, 5),
        (3, 5, None, 3),
        (6, 5, None, "refused"),
        (None, None, 7, 7),
        (None, 5, 7, 5),
        (8, None, 7, "refused"),
        (None, None, 0, "refused"),
    ],
)
def test_capacity_is_bounded_by_config_and_namespace(
    asked: int | None, cap: int | None, namespace_cap: int | None, effective: int | str | None
) -> None:
    """Asking too much is refused; asking nothing gets what there is."""
    cache = {} if asked is None else {"cache": {"capacity": asked * GIB}}
    limits = Limits(
        capacity=None if cap is None else cap * GIB,
        namespace_capacity=None if namespace_cap is None else namespace_cap * GIB,
    )
    one = config("a", **cache)
    admitted, refused = admit((one,), limits)
    if effective == "refused":
        assert refused[one.uid].reason == "CapacityRefused"
    else:
        expected = None if effective is None else int(effective) * GIB
        assert admitted[one.uid].spec.cache.capacity == expected


def test_a_namespace_shares_its_capacity_oldest_first() -> None:
    """The younger gets what is left, or is refused with that number."""
    old = config("old", age=2, cache={"capacity": "6Gi"})
    greedy = config("greedy", age=1, cache={"capacity": "6Gi"})
    modest = config("modest")
    limits = Limits(namespace_capacity=10 * GIB)
    admitted, refused = admit((modest, greedy, old), limits)
    assert "4Gi" in refused[greedy.uid].message
    assert admitted[modest.uid].spec.cache.capacity == 4 * GIB


def test_origin_rates_are_bounded_likewise() -> None:
    """Bytes per second have caps of their own."""
    fast = config(
        "fast",
        backend={
            "type": "HTTPProxy",
            "httpProxy": {"address": "http://o.example.com"},
            "bytesPerSecondLimit": "100Mi",
        },
    )
    admitted, refused = admit((fast, config("plain")), Limits(origin_rate=50 * 1024**2))
    assert "100Mi/s" in refused[fast.uid].message
    assert admitted["uid-demo-plain"].spec.backend.bytes_per_second_limit == 50 * 1024**2


def test_an_unreadable_spec_is_refused_with_its_faults() -> None:
    """A config this version cannot read is told what is wrong and counts for nothing."""
    broken = replace(config("broken", age=9), spec=None, problem="`spec.backend`: is missing")
    _, refused = admit((broken, config("fine")), Limits(configs_per_namespace=1))
    assert refused[broken.uid].reason == "InvalidSpec"
    assert "`spec.backend`: is missing" in refused[broken.uid].message
    assert list(refused) == [broken.uid]


def test_one_namespace_cannot_fill_every_nodes_message() -> None:
    """Long lists are bounded in bytes, so that others' configs still fit."""
    listed = [f"{number}{'x' * 1000}" for number in range(1000)]
    configs = [config(f"c{index}", eviction={"pinned": listed}) for index in range(6)]
    outcomes = _outcome(*configs)
    assert list(outcomes.values()).count("admitted") == 4
    assert set(outcomes.values()) == {"admitted", "TooManyConfigs"}
