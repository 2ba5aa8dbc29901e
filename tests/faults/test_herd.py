"""A thousand pods start at once and read the same cold blob."""

from __future__ import annotations

import pytest

from tests.faults import scale
from tests.faults.worker import run_module

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

READERS = 1000
MIB = 1024 * 1024
SIZE_MIB = 1024
ORIGIN_RATIO_MAX = 1.02
MARGIN_BYTES = 64 * MIB
"""Tasks of a thousand readers, threads' stacks, and what the allocator keeps."""


def test_the_origin_sends_a_cold_blob_once() -> None:
    """However many read it; and what is on its way stays within the buffer pool."""
    arguments = ["--seed", scale.seed(), "--readers", READERS, "--mib", SIZE_MIB]
    found = run_module("tests.faults.herd", *arguments, timeout=500)
    print(found)  # noqa: T201
    assert not found["wrong"]
    assert found["readers done"] == READERS
    assert found["origin_bytes"] <= SIZE_MIB * MIB * ORIGIN_RATIO_MAX
    assert found["grown_bytes"] <= found["pool_bytes"] + MARGIN_BYTES
    assert found["samples"] >= READERS * 64, "void: too little was checked"
    served = found["bytes from files"] + found["bytes from memory"]
    assert served == READERS * SIZE_MIB * MIB
