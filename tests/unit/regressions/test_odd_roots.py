"""Cache roots in which something else lies where a file of ours should."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.unit.cache.rig import CHUNK, Rig

from blobcache_storage.cache.base import CacheStatus


async def test_a_pipe_in_place_of_the_index_does_not_hold_up_the_start(tmp_path: Path) -> None:
    """Opening a pipe waits for its other end, for ever."""
    rig = await Rig(tmp_path / "root").start()
    data = rig.put("a", 3 * CHUNK)
    await rig.read("a")
    await rig.stop()
    index = rig.directory / "v1" / "index.json"
    index.unlink()
    os.mkfifo(index)
    async with asyncio.timeout(20):
        await rig.start()
    assert await rig.read("a") == (data, CacheStatus.HIT)
    await rig.stop()
    assert index.is_file()
