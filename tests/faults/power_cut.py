"""One run of power cuts, in a process of its own: `python -m tests.faults.power_cut --help`.

An episode begins with a fresh file system and lasts so many cuts. In between runs the real engine:
it starts, all that should be there is read back, some blobs are evicted, others read, and at the
N-th change of the disk some dirty pages are forced out, as the kernel may do at any time, and the
power goes. What follows in that session, and in the next, is checked byte by byte.

The seed of an episode decides its blobs, its requests, where it is cut and what is forced out;
threads may still meet in another order, so a replay repeats a run in kind, not in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from blobcache_storage.cache import flush
from blobcache_storage.cache.chunk_map import HEADER_SIZE_BYTES, SLOT_SIZE_BYTES, decode_header
from blobcache_storage.testing.faulty_disk import MUTATING, DiskCall, WatchedDisk
from tests.faults.loop_volume import LoopVolume, enter_private_namespace
from tests.faults.mutants import MUTATIONS
from tests.faults.world import Engine, World, chunks_fetched

CUTS_PER_EPISODE = 50
BLOBS = 160
BLOBS_KEPT = 20
CHANGES_MAX = 60
"""Upper bound of the number of changes a session makes before it is cut."""
FORCED = [(0, 0), (1, 0), (0, 1), (0.5, 0.5), (1, 1), (1, 1)]
"""Odds that pages of a data file, and of a map, are written out before a cut."""
AT_SYNC_FORCED = [(0, 1), (0.5, 1), (0.8, 0.8), (1, 1)]
AT_SYNC_ODDS = 0.4
"""How often the cut waits for a sync of data, for there the order of writing tells."""
SYNC_AFTER_SECONDS = 0.004
"""In place of the engine's half second: a session lasts some 50 ms."""
PAGE_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4
_Buffers = Sequence[bytes | bytearray | memoryview]


@dataclass(slots=True)
class Ledger:
    """What must have survived: chunks by the stem of their files."""

    blob_ids: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, set[int]] = field(default_factory=dict)
    """Synced by the engine and entered in the map."""
    durable: dict[str, set[int]] = field(default_factory=dict)
    """The map was synced after that, too."""

    def forget(self, stem: str) -> None:
        """Expect nothing of a blob any more."""
        self.recorded.pop(stem, None)
        self.durable.pop(stem, None)


@dataclass(slots=True)
class Tally:
    """What happened; sums over episodes."""

    cuts: int = 0
    cuts_by_call: Counter[str] = field(default_factory=Counter)
    forced: Counter[str] = field(default_factory=Counter)
    fills: int = 0
    evictions: int = 0
    reads: int = 0
    bytes_checked: int = 0
    bytes_from_files: int = 0
    failed_after_cut: list[str] = field(default_factory=list)
    failed_before_cut: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    mismatches: int = 0
    recorded: int = 0
    recorded_hits: int = 0
    durable: int = 0
    durable_hits: int = 0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add another run's."""
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))


class CutDisk(WatchedDisk):
    """A disk whose power goes at the N-th change, after some dirty pages were written out."""

    def __init__(self, volume: LoopVolume, ledger: Ledger, tally: Tally) -> None:
        super().__init__()
        self._volume = volume
        self._ledger = ledger
        self._tally = tally
        self._rng = random.Random()
        self._changes_left = 0
        self._at_sync = False
        self.is_cut = False

    def arm(self, changes: int, rng: random.Random) -> None:
        """Cut at so many changes from now, or often at the first sync of data after them."""
        with self.guard:
            self._rng, self._changes_left = rng, changes
            self._at_sync = rng.random() < AT_SYNC_ODDS

    def cut(self, where: str) -> None:
        """Cut now."""
        with self.guard:
            if self.is_cut:
                return
            self._force_out()
            self._volume.cut_power()
            self.is_cut = True
        self._tally.cuts += 1
        self._tally.cuts_by_call[where] += 1

    @override
    def before(self, call: DiskCall, buffers: _Buffers) -> int:
        if call.operation not in MUTATING:
            return -1
        with self.guard:
            if call.operation == "unlink" and call.kind == "map":
                self._ledger.forget(call.name.removesuffix(".map"))
            if call.operation == "write" and call.kind == "map" and call.offset == 0:
                header = decode_header(b"".join(buffers))
                assert header is not None
                self._ledger.blob_ids[call.name.removesuffix(".map")] = header.blob_id
            if self._changes_left == 0:
                return -1
            self._changes_left = max(1, self._changes_left - 1)
            awaits_sync = self._at_sync and (call.operation, call.kind) != ("sync_data", "data")
            if self._changes_left > 1 or awaits_sync:
                return -1
            self._changes_left = 0
            if call.operation == "write" and self._rng.random() < 0.5:
                # Torn: a part of it was in the page cache when the power went.
                # No slot is ever torn, for 8 aligned bytes reach memory and medium as one.
                taken = self._rng.randint(0, call.length) // SLOT_SIZE_BYTES * SLOT_SIZE_BYTES
                torn = b"".join(buffers)[:taken]
                with contextlib.suppress(OSError):
                    os.pwrite(call.fd, torn, call.offset)
            self.cut(f"{call.operation} {call.kind}")
        return -1

    @override
    def put(self, fd: int, buffers: _Buffers, offset: int) -> int:
        """Write page by page: the kernel writes out what was written at once only at once."""
        data = b"".join(buffers)
        for start in range(0, len(data), PAGE_BYTES):
            os.pwrite(fd, data[start : start + PAGE_BYTES], offset + start)
        return len(data)

    @override
    def after(self, call: DiskCall, buffers: _Buffers) -> None:
        stem, _, suffix = call.name.rpartition(".")
        if suffix != "map":
            return
        with self.guard:
            if self.is_cut:
                return
            ledger = self._ledger
            if call.operation == "sync_data":
                ledger.durable[stem] = set(ledger.recorded.get(stem, ()))
            elif call.operation == "write" and call.offset >= HEADER_SIZE_BYTES:
                self._note_slots(stem, call.offset, b"".join(buffers))

    def _note_slots(self, stem: str, offset: int, body: bytes) -> None:
        recorded = self._ledger.recorded.setdefault(stem, set())
        first = (offset - HEADER_SIZE_BYTES) // SLOT_SIZE_BYTES
        for number in range(len(body) // SLOT_SIZE_BYTES):
            slot = body[number * SLOT_SIZE_BYTES : (number + 1) * SLOT_SIZE_BYTES]
            if any(slot):
                recorded.add(first + number)
            else:
                recorded.discard(first + number)
                self._ledger.durable.get(stem, set()).discard(first + number)

    def _force_out(self) -> None:
        """Write out dirty pages of open files, as the kernel's writeback might just have done."""
        data_odds, map_odds = self._rng.choice(AT_SYNC_FORCED if self._at_sync else FORCED)
        for fd, name in list(self.open_files.items()):
            odds = data_odds if name.endswith(".data") else map_odds
            if not name.endswith((".data", ".map")) or self._rng.random() >= odds:
                continue
            if name.endswith(".map") and self._rng.random() < 0.5:
                # A file system without syncs can be broken enough to refuse this.
                with contextlib.suppress(OSError):
                    os.fsync(fd)
                self._tally.forced["map synced"] += 1
            else:
                self._force_pages(fd)
                self._tally.forced["pages written"] += 1

    def _force_pages(self, fd: int) -> None:
        pages = -(-os.fstat(fd).st_size // PAGE_BYTES)
        for page in range(pages):
            if self._rng.random() < 0.6:
                offset, length = ctypes.c_int64(page * PAGE_BYTES), ctypes.c_int64(PAGE_BYTES)
                _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE_AND_WAIT)


class Episode:
    """A fresh file system, and cut after cut of its power.

    Args:
        seed: See the module.
    """

    def __init__(self, volume: LoopVolume, seed: int) -> None:
        self._volume = volume
        self._seed = seed
        self._world = World(seed, BLOBS)
        self._ledger = Ledger()
        self.tally = Tally()

    async def run(self, cuts: int) -> None:
        """Run it; the volume is left unmounted."""
        self._volume.make()
        self._volume.mount()
        try:
            for number in range(cuts):
                await self._session(random.Random(f"{self._seed}/{number}"))
                self._volume.unmount()
                self._volume.mount()
            await self._session(None)
        finally:
            self._volume.unmount()
        checker, tally = self._world.checker, self.tally
        tally.wrong += [f"seed {self._seed}: {what}" for what in checker.wrong]
        tally.reads, tally.bytes_checked = checker.reads, checker.bytes_checked
        tally.bytes_from_files = checker.bytes_from_files

    async def _session(self, rng: random.Random | None) -> None:
        """Run an engine from its start to its cut; without `rng` only read back."""
        disk = CutDisk(self._volume, self._ledger, self.tally)
        engine = await Engine.start(self._world, f"{self._volume.path}/cache", disk=disk)
        try:
            await self._read_back(engine)
            if rng is not None:
                disk.arm(rng.randint(1, CHANGES_MAX), rng)
                await self._work(engine, disk, rng)
                disk.cut("idle")
                await self._read_after_cut(engine, rng)
        finally:
            await engine.stop()

    async def _read_back(self, engine: Engine) -> None:
        """Read all that was recorded, and count what is still there."""
        ledger, tally, checker = self._ledger, self.tally, self._world.checker
        recorded = {stem: set(chunks) for stem, chunks in ledger.recorded.items() if chunks}
        durable = {stem: set(chunks) for stem, chunks in ledger.durable.items()}
        names = {stem: ledger.blob_ids[stem] for stem in recorded}
        ledger.recorded.clear()
        ledger.durable.clear()
        blob_ids = sorted(set(names.values()))
        failed = len(checker.failed)
        await asyncio.gather(*(engine.read(blob_id) for blob_id in blob_ids))
        tally.failed_before_cut += checker.failed[failed:]
        tally.mismatches += engine.corrupt_chunks
        missed = chunks_fetched(engine.backend.fetches, self._world)
        for stem, chunks in recorded.items():
            lost = missed.get(names[stem], set())
            tally.recorded += len(chunks)
            tally.recorded_hits += len(chunks - lost)
            tally.durable += len(durable.get(stem, ()))
            tally.durable_hits += len(durable.get(stem, set()) - lost)
            kept = chunks - lost
            if kept:
                # A chunk that was there after a cut is on the medium, map and all.
                ledger.recorded.setdefault(stem, set()).update(kept)
                ledger.durable.setdefault(stem, set()).update(kept)

    async def _work(self, engine: Engine, disk: CutDisk, rng: random.Random) -> None:
        """Evict and read until the power goes."""
        checker, failed = self._world.checker, len(self._world.checker.failed)
        cached = sorted(usage.blob_id for usage in engine.manager.usage())
        excess = max(2, len(cached) - BLOBS_KEPT)
        await self._evict(engine, rng.sample(cached, min(len(cached), excess)))
        fetches = len(engine.backend.fetches)
        for _ in range(8):
            if disk.is_cut:
                break
            blob_ids = rng.sample(sorted(self._world.blobs), 3)
            ranges = [self._world.range_of(blob_id, rng) for blob_id in blob_ids]
            reads = [engine.read(*asked) for asked in zip(blob_ids, ranges, strict=True)]
            await asyncio.gather(*reads, self._evict(engine, rng.sample(cached, len(cached) // 9)))
            await asyncio.sleep(SYNC_AFTER_SECONDS * rng.random() * 2)
        self.tally.fills += len(engine.backend.fetches) - fetches
        if not disk.is_cut:
            self.tally.failed_before_cut += checker.failed[failed:]

    async def _evict(self, engine: Engine, blob_ids: Sequence[str]) -> None:
        results = await engine.evict(blob_ids)
        self.tally.evictions += sum(1 for result in results if result.bytes)

    async def _read_after_cut(self, engine: Engine, rng: random.Random) -> None:
        """Read from a machine whose disk is gone: right bytes, or a visible failure."""
        failed = len(self._world.checker.failed)
        blob_ids = rng.sample(sorted(self._world.blobs), 2)
        blob_ids += (
            rng.sample(sorted(self._ledger.blob_ids.values()), 1) if self._ledger.blob_ids else []
        )
        await asyncio.gather(*(engine.read(blob_id) for blob_id in blob_ids))
        self.tally.failed_after_cut += self._world.checker.failed[failed:]


async def run(kind: str, seed: int, cuts: int) -> Tally:
    """Run as many episodes as it takes."""
    total = Tally()
    with tempfile.TemporaryDirectory(prefix="blobcache-cuts-") as path:
        volume = LoopVolume(kind, path)
        try:
            for number in range(-(-cuts // CUTS_PER_EPISODE)):
                episode = Episode(volume, seed + number)
                await episode.run(min(CUTS_PER_EPISODE, cuts - number * CUTS_PER_EPISODE))
                total.add(episode.tally)
        finally:
            volume.close()
    return total


def main() -> None:
    """Run what the command line says and print the tally as JSON."""
    parser = argparse.ArgumentParser(description="Cuts the power of a cache's disk, many times.")
    parser.add_argument("--kind", choices=["ext4", "xfs"], default="ext4")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--cuts", type=int, default=CUTS_PER_EPISODE)
    parser.add_argument("--mutant", action="append", choices=sorted(MUTATIONS), default=[])
    arguments = parser.parse_args()
    enter_private_namespace()
    logging.disable()
    flush.SYNC_AFTER_SECONDS = SYNC_AFTER_SECONDS
    for mutant in arguments.mutant:
        MUTATIONS[mutant]()
    begun = time.monotonic()
    tally = asyncio.run(run(arguments.kind, arguments.seed, arguments.cuts))
    tally.seconds = round(time.monotonic() - begun, 1)
    sys.stdout.write(
        json.dumps({spec.name: getattr(tally, spec.name) for spec in dataclasses.fields(tally)})
        + "\n"
    )


if __name__ == "__main__":
    main()
