"""The N-th call on the disk fails, once or from then on, for every N until none is left to fail."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from pathlib import Path

import pytest

from blobcache_storage.cache import flush
from blobcache_storage.errors import ConfigError
from blobcache_storage.testing.faulty_disk import SHORT_WRITE, DiskCall, FaultyDisk
from tests.faults import scale
from tests.faults.world import Engine, World

pytestmark = [pytest.mark.faults, pytest.mark.timeout(scale.timeout_seconds(300))]

BLOBS = 5
CHUNKS_MAX = 3
SCENARIO_SECONDS_MAX = 20.0
"""A scenario takes some 30 ms; one that takes this long hangs."""
CALLS_MIN = {errno.ENOSPC: 25, errno.EDQUOT: 25, errno.EMFILE: 15, SHORT_WRITE: 10}
"""Fewer calls that could fail make a run void; 50 for errors that any call can meet."""
STORING = {"data", "map"}
NAMES = {SHORT_WRITE: "short write"} | {
    number: errno.errorcode[number]
    for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EINTR)
}


class JumpingClock:
    """The machine's clock, which a test can move on."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def time(self) -> float:
        """Return unix seconds."""
        return time.time() + self.ahead_seconds

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic() + self.ahead_seconds


class Scenario:
    """Fill, evict, restart, read back; then the disk is well again and all must be as before."""

    def __init__(self, world: World, path: str, disk: FaultyDisk) -> None:
        self.world = world
        self.path = path
        self.disk = disk
        self.clock = JumpingClock()
        self.refused = 0
        """How often the cache could not start, and said so."""
        self.unreported: list[str] = []

    async def _start(self) -> Engine | None:
        try:
            return await Engine.start(self.world, self.path, disk=self.disk, clock=self.clock)
        except ConfigError:
            assert self.disk.failed, "a well disk was refused"
            self.refused += 1
            return None

    async def run(self) -> None:
        """Run it all."""
        for _ in range(2):
            engine = await self._start()
            if engine is not None:
                try:
                    await self._use(engine)
                finally:
                    await engine.stop()
        self.disk.heal()
        await self._recover()

    async def _use(self, engine: Engine) -> None:
        world, failed = self.world, len(self.disk.failed)
        await asyncio.gather(*(engine.read(blob_id) for blob_id in world.blobs))
        await settle(engine)
        await engine.evict(["blob-0"])
        await asyncio.gather(*(engine.read(blob_id) for blob_id in world.blobs))
        await settle(engine)
        writes = [call for call in self.disk.failed[failed:] if is_of_storing(call)]
        if writes and self.disk.error != SHORT_WRITE:
            reason = engine.manager.stats().degraded_reason
            if reason not in {"DiskFull", "DiskError"}:
                self.unreported.append(f"{writes[0]}: degraded_reason is '{reason}'")

    async def _recover(self) -> None:
        engine = await self._start()
        assert engine is not None, "the cache does not start though the disk is well"
        await asyncio.gather(*(engine.read(blob_id) for blob_id in self.world.blobs))
        await engine.stop()
        engine = await self._start()
        assert engine is not None
        try:
            await asyncio.gather(*(engine.read(blob_id) for blob_id in self.world.blobs))
            assert not engine.backend.fetches, "what was filled after the failure is not there"
            assert not engine.manager.stats().degraded_reason
        finally:
            await engine.stop()


def is_of_storing(call: DiskCall) -> bool:
    """Whether a failed call kept a chunk from being stored."""
    return call.kind in STORING and call.operation in {"create", "write", "sync_data"}


async def settle(engine: Engine) -> None:
    """Return when all that was fetched is recorded, or was dropped."""
    for generation in engine.manager.table.open_generations():
        await generation.writer.drain()


def run_scenario(path: Path, disk: FaultyDisk, name: str) -> Scenario:
    """Run one scenario and check what must always hold."""
    world = World(scale.seed(), BLOBS, CHUNKS_MAX)
    scenario = Scenario(world, f"{path}/cache", disk)

    async def bounded() -> None:
        await asyncio.wait_for(scenario.run(), SCENARIO_SECONDS_MAX)

    asyncio.run(bounded())
    where = f"{name}, after {[str(call) for call in disk.failed[:3]]}"
    assert not world.checker.wrong, f"{where}: {world.checker.wrong}"
    assert not world.checker.failed, f"{where}: readers noticed: {world.checker.failed}"
    assert not scenario.unreported, f"{where}: {scenario.unreported}"
    return scenario


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("error", NAMES, ids=NAMES.get)
def test_any_call_may_fail(
    error: int, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No crash, no wrong byte, no failed reader; the problem is told, and passes by itself."""
    monkeypatch.setattr(flush, "SYNC_AFTER_SECONDS", 0.005)
    nth, calls, problems = 0, Counter[str](), []
    while True:
        nth += 1
        disk = FaultyDisk(error, nth, lasting=lasting)
        folder = tmp_path / str(nth)
        folder.mkdir()
        name = f"{NAMES[error]} {'from ' if lasting else 'at '}{nth}"
        try:
            run_scenario(folder, disk, name)
        except (AssertionError, TimeoutError) as problem:
            problems.append(f"{name}: {[str(c) for c in disk.failed[:2]]}: {problem!r}"[:600])
        if not disk.failed:
            break
        calls[f"{disk.failed[0].operation} {disk.failed[0].kind}"] += 1
    print(f"{NAMES[error]}: {nth - 1} calls failed, {dict(calls)}")  # noqa: T201
    assert not problems, f"{len(problems)} of {nth}:\n" + "\n".join(problems[:12])
    assert nth > CALLS_MIN.get(error, 50), "void: too few calls could fail"
