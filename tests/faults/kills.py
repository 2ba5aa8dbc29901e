"""Kills at named steps, by a fork server: `python -m tests.faults.kills --help`.

The engine is imported once; each run is a fork that kills itself before, in the middle of, or
after the N-th call of one kind on the disk. Another fork then starts on what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from typing_extensions import override

from blobcache_storage.cache import flush
from blobcache_storage.cache.chunk_map import SLOT_SIZE_BYTES
from blobcache_storage.testing.faulty_disk import MUTATING, DiskCall, WatchedDisk
from tests.faults.loop_volume import die_with_parent
from tests.faults.world import Engine, World, chunks_fetched

BLOBS = 8
CHUNKS_MAX = 3
SYNC_AFTER_SECONDS = 0.003
CHILD_SECONDS_MAX = 30
MOMENTS = ("before", "amid", "after")
_Buffers = Sequence[bytes | bytearray | memoryview]


class KillDisk(WatchedDisk):
    """A disk that kills the process at a step, and else counts steps.

    Args:
        step: "<operation> <kind>", or "" for none.
        moment: One of MOMENTS.
        nth: Which of the step's calls, from 1.
    """

    def __init__(self, step: str = "", moment: str = "before", nth: int = 1) -> None:
        super().__init__()
        self._step = step
        self._moment = moment
        self._nth = nth
        self.steps: Counter[str] = Counter()

    def _is_due(self, call: DiskCall, moment: str) -> bool:
        step = f"{call.operation} {call.kind}"
        return (step, moment) == (self._step, self._moment) and self.steps[step] == self._nth

    @override
    def before(self, call: DiskCall, buffers: _Buffers) -> int:
        if call.operation not in MUTATING:
            return -1
        with self.guard:
            self.steps[f"{call.operation} {call.kind}"] += 1
            if self._is_due(call, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            if call.operation == "write" and self._is_due(call, "amid"):
                # A slot is never torn: 8 aligned bytes are copied as one.
                half = call.length // 2 // SLOT_SIZE_BYTES * SLOT_SIZE_BYTES
                os.pwrite(call.fd, b"".join(buffers)[:half], call.offset)
                os.kill(os.getpid(), signal.SIGKILL)
        return -1

    @override
    def after(self, call: DiskCall, buffers: _Buffers) -> None:
        with self.guard:
            if self._is_due(call, "after"):
                os.kill(os.getpid(), signal.SIGKILL)


async def use(path: str, seed: int, disk: KillDisk) -> dict[str, Any]:
    """Fill, commit, evict, fill again, end: what the kill interrupts."""
    world, rng = World(scale_free_seed(seed), BLOBS, CHUNKS_MAX), random.Random(seed)
    engine = await Engine.start(world, path, disk=disk)
    blob_ids = sorted(world.blobs)
    rng.shuffle(blob_ids)
    await asyncio.gather(*(engine.read(blob_id) for blob_id in blob_ids[:5]))
    for generation in engine.manager.table.open_generations():
        await generation.writer.drain()
    await engine.evict(blob_ids[:2])
    await engine.root.write_index()
    await asyncio.gather(*(engine.read(blob_id) for blob_id in blob_ids[2:]))
    await engine.stop()
    assert not world.checker.wrong
    return {"steps": dict(disk.steps)}


def scale_free_seed(seed: int) -> int:
    """Return the seed of the blobs: the same for all runs of a seed and its repetitions."""
    return seed // 1000


async def restart(path: str, seed: int) -> dict[str, Any]:
    """Start on what was left and read all of it back."""
    world = World(scale_free_seed(seed), BLOBS, CHUNKS_MAX)
    begun = time.monotonic()
    engine = await Engine.start(world, path)
    ready = time.monotonic() - begun
    held = len(engine.manager.usage())
    await asyncio.gather(*(engine.read(blob_id) for blob_id in world.blobs))
    fetched = sum(map(len, chunks_fetched(engine.backend.fetches, world).values()))
    corrupt = engine.corrupt_chunks
    await engine.stop()
    left = [name for _, _, names in os.walk(path) for name in names if name.endswith(".tmp")]
    return {
        "wrong": world.checker.wrong,
        "failed": world.checker.failed,
        "bytes": world.checker.bytes_checked,
        "ready": ready,
        "held": held,
        "fetched": fetched,
        "corrupt": corrupt,
        "left": left,
    }


def fork(work: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any] | None:
    """Run work in a fork and return its answer; None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            signal.alarm(CHILD_SECONDS_MAX)
            os.close(reader)
            answer = asyncio.run(work())
            os.write(writer, json.dumps(answer).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, f"a child ended with status {status}"
    found = json.loads(answer)
    assert isinstance(found, dict)
    return found


def run(seed: int, repetitions: int, folder: str) -> dict[str, Any]:
    """Kill at every step, so many times each, and return what was seen."""
    dry = fork(lambda: use(f"{folder}/dry", seed * 1000, KillDisk()))
    assert dry is not None
    steps: dict[str, int] = dry["steps"]
    tally: Counter[str] = Counter()
    kills: Counter[str] = Counter()
    problems: list[str] = []
    for step, calls in sorted(steps.items()):
        moments = MOMENTS if step.startswith("write ") else ("before", "after")
        for moment in moments:
            for number in range(repetitions):
                run_seed = seed * 1000 + number
                nth = 1 + random.Random(f"{step}/{moment}/{number}").randrange(calls)
                path = f"{folder}/run"
                disk = KillDisk(step, moment, nth)
                killed = fork(lambda p=path, s=run_seed, d=disk: use(p, s, d)) is None  # type: ignore[misc]
                kills[f"{moment} {step}"] += killed
                found = fork(lambda p=path, s=run_seed: restart(p, s))  # type: ignore[misc]
                assert found is not None
                for what in ("wrong", "failed", "left"):
                    problems += [f"{moment} {step} #{nth}, seed {run_seed}: {what}: {one}"
                                 for one in found[what]]  # fmt: skip
                for what in ("bytes", "held", "fetched", "corrupt"):
                    tally[what] += found[what]
                tally["ready_ms_max"] = max(tally["ready_ms_max"], int(found["ready"] * 1000))
                shutil.rmtree(path, ignore_errors=True)
    return {"kills": dict(kills), "problems": problems, **tally}


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Kills a cache at every step of its work.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    die_with_parent()
    logging.disable()
    flush.SYNC_AFTER_SECONDS = SYNC_AFTER_SECONDS
    with tempfile.TemporaryDirectory(prefix="blobcache-kills-", dir=fast_folder()) as folder:
        found = run(arguments.seed, arguments.repetitions, folder)
    sys.stdout.write(json.dumps(found) + "\n")


def fast_folder() -> str | None:
    """Return a folder in memory, where there is one: a kill loses nothing that was written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    main()
