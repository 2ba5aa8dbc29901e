"""The factory with its real managers, over local files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.factory.fakes import with_backend, with_cache

from blobcache_storage.backend.open import BackendEnvironment
from blobcache_storage.cache.base import CacheStatus, FileSpan
from blobcache_storage.cache.dummycache import DummyCacheMgr
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import BackendConfig, CacheConfig, ConfigV2, LocalFSConfig
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import ConfigError
from blobcache_storage.factory import BlobFactory

DATA = bytes(range(256)) * 1024


@pytest.fixture
async def real(runtime: StorageRuntime, tmp_path: Path) -> AsyncIterator[BlobFactory]:
    """A factory that may read local files, its root opened."""
    factory = BlobFactory(runtime, BackendEnvironment(localfs_roots=None))
    await factory.open_root(str(tmp_path / "root"))
    yield factory
    await factory.close()


@pytest.fixture
def local(tmp_path: Path) -> ConfigV2:
    """A file cache over a directory with one blob."""
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "blob").write_bytes(DATA)
    return ConfigV2(
        id="team/local",
        uid="u1",
        backend=BackendConfig("localfs", localfs=LocalFSConfig(directory=str(origin))),
        cache=CacheConfig(work_dir=str(tmp_path / "root")),
    )


async def read(factory: BlobFactory, config: ConfigV2) -> tuple[bytes, CacheStatus]:
    """Read the blob through a handle of its own."""
    pieces = []
    with factory.new_blob_cache(config, BlobInfo("blob")) as blob:
        async with await blob.read(RangeRequest()) as under_way:
            async for piece in under_way.pieces():
                pieces.append(await asyncio.to_thread(as_bytes, piece))
            return b"".join(pieces), under_way.status


def as_bytes(piece: bytes | memoryview | FileSpan) -> bytes:
    """Return a piece's bytes."""
    if isinstance(piece, FileSpan):
        with open(f"/proc/self/fd/{piece.fd}", "rb") as file:
            file.seek(piece.offset)
            return file.read(piece.length)
    return bytes(piece)


async def test_a_miss_then_a_hit(real: BlobFactory, local: ConfigV2) -> None:
    """Both with the origin's bytes."""
    assert await read(real, local) == (DATA, CacheStatus.MISS_STORED)
    assert await read(real, local) == (DATA, CacheStatus.HIT)


@pytest.mark.parametrize("kind", ["blobcache", "filecache"])
async def test_both_names_are_the_file_cache(real: BlobFactory, local: ConfigV2, kind: str) -> None:
    """Nydus's synonyms."""
    assert isinstance(await real.ensure_manager(with_cache(local, type=kind)), FileCacheMgr)


@pytest.mark.parametrize("kind", ["", "dummycache", "anything"])
async def test_any_other_type_passes_through(real: BlobFactory, local: ConfigV2, kind: str) -> None:
    """As in the seed, and an empty one is reclaimed, unlike there."""
    config = with_cache(local, type=kind)
    assert await read(real, config) == (DATA, CacheStatus.BYPASS)
    (manager,) = real.managers().values()
    assert isinstance(manager, DummyCacheMgr)
    real.gc(None)
    assert real.managers() == {}


async def test_an_unknown_backend_type(real: BlobFactory, local: ConfigV2) -> None:
    """The seed's words."""
    unknown = with_backend(local, type="nfs")
    with pytest.raises(ConfigError, match=r"^unsupported backend type 'nfs'$"):
        real.new_blob_cache(unknown, BlobInfo("blob"))
    with pytest.raises(ConfigError, match=r"^unsupported backend type 'nfs'$"):
        real.new_backend(unknown.get_backend_config(), "blob")
    assert real.managers() == {}


async def test_gc_deletes_nothing_and_the_next_manager_has_a_hit(
    real: BlobFactory, local: ConfigV2
) -> None:
    """Deleting data is eviction."""
    await read(real, local)
    async with asyncio.timeout(30):
        while real.managers():  # what was read is in use until it is safe on disk
            real.gc(None)
            await asyncio.sleep(0.05)
    await real.ensure_manager(local)
    assert (await read(real, local))[1] is CacheStatus.HIT


async def test_a_moved_origin_is_served_its_own_bytes(
    real: BlobFactory, local: ConfigV2, tmp_path: Path
) -> None:
    """And moving back finds the former ones again."""
    moved_to = tmp_path / "moved"
    await asyncio.to_thread(moved_to.mkdir)
    other = DATA[::-1]
    await asyncio.to_thread((moved_to / "blob").write_bytes, other)
    moved = with_backend(local, localfs=LocalFSConfig(directory=str(moved_to)))
    await real.ensure_manager(local)
    await read(real, local)
    await real.ensure_manager(moved)
    assert await read(real, moved) == (other, CacheStatus.MISS_STORED)
    await real.ensure_manager(local)
    assert await read(real, local) == (DATA, CacheStatus.HIT)


async def test_two_resources_share_nothing(real: BlobFactory, local: ConfigV2) -> None:
    """Though they name the same directory."""
    await read(real, local)
    other = replace(local, id="other/local", uid="u2")
    assert (await read(real, other))[1] is CacheStatus.MISS_STORED


async def test_permissions_may_differ_by_configuration(
    runtime: StorageRuntime, local: ConfigV2
) -> None:
    """One tenant's local folders are not another's."""

    def environment_of(config: ConfigV2) -> BackendEnvironment:
        allowed = config.id.startswith("team/")
        return BackendEnvironment(localfs_roots=None if allowed else ())

    factory = BlobFactory(runtime, BackendEnvironment(), environment_of=environment_of)
    passing = with_cache(local, type="")
    assert (await read(factory, passing))[0] == DATA
    with pytest.raises(ConfigError):
        factory.new_blob_cache(replace(passing, id="other/local"), BlobInfo("blob"))
    await factory.close()
