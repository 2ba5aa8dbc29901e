"""kill -9 at every step, and how soon a large cache is ready again."""

from __future__ import annotations

import asyncio
import time
from array import array
from pathlib import Path

import pytest
from crc32c import crc32c

from blobcache_storage.cache.chunk_map import encode_header, encode_slots, seal_slot
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from tests.faults import scale
from tests.faults.worker import run_module
from tests.faults.world import Engine, World

pytestmark = [pytest.mark.faults, pytest.mark.timeout(scale.timeout_seconds(400))]

REPETITIONS = scale.scaled(20, least=2)
MANY_BLOBS = 10_000
READY_SECONDS_MAX = 2.0
STEPS = [
    "create data", "create map", "write map", "write data", "sync_data data", "sync_data map",
    "unlink map", "unlink data", "create index", "write index", "sync_data index",
    "rename index", "write owner", "rename owner",
]  # fmt: skip


def test_no_kill_makes_a_wrong_byte() -> None:
    """Nor does any step leave behind what the next start does not cope with."""
    arguments = ["--seed", scale.seed(), "--repetitions", REPETITIONS]
    found = run_module("tests.faults.kills", *arguments, timeout=scale.timeout_seconds(300))
    kills = found.pop("kills")
    problems = found.pop("problems")
    print(f"{sum(kills.values())} kills at {len(kills)} steps: {found}")  # noqa: T201
    assert not problems
    assert found["corrupt"] == 0, "a chunk was recorded before it was written"
    for step in STEPS:
        for moment in ("before", "after"):
            count = kills.get(f"{moment} {step}", 0)
            assert count >= REPETITIONS * 0.7, f"void: {count} kills {moment} {step}"
    assert found["held"] >= sum(kills.values()), "void: too little was there after the kills"


def make_many(path: Path, world: World, size_bytes: int) -> None:
    """Write the files of many small blobs, as an engine leaves them that is killed."""

    async def begin() -> tuple[Engine, float]:
        engine = await Engine.start(world, str(path))
        await engine.read(next(iter(world.blobs)))
        await engine.stop()
        return engine, engine.runtime.clock.time()

    engine, now = asyncio.run(begin())
    folder = path / "v1" / engine.folder.name
    for number in range(MANY_BLOBS):
        blob_id = f"many-{number}"
        world.add(blob_id, size_bytes)
        version = world.backend._objects[blob_id].version
        entry = engine.folder.new_entry(blob_id, version, 16 * 1024, now=now)
        data = world.oracle.blob(blob_id, 1, size_bytes)
        slots = engine_slots(entry.generation, data)
        (folder / f"{entry.stem}.data").write_bytes(data)
        header = encode_header(engine.folder.header_of(entry))
        (folder / f"{entry.stem}.map").write_bytes(header + slots)


def engine_slots(generation: int, data: bytes) -> bytes:
    """Return the slots of a blob of one chunk."""
    return encode_slots(array("Q", [seal_slot(generation, 0, crc32c(data))]))


@pytest.mark.parametrize("indexed", [False, True], ids=["no index", "index"])
def test_a_large_cache_is_ready_at_once(tmp_path: Path, indexed: bool) -> None:
    """10,000 blobs: under 2 s of this process's time, with or without the advisory index."""
    path, world = tmp_path / "cache", World(scale.seed(), 2)
    make_many(path, world, 900)

    async def start() -> tuple[float, float, int]:
        wall, cpu = time.monotonic(), time.process_time()
        engine = await Engine.start(world, str(path))
        await engine.read("many-77")
        spent = time.monotonic() - wall, time.process_time() - cpu
        held = len(engine.manager.usage())
        assert not engine.backend.fetches, "a blob that was there was fetched"
        assert not world.checker.wrong
        await engine.stop()
        return *spent, held

    index = path / "v1" / "index.json"
    if indexed:
        asyncio.run(start())
    else:
        index.unlink()
    wall, cpu, held = asyncio.run(start())
    print(f"{held} blobs, index {indexed}: {wall:.2f} s, of this process {cpu:.2f} s")  # noqa: T201
    assert held >= MANY_BLOBS
    # Not the wall's time: other tests share the machine.
    assert cpu < READY_SECONDS_MAX


def test_two_processes_never_share_a_root(tmp_path: Path) -> None:
    """The lock goes with its process, however that ended, and not before."""

    async def both() -> None:
        first, second = StorageRuntime(), StorageRuntime()
        root = CacheRoot.open(str(tmp_path / "cache"), first)
        with pytest.raises(Exception, match="another process"):
            CacheRoot.open(str(tmp_path / "cache"), second)
        root.close()
        CacheRoot.open(str(tmp_path / "cache"), second).close()
        await first.close()
        await second.close()

    asyncio.run(both())
