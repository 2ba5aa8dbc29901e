"""Sending files: hot and cold bytes, disks that fail, file systems that cannot tell."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from pathlib import Path

import pytest
from tests.unit.data.twin import TwinBlob, TwinRead, content, file_of, running
from tests.unit.data.wire import connected, request, until

from blobcache_agent.data import outlet
from blobcache_agent.data.limits import Limits
from blobcache_storage.cache.base import FileSpan

MIB = 1024 * 1024
SIZES = [1, 4096, 65536, 300_000, 3 * MIB + 5]


@pytest.mark.parametrize("size", SIZES)
async def test_cold_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are not in the page cache are read by threads and arrive all the same."""
    readers: set[str] = set()
    pread = os.pread

    def watched(fd: int, length: int, offset: int) -> bytes:
        readers.add(threading.current_thread().name)
        return pread(fd, length, offset)

    monkeypatch.setattr(outlet, "_read_cached", lambda fd, room, offset: 0)
    monkeypatch.setattr(os, "pread", watched)
    data = content(size)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            twin.add("blob", TwinBlob(data, file=fd, piece_bytes=MIB))
            for _ in range(2):
                assert (await wire.ask()).body == data
    assert readers
    assert all(name.startswith("data-read") for name in readers)


async def test_bytes_dropped_from_the_page_cache(tmp_path: Path) -> None:
    """The same with a page cache that was really emptied, and with one half empty."""
    data = content(4 * MIB)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            os.fsync(fd)
            twin.add("blob", TwinBlob(data, file=fd, piece_bytes=MIB))
            for start, length in ((0, 0), (MIB, MIB), (2 * MIB + 4096, 4096)):
                os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
                assert (await wire.ask()).body == data


async def test_a_file_system_that_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where RWF_NOWAIT is not known, threads read."""

    def unsupported(*args: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", unsupported)
    data = content(MIB)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            twin.add("blob", TwinBlob(data, file=fd))
            assert (await wire.ask()).body == data


@pytest.mark.parametrize("call", ["preadv", "pread"])
async def test_a_disk_that_fails_at_once(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error before the first byte is a proper answer."""

    def failing(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    if call == "pread":
        monkeypatch.setattr(outlet, "_read_cached", lambda fd, room, offset: 0)
    monkeypatch.setattr(os, call, failing)
    data = content(1000)
    async with running() as twin, connected(twin.host, twin.port) as wire:
        with file_of(data, tmp_path) as fd:
            twin.add("blob", TwinBlob(data, file=fd))
            answer = await wire.ask()
            assert (answer.status, json.loads(answer.body)["code"]) == (503, "DiskError")
            (record,) = await twin.observer.wait_for_records(1)
            assert not record.aborted


@pytest.mark.parametrize("kept", [0, 4096, 700_000])
async def test_a_file_that_became_too_short(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is told how far its span got, and what it yields then is sent."""
    data = content(MIB)
    told: list[int] = []

    def failed(self: TwinRead, span: FileSpan, sent_bytes: int) -> bool:
        told.append(span.offset + sent_bytes)
        self.resume(span.offset + sent_bytes)
        return True

    monkeypatch.setattr(TwinRead, "span_failed", failed)
    async with running() as twin, connected(twin.host, twin.port, limit=MIB) as wire:
        with file_of(data, tmp_path) as fd:
            os.truncate(tmp_path / "data", kept)
            twin.add("blob", TwinBlob(data, file=fd, piece_bytes=MIB))
            answer = await wire.ask()
            assert (answer.status, answer.body) == (200, data)
            (record,) = await twin.observer.wait_for_records(1)
            assert (record.aborted, record.bytes_sent) == (False, MIB)
    assert told == [kept]


async def test_a_reader_who_leaves_while_a_thread_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor stays open until the thread that reads from it is done."""
    begun, go_on = threading.Event(), threading.Event()
    pread = os.pread

    def slow(fd: int, length: int, offset: int) -> bytes:
        begun.set()
        go_on.wait(30)
        return pread(fd, length, offset)

    monkeypatch.setattr(outlet, "_read_cached", lambda fd, room, offset: 0)
    monkeypatch.setattr(os, "pread", slow)
    data = content(1000)
    async with running() as twin:
        with file_of(data, tmp_path) as fd:
            blob = twin.add("blob", TwinBlob(data, file=fd))
            async with connected(twin.host, twin.port) as wire:
                await wire.send(request())
                await until(begun.is_set)
                (connection,) = twin.server._connections
                connection.cut("ReaderGone")
                await until(lambda: twin.server.connections == 0)
                await asyncio.sleep(0)
                assert blob.open_reads == 1
                go_on.set()
                await blob.closed.wait()
                (record,) = await twin.observer.wait_for_records(1)
                assert (record.status, record.aborted) == (499, True)


async def test_a_head_longer_than_the_socket_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little a socket takes at a time, head and body arrive in order."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    data = content(70_000)
    with file_of(data, tmp_path) as fd:
        for file in (None, fd):
            limits = Limits(write_buffer_bytes=1)
            async with running(limits=limits) as twin, connected(twin.host, twin.port) as wire:
                monkeypatch.setattr(outlet, "JOIN_BYTES_MAX", 1024)
                twin.add("blob", TwinBlob(data, file=file))
                assert (await wire.ask()).body == data
