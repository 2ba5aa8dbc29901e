"""Whether a digest-named blob has the bytes its name promises.

One check per generation, shared by all whole reads of it: it hashes the chunks in order as they
arrive. Each is hashed from bytes that have the chunk's CRC, and a chunk that is discarded starts
the check over, so what was found holds for what is recorded. Once found right this is written to
the map (`Writer.record_whole`), and no later read hashes again.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

from blobcache_storage.errors import DigestMismatch

if TYPE_CHECKING:
    from blobcache_storage.cache.generation import Generation

HASH_BATCH_BYTES = 1024 * 1024
"""Hashed per turn of a thread: about 1 ms."""
_SHA256_PREFIX = "sha256:"


def sha256_of(digest: str | None) -> bytes | None:
    """Return the 32 bytes of a `sha256:<hex>` digest."""
    if digest is None or not digest.startswith(_SHA256_PREFIX):
        return None
    raw = bytes.fromhex(digest.removeprefix(_SHA256_PREFIX))
    assert len(raw) == hashlib.sha256().digest_size, "a malformed digest passed validation"
    return raw


class WholeCheck:
    """See the module; belongs to the event loop. `join` before waiting, `leave` after."""

    def __init__(self, generation: Generation, sha256: bytes) -> None:
        self._generation = generation
        self.sha256 = sha256
        self._interested = 0
        self._task: asyncio.Task[bool] | None = None

    def join(self) -> None:
        """Have it run."""
        self._interested += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        """Stop it if nobody else wants the answer."""
        self._interested -= 1
        if not self._interested and self._task is not None and not self._task.done():
            self._task.cancel()
            self._task = None

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for the answer."""
        return self._interested > 0

    @property
    def is_done(self) -> bool:
        """Whether the answer is known."""
        return self._task is not None and self._task.done()

    async def wait_a_while(self, seen: int) -> None:
        """Return when the answer is known, or a chunk came or went.

        Args:
            seen: `Generation.changes.count` from before the chunks were looked at.
        """
        assert self._task is not None, "waited for without having joined"
        change = self._generation.changes.since(seen)
        waited: list[asyncio.Future[Any]] = [self._task, change]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()

    def require(self) -> None:
        """Raise unless the blob has its digest.

        Raises:
            DigestMismatch: It has not.
        """
        assert self._task is not None
        if not self._task.result():
            raise DigestMismatch("the blob's bytes do not have the digest that names it")

    async def _run(self) -> bool:
        generation = self._generation
        while True:
            discards = generation.discards
            found = await self._hash()
            if generation.discards != discards:
                continue  # what was hashed is not all that is here now
            if found != self.sha256:
                return False
            generation.whole_sha256 = found
            generation.writer.record_whole(found)
            return True

    async def _hash(self) -> bytes:
        generation = self._generation
        digest = hashlib.sha256()
        batch = max(1, HASH_BATCH_BYTES // generation.chunk_size_bytes)
        index = 0
        while index < generation.chunk_count:
            while not generation.is_present(index):
                await generation.changes.since(generation.changes.count)
            end = index
            while end < min(index + batch, generation.chunk_count) and generation.is_present(end):
                end += 1
            index += await generation.feed(index, end, digest.update)
        return digest.digest()
