"""What every backend does: the contract of `backend.base`, as tests to inherit.

A backend's test module subclasses `BackendConformance` and provides the fixture `subject`.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence

import pytest

from blobcache_storage.backend.base import BlobBackend, FetchStream
from blobcache_storage.config import BackendConfig
from blobcache_storage.device import BlobVersion, ByteRange, RangeRequest, RequestSource
from blobcache_storage.errors import (
    BlobChanged,
    BlobNotFound,
    InvalidBlobId,
    RangeNotSatisfiable,
)
from blobcache_storage.testing.oracle import ByteOracle

SIZE_BYTES = 300_000
ORACLE = ByteOracle(seed=7)
NAME = "layers/blob one+two"

RANGES = [
    RangeRequest(),
    RangeRequest(first=0),
    RangeRequest(first=0, last=0),
    RangeRequest(first=0, last=SIZE_BYTES - 1),
    RangeRequest(first=1, last=70_000),
    RangeRequest(first=65_536, last=131_071),
    RangeRequest(first=SIZE_BYTES - 1),
    RangeRequest(first=299_000, last=10 * SIZE_BYTES),
    RangeRequest(suffix_length=1),
    RangeRequest(suffix_length=100_000),
    RangeRequest(suffix_length=10 * SIZE_BYTES),
]

HOSTILE_IDS = [
    "",
    ".",
    "..",
    "../secret",
    "a/../../secret",
    "a/./b",
    "a/..",
    "a\0b",
    "a\nb",
    "a\r\nX-Injected: 1",
    "a\x7fb",
    "a\x85b",
    "\ud800",
    "x" * 1025,
    "ü" * 513,
]


class Subject(abc.ABC):
    """A backend and the means to change its origin behind its back."""

    backend: BlobBackend
    is_replaceable = True
    """Whether a blob's bytes can change under its id."""
    further_hostile_ids: Sequence[str] = ()

    @abc.abstractmethod
    async def put(self, name: str, data: bytes) -> str:
        """Store a blob at the origin, replacing any of that name; return its id."""

    @abc.abstractmethod
    def missing_id(self) -> str:
        """Return a good id that the origin has not."""

    async def rotate(self) -> BackendConfig | None:
        """Make the present credentials worthless; return a configuration with good ones."""
        return None


async def read_all(stream: FetchStream) -> bytes:
    """Read a stream to its end and end it."""
    async with stream:
        return b"".join([piece async for piece in stream])


class BackendConformance:
    """The contract."""

    @pytest.mark.parametrize("request_", RANGES, ids=str)
    async def test_yields_exactly_the_bytes_asked_for(
        self, subject: Subject, request_: RangeRequest
    ) -> None:
        """A range's bytes are the origin's, or the whole blob's for one that begins at 0."""
        data = ORACLE.blob(NAME, 1, SIZE_BYTES)
        blob_id = await subject.put(NAME, data)
        stream = await subject.backend.fetch(blob_id, request_)
        wanted = request_.resolve(SIZE_BYTES)
        allowed = [wanted] if wanted.start else [wanted, ByteRange(0, SIZE_BYTES)]
        assert stream.span in allowed
        assert stream.version.size_bytes == SIZE_BYTES
        assert await read_all(stream) == data[stream.span.start : stream.span.end]

    @pytest.mark.parametrize("request_", [RangeRequest(), RangeRequest(first=0, last=99)], ids=str)
    async def test_an_empty_blob_is_there(self, subject: Subject, request_: RangeRequest) -> None:
        """An empty blob is found, by a whole request and by one from offset 0."""
        blob_id = await subject.put("empty", b"")
        stream = await subject.backend.fetch(blob_id, request_)
        assert stream.version.size_bytes == 0
        assert stream.span == ByteRange(0, 0)
        assert await read_all(stream) == b""

    @pytest.mark.parametrize(
        "request_",
        [RangeRequest(first=SIZE_BYTES), RangeRequest(first=SIZE_BYTES, last=2 * SIZE_BYTES)],
        ids=str,
    )
    async def test_a_range_beyond_the_end_names_the_size(
        self, subject: Subject, request_: RangeRequest
    ) -> None:
        """A range with no byte in the blob fails with the blob's size."""
        blob_id = await subject.put(NAME, ORACLE.blob(NAME, 1, SIZE_BYTES))
        with pytest.raises(RangeNotSatisfiable) as caught:
            await subject.backend.fetch(blob_id, request_)
        assert caught.value.size_bytes == SIZE_BYTES

    async def test_a_missing_blob_is_not_found(self, subject: Subject) -> None:
        """A blob that is not there is BlobNotFound, for a fetch and a stat alike."""
        with pytest.raises(BlobNotFound):
            await subject.backend.fetch(subject.missing_id(), RangeRequest())
        with pytest.raises(BlobNotFound):
            await subject.backend.stat(subject.missing_id())

    async def test_all_answers_of_one_version_agree(self, subject: Subject) -> None:
        """Fetches of any range and a stat give one cacheable version."""
        blob_id = await subject.put(NAME, ORACLE.blob(NAME, 1, SIZE_BYTES))
        found: list[BlobVersion] = [await subject.backend.stat(blob_id)]
        for request in (RangeRequest(), RangeRequest(first=5, last=9), RangeRequest(first=70_000)):
            async with await subject.backend.fetch(blob_id, request) as stream:
                found.append(stream.version)
        assert found == [found[0]] * len(found)
        assert found[0].is_cacheable
        assert found[0].etag is not None
        assert found[0].etag[0] == found[0].etag[-1] == '"'

    async def test_the_expected_version_is_served(self, subject: Subject) -> None:
        """A fetch that expects the present version gets it."""
        data = ORACLE.blob(NAME, 1, SIZE_BYTES)
        blob_id = await subject.put(NAME, data)
        expect = await subject.backend.stat(blob_id)
        for source in RequestSource:
            stream = await subject.backend.fetch(
                blob_id, RangeRequest(first=10, last=19), expect=expect, source=source
            )
            assert await read_all(stream) == data[10:20]

    async def test_another_version_is_blob_changed(self, subject: Subject) -> None:
        """A blob replaced by one of the same size is noticed before a byte is served."""
        if not subject.is_replaceable:
            return
        blob_id = await subject.put(NAME, ORACLE.blob(NAME, 1, SIZE_BYTES))
        expect = await subject.backend.stat(blob_id)
        await subject.put(NAME, ORACLE.blob(NAME, 2, SIZE_BYTES))
        for request in (RangeRequest(), RangeRequest(first=100, last=199)):
            with pytest.raises(BlobChanged):
                await subject.backend.fetch(blob_id, request, expect=expect)

    @pytest.mark.parametrize("blob_id", HOSTILE_IDS, ids=lambda text: ascii(text)[:20])
    async def test_hostile_ids_are_refused(self, subject: Subject, blob_id: str) -> None:
        """An id that could mean something else on the way is refused before anything is sent."""
        with pytest.raises(InvalidBlobId):
            subject.backend.check_blob_id(blob_id)
        with pytest.raises(InvalidBlobId):
            await subject.backend.fetch(blob_id, RangeRequest())
        with pytest.raises(InvalidBlobId):
            await subject.backend.stat(blob_id)

    async def test_ids_of_no_blob_of_this_kind_are_refused(self, subject: Subject) -> None:
        """What this kind of origin cannot have is refused as well."""
        for blob_id in subject.further_hostile_ids:
            with pytest.raises(InvalidBlobId):
                subject.backend.check_blob_id(blob_id)

    async def test_a_canonical_id_stays_itself(self, subject: Subject) -> None:
        """The canonical form of an id is its own canonical form and names the same blob."""
        blob_id = await subject.put(NAME, b"bytes")
        canonical = subject.backend.check_blob_id(blob_id)
        assert subject.backend.check_blob_id(canonical) == canonical
        assert await subject.backend.stat(canonical) == await subject.backend.stat(blob_id)

    async def test_a_stream_may_be_left_at_any_point(self, subject: Subject) -> None:
        """A stream closed unread, half read or twice leaves the backend in order."""
        data = ORACLE.blob(NAME, 1, SIZE_BYTES)
        blob_id = await subject.put(NAME, data)
        unread = await subject.backend.fetch(blob_id, RangeRequest())
        await unread.aclose()
        half_read = await subject.backend.fetch(blob_id, RangeRequest())
        async for _ in half_read:
            break
        await half_read.aclose()
        await half_read.aclose()
        assert await read_all(await subject.backend.fetch(blob_id, RangeRequest())) == data

    async def test_concurrent_fetches_do_not_mix(self, subject: Subject) -> None:
        """Fetches of several blobs at once each get their own bytes."""
        blobs = {
            await subject.put(f"blob{n}", ORACLE.blob("many", n, 100_000 + n)): n for n in range(8)
        }

        async def check(blob_id: str, version: int, first: int) -> None:
            stream = await subject.backend.fetch(blob_id, RangeRequest(first=first))
            data = await read_all(stream)
            assert len(data) == stream.span.length
            assert ORACLE.first_wrong("many", version, stream.span.start, data) is None

        async with asyncio.TaskGroup() as tasks:
            for first in (0, 1, 50_000, 99_999):
                for blob_id, version in blobs.items():
                    tasks.create_task(check(blob_id, version, first))

    async def test_a_cancelled_fetch_leaves_nothing_behind(self, subject: Subject) -> None:
        """Fetches cancelled at any moment leave the backend able to serve."""
        data = ORACLE.blob(NAME, 1, SIZE_BYTES)
        blob_id = await subject.put(NAME, data)

        async def fetch() -> bytes:
            return await read_all(await subject.backend.fetch(blob_id, RangeRequest()))

        for turns in range(12):
            task = asyncio.create_task(fetch())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await fetch() == data

    async def test_new_credentials_serve_in_place(self, subject: Subject) -> None:
        """After a rotation the same backend goes on with the new credentials."""
        data = ORACLE.blob(NAME, 1, SIZE_BYTES)
        blob_id = await subject.put(NAME, data)
        assert await read_all(await subject.backend.fetch(blob_id, RangeRequest())) == data
        rotated = await subject.rotate()
        if rotated is None:
            return
        subject.backend.reconfigure(rotated)
        assert await read_all(await subject.backend.fetch(blob_id, RangeRequest())) == data

    async def test_shutdown_twice_is_fine(self, subject: Subject) -> None:
        """Shutting down is idempotent."""
        await subject.put(NAME, b"bytes")
        await subject.backend.shutdown()
        await subject.backend.shutdown()
