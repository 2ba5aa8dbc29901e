"""A backend that ends while somebody reads from it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from blobcache_storage.backend import localfs
from blobcache_storage.backend.localfs import LocalFSBackend
from blobcache_storage.config import BackendConfig, LocalFSConfig
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import OriginUnreachable


def backend_of(folder: Path) -> LocalFSBackend:
    """Return a backend over a folder."""
    config = BackendConfig(type="localfs", localfs=LocalFSConfig(str(folder)))
    return LocalFSBackend(config, roots=None)


async def test_a_body_under_way_fails_as_an_origin_does(tmp_path: Path) -> None:
    """Its reader is told, by an error of the kind it expects."""
    (tmp_path / "a").write_bytes(bytes(3 * localfs.PIECE_BYTES))
    backend = backend_of(tmp_path)
    async with await backend.fetch("a", RangeRequest()) as stream:
        pieces = aiter(stream)
        await anext(pieces)
        await backend.shutdown()
        with pytest.raises(OriginUnreachable, match="has ended"):
            await anext(pieces)
    with pytest.raises(OriginUnreachable, match="has ended"):
        await backend.fetch("a", RangeRequest())


async def test_what_waits_for_a_thread_fails_and_is_not_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader must not take the end of a backend for its own."""
    monkeypatch.setattr(localfs, "THREADS", 1)
    (tmp_path / "a").write_bytes(bytes(localfs.PIECE_BYTES))
    backend, may_go_on, busy = backend_of(tmp_path), threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        may_go_on.wait(30)

    backend._threads.submit(work)
    await asyncio.to_thread(busy.wait, 30)
    fetching = asyncio.create_task(backend.fetch("a", RangeRequest()))
    await asyncio.sleep(0)
    await backend.shutdown()
    may_go_on.set()
    with pytest.raises(OriginUnreachable, match="has ended"):
        await fetching
