"""Every parser of what others wrote: no crash, time and memory in proportion to the input."""

from __future__ import annotations

import os

import pytest

from tests.faults import scale
from tests.faults.worker import run_module

GATE_SECONDS = 10.0
"""Each; BLOBCACHE_FUZZ_SECONDS says otherwise, and `make faults N=…` grows it."""
PARSERS = [
    "range", "challenge", "origin-head", "map", "index", "state-file", "state", "nydus", "token",
    "jwks", "token-answer", "head",
]  # fmt: skip
EXAMPLES_PER_SECOND_MIN = 10
GROWN_MIB_MAX = 128


def seconds() -> float:
    """Return how long each parser is fuzzed."""
    told = os.environ.get("BLOBCACHE_FUZZ_SECONDS")
    return float(told) if told else GATE_SECONDS * scale.cuts() / scale.GATE_CUTS


pytestmark = [pytest.mark.faults, pytest.mark.timeout(300 + 3 * seconds())]


@pytest.mark.parametrize("parser", PARSERS)
def test_fuzz(parser: str) -> None:
    """Only refusals of its own, each example in bounded time, and no memory kept."""
    arguments = [parser, "--seconds", seconds(), "--seed", scale.seed()]
    found = run_module("tests.faults.fuzz", *arguments, timeout=240 + 2 * seconds())
    print(f"{parser}: {found}")  # noqa: T201
    assert found["examples"] >= EXAMPLES_PER_SECOND_MIN * seconds(), "void: too few examples"
    assert found["accepted"] >= 1, "void: not even the valid ones were accepted"
    assert found["grown_mib"] < GROWN_MIB_MAX
