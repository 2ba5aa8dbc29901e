"""Ten minutes of reading under every origin fault: BLOBCACHE_SOAK_MINUTES says for how long."""

from __future__ import annotations

import os

import pytest

from tests.faults import scale
from tests.faults.worker import run_module

MINUTES = float(os.environ.get("BLOBCACHE_SOAK_MINUTES", "10"))
MIB = 1024 * 1024
GROWTH_BYTES_MAX = 2 * MIB
DESCRIPTORS_GROWTH_MAX = 16
"""Connections that are open at the moment of the look."""
THREADS_MAX = 32
"""The loop, 8 that write, 8 that read, 2 that hash, and what aiohttp and the loop keep."""
PER_MINUTE_MIN = {"hits": 200, "fills": 40, "faults": 15, "evicted_blobs": 10}
BYTES_CHECKED_PER_MINUTE_MIN = 50 * MIB

pytestmark = [pytest.mark.faults, pytest.mark.timeout(int(MINUTES * 60) + 300)]


def test_ten_minutes_of_faults() -> None:
    """Every byte right, nothing leaked, and memory, descriptors and threads as at half time."""
    arguments = ["--minutes", MINUTES, "--seed", scale.seed()]
    found = run_module("tests.faults.soak", *arguments, timeout=MINUTES * 60 + 240)
    print(found)  # noqa: T201
    assert not found["wrong"]
    assert not found["leaks"]
    counts = {**found["counts"], **found}
    for what, least in PER_MINUTE_MIN.items():
        assert counts[what] >= least * MINUTES, f"void: too few {what}"
    assert counts["bytes checked"] >= BYTES_CHECKED_PER_MINUTE_MIN * MINUTES, "void"
    assert found["rss_bytes_end"] <= found["rss_bytes_half"] + GROWTH_BYTES_MAX
    assert found["descriptors_end"] <= found["descriptors_half"] + DESCRIPTORS_GROWTH_MAX
    assert found["threads_max"] <= THREADS_MAX
