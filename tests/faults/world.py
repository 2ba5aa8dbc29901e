"""What all suites here share: an origin whose bytes are known, and engines over a directory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from blobcache_storage.cache.base import EvictionResult, Victim
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.folder import Folder
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import Clock, StorageRuntime, SystemClock
from blobcache_storage.config import BackendConfig, CacheConfig, ConfigV2
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.testing.memory_backend import FetchRecord, MemoryBackend
from blobcache_storage.testing.oracle import ByteOracle
from blobcache_storage.testing.served_bytes import ByteChecker, Truth

CHUNK_BYTES = 16 * 1024


@dataclass(slots=True)
class KnownBlob:
    """A blob of the origin."""

    info: BlobInfo
    size_bytes: int


class World:
    """An origin of many small blobs, and the checker of what is served of them.

    Args:
        seed: Of the bytes.
        blobs: How many there are; about every fifth is named with its digest.
        chunks_max: Of the largest; the last chunk is mostly short.
    """

    def __init__(self, seed: int, blobs: int, chunks_max: int = 8) -> None:
        rng = random.Random(seed)
        self.oracle = ByteOracle(seed)
        self.checker = ByteChecker(self.oracle)
        self.backend = MemoryBackend()
        self.blobs: dict[str, KnownBlob] = {}
        for number in range(blobs):
            size = rng.randint(1, chunks_max * CHUNK_BYTES)
            self.add(f"blob-{number}", size, has_digest=number % 5 == 0)

    def add(self, blob_id: str, size_bytes: int, *, has_digest: bool = False) -> None:
        """Have another blob."""
        data = self.oracle.blob(blob_id, 1, size_bytes)
        version = self.backend.put(blob_id, data, self.oracle.etag(blob_id, 1))
        self.checker.know(blob_id, version.token, Truth(blob_id, 1, size_bytes))
        digest = self.oracle.digest(blob_id, 1, size_bytes) if has_digest else None
        self.blobs[blob_id] = KnownBlob(BlobInfo(blob_id, digest=digest), size_bytes)

    def twin_backend(self) -> MemoryBackend:
        """Return a backend with the same blobs: each manager shuts its own down."""
        twin = MemoryBackend()
        twin._objects = self.backend._objects
        return twin

    def range_of(self, blob_id: str, rng: random.Random) -> RangeRequest:
        """Return a range to ask for: the whole blob half of the time."""
        size = self.blobs[blob_id].size_bytes
        if rng.random() < 0.5:
            return RangeRequest()
        first = rng.randrange(size)
        return RangeRequest(first=first, last=rng.randrange(first, size))


def configuration(
    path: str, *, capacity_bytes: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> ConfigV2:
    """Return a configuration of a cache."""
    return ConfigV2(
        id="tests/faults",
        uid="5f3c",
        backend=BackendConfig(type="memory"),
        cache=CacheConfig(
            work_dir=path, chunk_size_bytes=chunk_bytes, capacity_bytes=capacity_bytes
        ),
    )


@dataclass(slots=True)
class Engine:
    """A running cache over a directory; `start` and `stop` it."""

    world: World
    runtime: StorageRuntime
    root: CacheRoot
    manager: FileCacheMgr
    backend: MemoryBackend
    root_path: str

    @classmethod
    async def start(
        cls,
        world: World,
        path: str,
        *,
        disk: Disk | None = None,
        clock: Clock | None = None,
        capacity_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        open_files_max: int = 512,
    ) -> Engine:
        """Start one; what is on disk stays."""
        runtime = StorageRuntime(
            disk=disk, clock=clock or SystemClock(), open_files_max=open_files_max
        )
        try:
            root = CacheRoot.open(path, runtime)
        except BaseException:
            await runtime.close()
            raise
        backend = world.twin_backend()
        config = configuration(path, capacity_bytes=capacity_bytes, chunk_bytes=chunk_bytes)
        try:
            manager = FileCacheMgr(config, backend, runtime, root)
            manager.init()
        except BaseException:
            root.close()
            await runtime.close()
            raise
        return cls(world, runtime, root, manager, backend, path)

    async def stop(self) -> None:
        """Stop it as an agent does that ends."""
        await self.manager.destroy()
        self.root.close()
        await self.runtime.close()

    async def read(self, blob_id: str, request: RangeRequest | None = None) -> int:
        """Read and check; returns how many right bytes were served."""
        with self.manager.get_blob_cache(self.world.blobs[blob_id].info) as cache:
            return await self.world.checker.read(cache, request)

    async def evict(self, blob_ids: Sequence[str]) -> list[EvictionResult]:
        """Evict the versions now cached of these blobs."""
        versions = {usage.blob_id: usage.version for usage in self.manager.usage()}
        victims = [
            Victim(blob_id, versions[blob_id], float("inf"))
            for blob_id in blob_ids
            if blob_id in versions
        ]
        return await self.manager.evict(victims)

    @property
    def folder(self) -> Folder:
        """The configuration's folder."""
        return self.manager.table.folder

    @property
    def corrupt_chunks(self) -> int:
        """How many chunks were found to be not what was recorded."""
        return self.manager.origin.counters.corrupt_chunks


def chunks_fetched(fetches: Sequence[FetchRecord], world: World) -> dict[str, set[int]]:
    """Return which chunks of which blobs were asked of the origin."""
    found: dict[str, set[int]] = {}
    for fetch in fetches:
        span = fetch.request.resolve(world.blobs[fetch.blob_id].size_bytes)
        chunks = range(span.start // CHUNK_BYTES, (span.end - 1) // CHUNK_BYTES + 1)
        found.setdefault(fetch.blob_id, set()).update(chunks)
    return found
