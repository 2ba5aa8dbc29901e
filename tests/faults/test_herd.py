"""A thousand pods start at once and read the same cold blob."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import scale
from tests.faults.worker import run_module

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

READERS = 1000
MIB = 1024 * 1024
ORIGIN_RATIO_MAX = 1.02
MARGIN_BYTES = 128 * MIB
"""Tasks of a thousand readers, a slice of 64 KiB each, a piece from the origin per fetch, threads'
stacks, and what the allocator keeps: that is not in the pool."""


def loose(whole: int, size_mib: int, chunk_kib: int) -> dict[str, Any]:
    """Let the herd loose and check what must hold for any."""
    arguments = ["--seed", scale.seed(), "--readers", READERS, "--whole", whole]
    arguments += ["--mib", size_mib, "--chunk-kib", chunk_kib]
    found = run_module("tests.faults.herd", *arguments, timeout=500)
    print(found)  # noqa: T201
    assert not found["wrong"]
    assert found["readers done"] == READERS
    assert found["origin_bytes"] <= size_mib * MIB * ORIGIN_RATIO_MAX
    assert found["samples"] >= READERS * 8, "void: too little was checked"
    served = found.get("bytes from files", 0) + found.get("bytes from memory", 0)
    assert served == found["bytes asked for"]
    return found


def test_the_origin_sends_a_cold_blob_once() -> None:
    """However many read it; and what is on its way stays within the buffer pool."""
    found = loose(whole=30, size_mib=1024, chunk_kib=64)
    assert found["grown_bytes"] <= found["pool_bytes"] + MARGIN_BYTES


def test_large_chunks_stay_within_the_pool() -> None:
    """However many readers are handed a chunk, it is in memory once."""
    found = loose(whole=READERS, size_mib=32, chunk_kib=1024)
    assert found["grown_bytes"] <= found["pool_bytes"] + MARGIN_BYTES
