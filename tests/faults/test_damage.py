"""Files damaged while the cache was down: found, fetched again, never served."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from blobcache_storage.cache.chunk_map import HEADER_SIZE_BYTES
from blobcache_storage.cache.generation import ChunkState, Generation
from blobcache_storage.cache.index import decode_index, encode_index
from tests.faults import scale
from tests.faults.world import CHUNK_BYTES, Engine, World, chunks_fetched

pytestmark = [pytest.mark.faults, pytest.mark.timeout(scale.timeout_seconds(300))]

BLOBS = 32
DAMAGES = scale.scaled(10_000)
DAMAGES_PER_START = 20
PAGE_BYTES = 4096


class Vandal:
    """Damages the files of a cache that is down.

    Args:
        root: The cache root.
    """

    def __init__(self, root: Path, rng: random.Random) -> None:
        self._rng = rng
        (self.folder,) = [path for path in (root / "v1").iterdir() if path.is_dir()]
        self.index = root / "v1" / "index.json"
        self.data = sorted(self.folder.glob("*.data"))
        self.maps = sorted(self.folder.glob("*.map"))
        self.done: Counter[str] = Counter()
        self._kinds: list[tuple[str, Callable[[], bool]]] = [
            ("flip data", lambda: self._flip(self._any(self.data))),
            ("flip data", lambda: self._flip(self._any(self.data))),
            ("flip data", lambda: self._flip(self._any(self.data))),
            ("flip map", lambda: self._flip(self._any(self.maps))),
            ("flip slot", self._flip_slot),
            ("flip slot", self._flip_slot),
            ("flip index", lambda: self._flip(self.index)),
            ("tear data", lambda: self._tear(self._any(self.data))),
            ("tear map", lambda: self._tear(self._any(self.maps))),
            ("truncate data", lambda: self._truncate(self._any(self.data))),
            ("truncate map", lambda: self._truncate(self._any(self.maps))),
            ("truncate index", lambda: self._truncate(self.index)),
            ("swap data", lambda: self._swap(self.data)),
            ("swap maps", lambda: self._swap(self.maps)),
            ("swap pairs", self._swap_pairs),
            ("move a page", self._move_page),
            ("lying index", self._lie),
        ]

    def damage(self) -> None:
        """Do one thing that changes something."""
        while True:
            name, act = self._rng.choice(self._kinds)
            if act():
                self.done[name] += 1
                return

    def _any(self, paths: list[Path]) -> Path:
        return self._rng.choice(paths)

    def _flip(self, path: Path, start: int = 0) -> bool:
        if not path.exists() or path.stat().st_size <= start:
            return False
        data = bytearray(path.read_bytes())
        data[self._rng.randrange(start, len(data))] ^= 1 << self._rng.randrange(8)
        path.write_bytes(data)
        return True

    def _flip_slot(self) -> bool:
        return self._flip(self._any(self.maps), HEADER_SIZE_BYTES)

    def _tear(self, path: Path) -> bool:
        """Have a page that never arrived, or half of it."""
        data = bytearray(path.read_bytes())
        if not data:
            return False
        start = self._rng.randrange(0, len(data), PAGE_BYTES) + self._rng.choice([0, 512, 2048])
        end = min(start // PAGE_BYTES * PAGE_BYTES + PAGE_BYTES, len(data))
        if start >= end or not any(data[start:end]):
            return False
        data[start:end] = bytes(end - start)
        path.write_bytes(data)
        return True

    def _truncate(self, path: Path) -> bool:
        if not path.exists() or not path.stat().st_size:
            return False
        os.truncate(path, self._rng.randrange(path.stat().st_size))
        return True

    def _swap(self, paths: list[Path]) -> bool:
        first, second = self._rng.sample(paths, 2)
        aside = first.with_suffix(".aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)
        return True

    def _swap_pairs(self) -> bool:
        first, second = self._rng.sample(range(len(self.data)), 2)
        for paths in (self.data, self.maps):
            aside = paths[first].with_suffix(".aside")
            paths[first].rename(aside)
            paths[second].rename(paths[first])
            aside.rename(paths[second])
        return True

    def _move_page(self) -> bool:
        """Write a page where another belongs, as a disk does that mixes up addresses."""
        source = self._any(self.data).read_bytes()
        path = self._any(self.data)
        target = bytearray(path.read_bytes())
        if not source or not target:
            return False
        start = self._rng.randrange(0, len(source), PAGE_BYTES)
        at = self._rng.randrange(0, len(target), PAGE_BYTES)
        page = source[start : start + PAGE_BYTES][: len(target) - at]
        if target[at : at + len(page)] == page:
            return False
        target[at : at + len(page)] = page
        path.write_bytes(target)
        return True

    def _lie(self) -> bool:
        """Have an index with a right checksum that says wrong things."""
        if not self.index.exists():
            return False
        folders = decode_index(self.index.read_bytes())
        for folder in folders.values():
            if len(folder.blobs) < 2:
                return False
            one, other = self._rng.sample(folder.blobs, 2)
            what = self._rng.choice(["stem", "blob_id", "version", "generation", "created_ns"])
            mine, theirs = getattr(one, what), getattr(other, what)
            setattr(one, what, theirs)
            setattr(other, what, mine)
        self.index.write_bytes(encode_index(folders))
        return bool(folders)


def damaged_chunks(engine: Engine, world: World) -> dict[str, set[int]]:
    """Return the chunks of known blobs whose bytes in the file are not the blob's."""
    found: dict[str, set[int]] = {}
    folder = Path(engine.root_path) / "v1" / engine.folder.name
    for blob_id, entry in engine.folder.entries.items():
        size = world.blobs[blob_id].size_bytes
        path = folder / f"{entry.stem}.data"
        data = path.read_bytes()[:size] if path.exists() else b""
        right = world.oracle.blob(blob_id, 1, size)
        for start in range(0, size, CHUNK_BYTES):
            if data[start : start + CHUNK_BYTES] != right[start : start + CHUNK_BYTES]:
                found.setdefault(blob_id, set()).add(start // CHUNK_BYTES)
    return found


async def suffer(path: str, seed: int, damages: int) -> tuple[World, Counter[str], Counter[str]]:
    """Damage a cache again and again, reading all of it after each start."""
    world, seen, done = World(seed, BLOBS, chunks_max=5), Counter[str](), Counter[str]()
    engine = await Engine.start(world, path)
    await asyncio.gather(*(engine.read(blob_id) for blob_id in world.blobs))
    await engine.stop()
    for number in range(-(-damages // DAMAGES_PER_START)):
        vandal = Vandal(Path(path), random.Random(f"{seed}/{number}"))
        for _ in range(DAMAGES_PER_START):
            vandal.damage()
        done.update(vandal.done)
        engine = await Engine.start(world, path)
        try:
            wrong = damaged_chunks(engine, world)
            await asyncio.wait_for(
                asyncio.gather(*(engine.read(blob_id) for blob_id in world.blobs)), timeout=30
            )
            fetched = chunks_fetched(engine.backend.fetches, world)
            for blob_id, chunks in wrong.items():
                missed = chunks - fetched.get(blob_id, set())
                assert not missed, f"seed {seed}/{number}: {blob_id}: {missed} not fetched again"
            seen["damaged chunks"] += sum(map(len, wrong.values()))
            seen["fetched chunks"] += sum(map(len, fetched.values()))
            seen["hits"] += engine.manager.stats().hit_bytes // CHUNK_BYTES
        finally:
            await engine.stop()
        assert not world.checker.wrong, f"seed {seed}/{number}: {world.checker.wrong}"
        assert not world.checker.failed, f"seed {seed}/{number}: {world.checker.failed}"
    return world, seen, done


def test_damage_is_never_served(tmp_path: Path) -> None:
    """Every damaged chunk is fetched again, no reader notices, and the cache is whole again."""
    world, seen, done = asyncio.run(suffer(f"{tmp_path}/cache", scale.seed(), DAMAGES))
    print(f"seed {scale.seed()}: {sum(done.values())} damages {dict(done)}, {dict(seen)},")  # noqa: T201
    print(f"{world.checker.bytes_checked} bytes checked")  # noqa: T201
    assert sum(done.values()) >= DAMAGES
    assert min(done.values()) >= DAMAGES // 100, "void: a kind of damage was rare"
    assert seen["damaged chunks"] >= DAMAGES // 4, "void: too little was damaged"
    assert seen["hits"] >= DAMAGES // 4, "void: too little was left to hit"


def test_without_checksums_damage_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite sees what it is for: an engine that trusts its files fails it."""
    take_loaded = Generation.take_loaded

    def trusting(self: Generation, loaded: object) -> None:
        take_loaded(self, loaded)  # type: ignore[arg-type]
        self.states = bytearray(
            ChunkState.VERIFIED if state == ChunkState.DURABLE else state for state in self.states
        )

    monkeypatch.setattr(Generation, "take_loaded", trusting)
    with pytest.raises(AssertionError, match="seed"):
        asyncio.run(suffer(f"{tmp_path}/cache", scale.seed(), 200))


async def damage_while_up(path: str, act: Callable[[Path], None], *, scrub: bool) -> World:
    """Damage a file that is open and was verified; read before and after."""
    world = World(scale.seed(), 1, chunks_max=5)
    engine = await Engine.start(world, path)
    try:
        await engine.read("blob-0")
        for generation in engine.manager.table.open_generations():
            await generation.writer.drain()
        stem = engine.folder.entries["blob-0"].stem
        act(Path(path) / "v1" / engine.folder.name / f"{stem}.data")
        if scrub:
            engine.manager._scrubber._bytes_per_second = None
            await engine.manager._scrubber.scrub()
        await engine.read("blob-0")
        assert engine.corrupt_chunks or scrub, "void: the damage was not met"
    finally:
        await engine.stop()
    return world


def _flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("act", [_flip_middle, _halve])
def test_a_scrub_finds_what_happened_since_the_start(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    """A chunk is verified once per start; later damage is found by the scrub, and mended."""
    world = asyncio.run(damage_while_up(f"{tmp_path}/cache", act, scrub=True))
    assert not world.checker.wrong
    assert not world.checker.failed


def test_a_file_that_became_unreadable_is_mended_by_its_reader(tmp_path: Path) -> None:
    """Even the reader who meets it gets all bytes."""
    world = asyncio.run(damage_while_up(f"{tmp_path}/cache", _halve, scrub=False))
    assert not world.checker.wrong
    assert not world.checker.failed
