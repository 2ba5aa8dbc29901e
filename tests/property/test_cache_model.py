"""The file cache against a model: whatever happens, no read has a wrong byte.

The model is a dict of every version of every blob ever put. A read that succeeds has exactly the
asked range of the one version it names; one that fails gave a right beginning of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr
from tests.unit.cache.rig import CHUNK, FakeClock, Rig, make_config, take

from blobcache_storage.cache.base import BlobRead, Victim
from blobcache_storage.config import PrefetchConfig
from blobcache_storage.credentials import BearerToken, Pending
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import StorageError
from blobcache_storage.testing.memory_backend import Fault
from blobcache_storage.testing.recorder import RecordingDisk

T = TypeVar("T")

BLOBS = st.sampled_from(["a", "b", "c"])
SIZES = st.sampled_from([0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 7, 40 * CHUNK, 300 * CHUNK + 1])
FRACTIONS = st.floats(0, 1)
CAPACITY = 400 * CHUNK


def copy_as_it_is(source: Path, target: Path) -> None:
    """Copy a tree that threads still change: maps before data, as a record implies its data."""
    for path in sorted(source.rglob("*"), key=lambda path: path.suffix != ".map"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file():
            with contextlib.suppress(FileNotFoundError):
                copy_sparse(path, copy)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and leave its holes, which are not counted, holes."""
    with source.open("rb") as old, target.open("wb") as new:
        while block := old.read(4096):
            if block.strip(b"\0"):
                new.write(block)
            else:
                new.seek(len(block), 1)
        new.truncate(old.tell())


class CacheMachine(RuleBasedStateMachine):
    """See the module."""

    steps_run = 0
    """By all machines of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="cache-model-"))
        self.homes = 0
        self.turn = 0
        self.disk = RecordingDisk()
        self.rig = self.new_rig(self.directory / "0")
        self.start()
        self.versions: dict[str, dict[str | None, bytes]] = {}
        self.held: list[tuple[str, RangeRequest, BlobRead, Any]] = []

    def new_rig(self, home: Path) -> Rig:
        """Return a rig that is not started."""
        return Rig(
            home, disk=self.disk, clock=FakeClock(), capacity_bytes_config=CAPACITY, ttl_seconds=600
        )

    def check_invariants(self, *args: Any, **kwargs: Any) -> None:
        """Count a step."""
        CacheMachine.steps_run += 1
        super().check_invariants(*args, **kwargs)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def start(self) -> None:
        """Start on a disk that works: without one there is no root, and nothing to test."""
        self.disk.fail_at = 0
        self.run(self.rig.start())

    def teardown(self) -> None:
        """Release everything."""
        self.disk.fail_at = 0
        try:
            self.run(self.release_all())
            self.run(self.rig.stop())
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)

    async def release_all(self) -> None:
        """Readers who took their time leave."""
        for _, _, read, _ in self.held:
            await read.aclose()
        self.held.clear()

    # -- the origin ----------------------------------------------------------------------------

    @rule(blob_id=BLOBS, size=SIZES, number=st.integers(0, 3))
    def put(self, blob_id: str, size: int, number: int) -> None:
        """The origin gets a blob, or another version of it."""
        data = self.rig.put(blob_id, size, version=number)
        etag = self.rig.backend._objects[blob_id].version.etag
        self.versions.setdefault(blob_id, {})[etag] = data

    @rule(cut=st.integers(0, 20 * CHUNK))
    def break_next_answer(self, cut: int) -> None:
        """The next body breaks off."""
        self.rig.backend.fail_next(Fault(cut_after_bytes=cut))

    @rule()
    def answer_whole(self) -> None:
        """The origin ignores the next range."""
        self.rig.backend.fail_next(Fault(whole=True))

    # -- readers -------------------------------------------------------------------------------

    def request_of(self, blob_id: str, start: float, length: float) -> RangeRequest:
        """Return a range of a blob, given as fractions of its size."""
        sizes = [len(data) for data in self.versions.get(blob_id, {}).values()] or [CHUNK]
        first = int(start * max(sizes))
        return RangeRequest(first=first, last=first + int(length * max(sizes)))

    def check(
        self, blob_id: str, read: BlobRead, got: bytes, error: type[Exception] | None
    ) -> None:
        """The bytes are those of the version that was named."""
        data = self.versions[blob_id][read.version.etag]
        assert read.version.size_bytes == len(data)
        wanted = data[read.span.start : read.span.end]
        assert got == wanted[: len(got)], "a wrong byte"
        assert error is not None or len(got) == len(wanted), "short without an error"

    async def read_one(self, blob_id: str, request: RangeRequest) -> None:
        """Read and check."""
        with self.rig.manager.get_blob_cache(BlobInfo(blob_id)) as cache:
            try:
                read = await cache.read(request)
            except StorageError:
                return
            async with read:
                got, error = await take(read)
                self.check(blob_id, read, got, error)

    @rule(blob_id=BLOBS, start=FRACTIONS, length=FRACTIONS)
    def read_range(self, blob_id: str, start: float, length: float) -> None:
        """A range is read."""
        self.run(self.read_one(blob_id, self.request_of(blob_id, start, length)))

    @rule(blob_id=BLOBS, starts=st.lists(FRACTIONS, min_size=2, max_size=5), length=FRACTIONS)
    def read_at_once(self, blob_id: str, starts: list[float], length: float) -> None:
        """Some ranges and the whole are read at the same time."""

        async def all_of_them() -> None:
            ranges = [self.request_of(blob_id, start, length) for start in starts]
            reads = [self.read_one(blob_id, request) for request in [*ranges, RangeRequest()]]
            await asyncio.gather(*reads)

        self.run(all_of_them())

    @rule(blob_id=BLOBS)
    def hold_a_read(self, blob_id: str) -> None:
        """A reader begins and takes its time."""

        async def begin() -> None:
            with self.rig.manager.get_blob_cache(BlobInfo(blob_id)) as cache:
                try:
                    read = await cache.read(RangeRequest())
                except StorageError:
                    return
                self.held.append((blob_id, RangeRequest(), read, None))

        if len(self.held) < 3:
            self.run(begin())

    @rule()
    def finish_held_reads(self) -> None:
        """Readers who took their time get right bytes too."""

        async def finish() -> None:
            for blob_id, _, read, _ in self.held:
                async with read:
                    got, error = await take(read)
                    self.check(blob_id, read, got, error)
            self.held.clear()

        self.run(finish())

    # -- the cache -----------------------------------------------------------------------------

    @rule(blob_id=BLOBS)
    def evict(self, blob_id: str) -> None:
        """The operator evicts whatever version there is."""
        victims = [
            Victim(usage.blob_id, usage.version, usage.last_read_time + 1)
            for usage in self.rig.manager.usage()
            if usage.blob_id == blob_id
        ]
        self.run(self.rig.manager.evict(victims))

    @rule(seconds=st.sampled_from([1, 40, 700]))
    def look_after(self, seconds: int) -> None:
        """Time passes and the manager looks after itself."""

        async def look() -> None:
            assert isinstance(self.rig.clock, FakeClock)
            self.rig.clock.advance(seconds)
            self.rig.manager.check_stat()
            await self.rig.settled()

        self.run(look())

    @rule(
        suspend=st.booleans(),
        pinned=st.sets(BLOBS, max_size=1),
        capacity=st.sampled_from([CAPACITY, CAPACITY // 2, CAPACITY // 20]),
        policy=st.sampled_from(["LRU", "None"]),
        wanted=st.sets(BLOBS, max_size=2),
    )
    def reconfigure(
        self, suspend: bool, pinned: set[str], capacity: int, policy: str, wanted: set[str]
    ) -> None:
        """What may change in place changes."""
        blobs = tuple(BlobInfo(name) for name in sorted(wanted))
        self.rig.config = make_config(
            suspend=suspend,
            pinned=frozenset(pinned),
            capacity_bytes=capacity,
            eviction_policy=policy,
            prefetch=PrefetchConfig(enable=bool(blobs), blobs=blobs),
            ttl_seconds=600,
        )
        self.reconfigure_now()

    @rule(pending=st.booleans())
    def rotate_credentials(self, pending: bool) -> None:
        """Others come, or are to come: then hits are served and misses fail."""
        backend = self.rig.config.get_backend_config()
        self.turn += 1
        credentials = Pending() if pending else BearerToken(SecretStr(f"token-{self.turn}"))
        backend = replace(backend, credentials=credentials)
        self.rig.config = replace(self.rig.config, backend=backend)
        self.reconfigure_now()

    def reconfigure_now(self) -> None:
        """Have the manager take the configuration, and get below its capacity."""

        async def apply() -> None:
            assert isinstance(self.rig.clock, FakeClock)
            self.rig.clock.advance(2)
            self.rig.manager.reconfigure(self.rig.config)
            self.rig.manager.check_stat()
            await self.rig.settled()

        self.run(apply())

    @rule()
    def gc(self) -> None:
        """Unused blobs are closed."""

        async def collect() -> None:
            self.rig.manager.gc(None)

        self.run(collect())

    @rule(with_index=st.booleans())
    def restart(self, with_index: bool) -> None:
        """The process ends in good order and another starts."""
        self.run(self.release_all())
        self.run(self.rig.stop())
        if not with_index:
            (self.rig.directory / "v1" / "index.json").unlink(missing_ok=True)
        self.start()

    @rule()
    def kill(self) -> None:
        """The process is killed: another one goes on from what the disk has at this moment."""
        self.homes += 1
        home = self.directory / str(self.homes)
        home.mkdir(mode=0o700)
        copy_as_it_is(self.rig.directory, home)
        self.run(self.release_all())
        self.run(self.rig.stop())
        backend, config = self.rig.backend, self.rig.config
        self.rig = self.new_rig(home)
        self.rig.backend, self.rig.config = backend, config
        self.start()

    @rule(which=st.integers(0, 100), where=FRACTIONS, suffix=st.sampled_from(["data", "map"]))
    def corrupt(self, which: int, where: float, suffix: str) -> None:
        """A byte of a file turns, while nobody is looking."""
        self.run(self.release_all())
        self.run(self.rig.stop())
        files = sorted(self.rig.directory.glob(f"v1/*/*.{suffix}"))
        if files:
            path = files[which % len(files)]
            size = path.stat().st_size
            if size:
                offset = min(size - 1, int(where * size))
                with path.open("r+b") as file:
                    file.seek(offset)
                    byte = file.read(1)
                    file.seek(offset)
                    file.write(bytes([byte[0] ^ 0x40]))
        self.start()

    @rule(number=st.integers(1, 12), lasting=st.booleans())
    def disk_fails(self, number: int, lasting: bool) -> None:
        """Some call on the disk fails soon, and maybe all after it."""
        self.disk.calls, self.disk.fail_at = 0, number
        self.disk.fail_until = 1 << 30 if lasting else 0
        self.disk.fail_with = errno.ENOSPC if number % 2 else errno.EIO

    @rule()
    def disk_recovers(self) -> None:
        """The disk works again, and so does the cache."""
        self.disk.fail_at = 0
        assert isinstance(self.rig.clock, FakeClock)
        self.rig.clock.advance(60)

    @invariant()
    def quota_holds(self) -> None:
        """Never more than the capacity, and what is counted adds up."""
        stats = self.rig.manager.stats()
        assert 0 <= stats.bytes <= CAPACITY
        assert stats.bytes == self.rig.root.budget.used_bytes
        assert self.rig.runtime.buffers.used_bytes <= self.rig.runtime.buffers.bytes_max
        assert 0 <= self.rig.root.budget.unwritten_bytes <= stats.bytes


STEPS_MIN = 20_000


@pytest.mark.timeout(600)
def test_the_cache_is_what_its_model_says() -> None:
    """Over so many steps that a run of them counts."""
    before = CacheMachine.steps_run
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        CacheMachine,
        settings=settings(
            max_examples=500,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    steps = CacheMachine.steps_run - before
    print(f"{steps} steps")  # noqa: T201
    assert steps >= STEPS_MIN, f"void: only {steps} steps"
