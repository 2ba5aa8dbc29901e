"""Reads through FileCacheMgr, end to end over a backend in memory."""

from __future__ import annotations

import asyncio

import pytest

from blobcache_storage.cache.base import CacheStatus
from blobcache_storage.device import RangeRequest
from tests.unit.cache.rig import CHUNK, Rig


async def test_miss_then_hit_reads_the_same_bytes_once_from_the_origin(rig: Rig) -> None:
    """The second read asks the origin for nothing."""
    data = rig.put("a", 10 * CHUNK + 17)
    assert await rig.read("a") == (data, CacheStatus.MISS_STORED)
    assert await rig.read("a") == (data, CacheStatus.HIT)
    assert rig.backend.bytes_sent == len(data)
