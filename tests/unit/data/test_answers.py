"""What the server answers: statuses of errors, records, bodies cut short and never padded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.unit.data.twin import TwinBlob, content, file_of, running
from tests.unit.data.wire import connected, request

from blobcache_agent.data.catalog import NotReady, ResponseRecord
from blobcache_storage import errors
from blobcache_storage.cache.base import CacheStatus

MIB = 1024 * 1024

FAILURES: list[tuple[BaseException, int, str, str | None]] = [
    (errors.InvalidBlobId("no"), 404, "InvalidBlobId", None),
    (errors.BlobNotFound("no"), 404, "BlobNotFound", None),
    (errors.OriginDenied("no", status=401), 403, "OriginDenied", None),
    (errors.OriginThrottled("no"), 503, "OriginThrottled", "1"),
    (errors.OriginThrottled("no", retry_after_seconds=7.2), 503, "OriginThrottled", "8"),
    (errors.OriginThrottled("no", retry_after_seconds=0), 503, "OriginThrottled", "1"),
    (errors.OriginThrottled("no", retry_after_seconds=1e9), 503, "OriginThrottled", "3600"),
    (errors.CacheBusy("no"), 503, "CacheBusy", "1"),
    (errors.CircuitOpen("no", retry_after_seconds=3), 503, "CircuitOpen", "3"),
    (errors.CredentialsPending("no"), 503, "CredentialsPending", "5"),
    (errors.DiskFull("no"), 503, "DiskFull", "1"),
    (errors.DiskError("no"), 503, "DiskError", "1"),
    (errors.ConfigError("no"), 503, "InvalidConfig", "1"),
    (errors.OriginTimeout("no"), 504, "OriginTimeout", None),
    (errors.OriginServerError("no", status=500), 502, "OriginServerError", None),
    (errors.OriginUnreachable("no"), 502, "OriginUnreachable", None),
    (errors.OriginRefused("no"), 502, "OriginRefused", None),
    (errors.OriginProtocolError("no"), 502, "OriginProtocolError", None),
    (errors.BackendError("no"), 502, "OriginError", None),
    (errors.BlobChanged("no"), 502, "BlobChanged", None),
    (errors.DigestMismatch("no"), 502, "DigestMismatch", None),
    (errors.RangeNotSatisfiable(5), 416, "RangeNotSatisfiable", None),
    (errors.StorageError("secret detail"), 500, "InternalError", None),
    (RuntimeError("secret detail"), 500, "InternalError", None),
    (OSError(5, "secret detail"), 500, "InternalError", None),
    (MemoryError("secret detail"), 500, "InternalError", None),
]


@pytest.mark.parametrize(
    ("error", "status", "reason", "retry_after"),
    FAILURES,
    ids=[f"{index} {case[2]}" for index, case in enumerate(FAILURES)],
)
@pytest.mark.parametrize("stage", ["read", "first piece"])
async def test_a_failure_before_the_head(
    stage: str, error: BaseException, status: int, reason: str, retry_after: str | None
) -> None:
    """Until a byte was sent a read may fail with a proper answer, and the connection goes on."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        if stage == "read":
            twin.add("blob", TwinBlob(content(10), read_error=error))
        else:
            twin.add("blob", TwinBlob(content(10), fail_after=0, piece_error=error))
        answer = await wire.ask()
        assert answer.status == status
        assert json.loads(answer.body)["code"] == reason
        assert answer.headers.get("retry-after") == retry_after
        assert answer["Content-Type"] == "application/json"
        assert "etag" not in answer.headers
        assert b"secret" not in answer.body
        assert twin.observer.errors == ([error] if reason == "InternalError" else [])
        assert (await wire.ask()).status == status
        record = (await twin.observer.wait_for_records(2))[0]
        assert (record.status, record.reason, record.aborted) == (status, reason, False)
        assert (record.namespace, record.name) == ("team", "models")


async def test_not_ready() -> None:
    """Before a state was applied every lookup is 503, with the reason that was given."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.catalog.not_ready = NotReady("NoStateYet", "no state yet", retry_after_seconds=2.5)
        answer = await wire.ask()
        assert (answer.status, answer["Retry-After"]) == (503, "3")
        assert json.loads(answer.body) == {"code": "NoStateYet", "message": "no state yet"}
        record = (await twin.observer.wait_for_records(1))[0]
        assert (record.namespace, record.name) == ("", ""), "strangers make no labels"


@pytest.mark.parametrize("status", CacheStatus, ids=lambda status: status.name)
async def test_cache_status(status: CacheStatus) -> None:
    """Cache-Status is exactly RFC 9211's words."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(10), status=status))
        for method in ("GET", "HEAD"):
            answer = await wire.ask(method)
            assert answer["Cache-Status"] == f"blobcache; {status.value}"


async def test_what_an_origin_sent_is_no_header_of_ours() -> None:
    """A validator that could not be a header line is left out, not sent."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(b"x", etag='"a"\r\nX: y', last_modified="a\r\nX: y"))
        answer = await wire.ask()
        assert answer.status == 200
        assert not {"etag", "last-modified", "x"} & set(answer.headers)


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("size", [1, 65536, 65537, 256 * 1024, 5 * MIB + 17])
async def test_bodies(size: int, file: bool, tmp_path: Path) -> None:
    """Bodies of all sizes arrive whole, from memory and from files, ranged and not."""
    data = content(size)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            twin.add("blob", TwinBlob(data, file=fd if file else None, piece_bytes=MIB))
            assert (await wire.ask()).body == data
            middle = size // 2
            ranged = await wire.ask(headers={"Range": f"bytes={middle}-"})
            assert ranged.body == data[middle:]
            records = await twin.observer.wait_for_records(2)
            assert [record.bytes_sent for record in records] == [size, size - middle]


@pytest.mark.parametrize("file", [False, True])
async def test_a_failure_after_the_head_closes_short(file: bool, tmp_path: Path) -> None:
    """Once a head was sent a failure ends the connection: no padding, no error in the body."""
    data = content(3 * MIB)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            blob = twin.add(
                "blob",
                TwinBlob(
                    data,
                    file=fd if file else None,
                    piece_bytes=100_000,
                    fail_after=1_000_000,
                    piece_error=errors.OriginUnreachable("gone"),
                ),
            )
            await wire.send(request() + request())
            status, headers = await wire.head()
            assert (status, headers["content-length"]) == (200, str(len(data)))
            body = await wire.rest()
            assert len(body) <= 1_000_000
            assert data.startswith(body)
            (record,) = await twin.observer.wait_for_records(1)
            assert (record.reason, record.aborted) == ("OriginUnreachable", True)
            assert blob.total_reads == 1, "the pipelined request was not served"


async def test_a_file_that_lost_bytes_closes_short(tmp_path: Path) -> None:
    """A data file shorter than its span is a failed disk, not a shorter blob."""
    data = content(100_000)
    async with running() as twin, connected(twin.host, twin.port) as wire:
        with file_of(data[:60_000], tmp_path) as fd:
            twin.add("blob", TwinBlob(data, file=fd))
            await wire.send(request())
            await wire.head()
            assert await wire.rest() == data[:60_000]
            (record,) = await twin.observer.wait_for_records(1)
            assert (record.reason, record.aborted) == ("DiskError", True)


async def test_an_engine_that_yields_too_little_or_too_much() -> None:
    """The length that was promised is kept, or the connection is cut."""
    data = content(1000)
    async with running() as twin:
        for extra, expected in ((b"more", data), (b"", data)):
            async with connected(twin.host, twin.port) as wire:
                twin.add("blob", TwinBlob(data, extra=extra))
                await wire.send(request())
                await wire.head()
                assert await wire.reader.readexactly(len(expected)) == expected
                if extra:
                    assert await wire.rest() == b""
        assert len(twin.observer.errors) == 1
        assert "more bytes" in str(twin.observer.errors[0])


async def test_records() -> None:
    """Each response leaves one record that says what happened."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        twin.add("blob", TwinBlob(content(100), status=CacheStatus.PARTIAL_STORED))
        await wire.ask(headers={"Range": "bytes=10-19"})
        await wire.ask("HEAD")
        await wire.ask(headers={"If-Match": '"v2"'})
        await wire.ask(path="/v1/blobs/team/models/..")
        ranged, head, failed, invalid = await twin.observer.wait_for_records(4)
        assert ranged == ResponseRecord(
            method="GET",
            status=206,
            reason="",
            namespace="team",
            name="models",
            blob_id="blob",
            cache_status="fwd=partial; stored",
            bytes_sent=10,
            duration_seconds=ranged.duration_seconds,
            aborted=False,
        )
        assert ranged.duration_seconds >= 0
        assert (head.method, head.status, head.bytes_sent) == ("HEAD", 200, 0)
        assert (failed.status, failed.reason) == (412, "PreconditionFailed")
        assert (invalid.status, invalid.reason, invalid.blob_id) == (404, "InvalidBlobId", "")


async def test_if_range_reads_the_whole_anew() -> None:
    """A range that does not apply is given back before the whole is read."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(100)))
        answer = await wire.ask(headers={"Range": "bytes=1-2", "If-Range": '"old"'})
        assert (answer.status, answer.body) == (200, blob.data)
        await twin.observer.wait_for_records(1)
        assert (blob.total_reads, blob.open_reads, blob.open_handles) == (2, 0, 0)


HTTP_1_0 = [
    ("1.0", {}, False, "close"),
    ("1.0", {"Connection": "keep-alive"}, True, "keep-alive"),
    ("1.0", {"Connection": "Keep-Alive"}, True, "keep-alive"),
    ("1.1", {}, True, None),
    ("1.1", {"Connection": "close"}, False, "close"),
    ("1.1", {"Connection": "CLOSE"}, False, "close"),
    ("1.1", {"Connection": "foo, close"}, False, "close"),
    ("1.1", {"Connection": "keep-alive"}, True, None),
]


@pytest.mark.parametrize(("version", "headers", "goes_on", "connection"), HTTP_1_0)
async def test_persistence(
    version: str, headers: dict[str, str], goes_on: bool, connection: str | None
) -> None:
    """RFC 9112 section 9.3: who closes when, said in the answer."""
    async with running() as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(100)))
        answer = await wire.ask(headers=headers, version=version)
        assert (answer.status, answer.body) == (200, blob.data)
        assert answer.headers.get("connection") == connection
        if goes_on:
            assert (await wire.ask(headers=headers, version=version)).body == blob.data
        else:
            assert await wire.rest() == b""


async def test_an_observer_that_raises_ends_the_connection_only() -> None:
    """A bug in the bookkeeping must not leave readers hanging, nor stop the server."""
    async with running() as twin:
        twin.add("blob", TwinBlob(content(10)))
        failure = ValueError("bookkeeping")
        original = twin.observer.on_response

        def failing(record: ResponseRecord) -> None:
            raise failure

        twin.observer.on_response = failing  # type: ignore[method-assign]
        async with connected(twin.host, twin.port) as wire:
            await wire.send(request())
            await wire.rest()
        assert twin.observer.errors == [failure]
        twin.observer.on_response = original  # type: ignore[method-assign]
        async with connected(twin.host, twin.port) as wire:
            assert (await wire.ask()).status == 200


async def test_answers_of_a_thousand_kept_connections() -> None:
    """A thousand readers with kept connections are served, again and again."""
    count = 1000
    data = content(2000)
    async with running() as twin:
        twin.add("blob", TwinBlob(data))
        everyone_is_here = asyncio.Barrier(count)

        async def reader(index: int) -> None:
            async with connected(twin.host, twin.port) as wire:
                for turn in range(2):
                    start = (index * 7 + turn) % 1000
                    answer = await wire.ask(headers={"Range": f"bytes={start}-{start + 99}"})
                    assert answer.body == data[start : start + 100]
                    await everyone_is_here.wait()

        async with asyncio.TaskGroup() as group:
            for index in range(count):
                group.create_task(reader(index))
        assert len(twin.observer.records) == 2 * count
