"""1,000 readers of one cold blob of 1 GiB, in a process of its own whose memory is measured.

Some read all of it, the others a random window each, all at once. The bytes of each piece from
memory are checked at both its ends, a span of a file in one random place; other suites check all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from typing_extensions import override

from blobcache_storage.backend.base import FetchStream, check_expected, resolve_span
from blobcache_storage.cache.base import FileSpan
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import BUFFER_BYTES, StorageRuntime
from blobcache_storage.device import (
    BlobInfo,
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
    Validator,
)
from blobcache_storage.testing.memory_backend import MemoryBackend
from blobcache_storage.testing.oracle import ByteOracle
from tests.faults.loop_volume import die_with_parent
from tests.faults.world import configuration

MIB = 1024 * 1024
PIECE_BYTES = 64 * 1024
"""As an origin over HTTP hands it over."""
SAMPLE_BYTES = 32
WINDOW_BYTES = 8 * MIB
BLOB_ID = "huge"


class OracleStream(FetchStream):
    """A body that is computed as it is sent."""

    def __init__(self, backend: OracleBackend, version: BlobVersion, span: ByteRange) -> None:
        self.version = version
        self.span = span
        self._backend = backend

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        for start in range(self.span.start, self.span.end, PIECE_BYTES):
            end = min(start + PIECE_BYTES, self.span.end)
            self._backend.bytes_sent += end - start
            yield self._backend.oracle.read(BLOB_ID, 1, start, end)
            await asyncio.sleep(0)

    @override
    async def aclose(self) -> None:
        """Nothing is open."""


class OracleBackend(MemoryBackend):
    """An origin of one blob that is nowhere in memory."""

    def __init__(self, oracle: ByteOracle, size_bytes: int) -> None:
        super().__init__()
        self.oracle = oracle
        tag = oracle.etag(BLOB_ID, 1)
        self._version = BlobVersion(size_bytes, Validator.ETAG, tag, tag)

    @override
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        self.requests += 1
        check_expected(blob_id, self._version, expect)
        span = resolve_span(request, self._version.size_bytes)
        return OracleStream(self, self._version, span)


class Herd:
    """See the module."""

    def __init__(self, oracle: ByteOracle, size_bytes: int) -> None:
        self._oracle = oracle
        self._size_bytes = size_bytes
        self._rng = random.Random(oracle.seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def window(self) -> RangeRequest:
        """Return a random range."""
        first = self._rng.randrange(self._size_bytes - WINDOW_BYTES)
        return RangeRequest(first=first, last=first + WINDOW_BYTES - 1)

    async def read(self, manager: FileCacheMgr, request: RangeRequest) -> None:
        """Be one reader."""
        position = request.first or 0
        end = self._size_bytes if request.last is None else request.last + 1
        self.counts["bytes asked for"] += end - position
        with manager.get_blob_cache(BlobInfo(BLOB_ID)) as cache:
            async with await cache.read(request) as read:
                async for piece in read.pieces():
                    if isinstance(piece, FileSpan):
                        self._check_file(piece, position)
                        position += piece.length
                    else:
                        last = max(0, len(piece) - SAMPLE_BYTES)
                        self._check(position, bytes(piece[:SAMPLE_BYTES]))
                        self._check(position + last, bytes(piece[last:]))
                        self.counts["bytes from memory"] += len(piece)
                        position += len(piece)
        assert position == end, f"a reader ended at {position} of {end}"
        self.counts["readers done"] += 1

    def _check_file(self, span: FileSpan, position: int) -> None:
        at = self._rng.randrange(span.length)
        data = os.pread(span.fd, min(SAMPLE_BYTES, span.length - at), span.offset + at)
        self._check(position + at, data)
        self.counts["bytes from files"] += span.length

    def _check(self, offset: int, data: bytes) -> None:
        self.counts["samples"] += 1
        if self._oracle.first_wrong(BLOB_ID, 1, offset, data) is not None:
            self.wrong.append(f"at {offset}")


def peak_bytes() -> int:
    """Return the most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def run(
    seed: int, readers: int, whole: int, size_bytes: int, chunk_bytes: int, path: str
) -> dict[str, object]:
    """Let the herd loose."""
    oracle = ByteOracle(seed)
    backend, herd = OracleBackend(oracle, size_bytes), Herd(oracle, size_bytes)
    runtime = StorageRuntime()
    root = CacheRoot.open(f"{path}/cache", runtime)
    config = configuration(path, chunk_bytes=chunk_bytes)
    manager = FileCacheMgr(config, backend, runtime, root)
    manager.init()
    before, begun = peak_bytes(), time.monotonic()
    requests = [RangeRequest() if n < whole else herd.window() for n in range(readers)]
    await asyncio.gather(*(herd.read(manager, request) for request in requests))
    seconds = time.monotonic() - begun
    grown = peak_bytes() - before
    await manager.destroy()
    root.close()
    await runtime.close()
    return {
        "origin_bytes": backend.bytes_sent,
        "origin_requests": backend.requests,
        "grown_bytes": grown,
        "pool_bytes": BUFFER_BYTES,
        "seconds": round(seconds, 1),
        "wrong": herd.wrong,
        **herd.counts,
    }


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Reads one cold blob, a thousand times at once.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--whole", type=int, default=30, help="so many of them read all of it")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk-kib", type=int, default=1024)
    arguments = parser.parse_args()
    die_with_parent()
    folder = Path(tempfile.mkdtemp(prefix="blobcache-herd-"))
    try:
        size, chunk = arguments.mib * MIB, arguments.chunk_kib * 1024
        herd = run(arguments.seed, arguments.readers, arguments.whole, size, chunk, str(folder))
        found = asyncio.run(herd)
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
