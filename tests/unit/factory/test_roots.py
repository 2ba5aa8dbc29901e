"""Cache roots: opened once, before the managers that need them, and given back at the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from tests.unit.factory.fakes import with_cache

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import BackendConfig, ConfigV2
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import CacheError, ConfigError
from blobcache_storage.factory import BlobFactory
from blobcache_storage.testing.memory_backend import MemoryBackend


def open_memory(config: BackendConfig, *, environment: object) -> BlobBackend:
    """Open a backend in memory, whatever is asked for."""
    return MemoryBackend()


def new_factory(runtime: StorageRuntime) -> BlobFactory:
    """Make the real factory, but for its origins."""
    return BlobFactory(runtime, cast("Any", None), open_backend=open_memory)


async def test_one_path_is_one_root(runtime: StorageRuntime, tmp_path: Path) -> None:
    """However often and however written it is asked for, at once or later."""
    factory = new_factory(runtime)
    path = f"{tmp_path}/root"
    roots = await asyncio.gather(*(factory.open_root(path) for _ in range(3)))
    roots.append(await factory.open_root(f"{tmp_path}/./root/"))
    assert len({id(root) for root in roots}) == 1
    await factory.close()


async def test_a_root_is_given_back_at_the_end(runtime: StorageRuntime, tmp_path: Path) -> None:
    """Its lock is free for the next process, or factory."""
    first, second = new_factory(runtime), new_factory(runtime)
    path = str(tmp_path / "root")
    await first.open_root(path)
    with pytest.raises(ConfigError, match="another process"):
        await second.open_root(path)
    await first.close()
    assert isinstance(await second.open_root(path), CacheRoot)
    await second.close()
    with pytest.raises(CacheError, match="closed"):
        await second.open_root(path)


async def test_a_root_that_failed_may_be_tried_again(
    runtime: StorageRuntime, tmp_path: Path
) -> None:
    """The failure is not kept."""
    factory = new_factory(runtime)
    parent = tmp_path / "later"
    with pytest.raises(ConfigError):
        await factory.open_root(str(parent / "root"))
    await asyncio.to_thread(parent.mkdir)
    await factory.open_root(str(parent / "root"))
    await factory.close()


async def test_a_file_cache_needs_an_open_root(runtime: StorageRuntime, config: ConfigV2) -> None:
    """The message names the directory."""
    factory = new_factory(runtime)
    with pytest.raises(ConfigError, match="has not been opened"):
        factory.new_blob_cache(config, BlobInfo("blob"))
    assert factory.managers() == {}
    await factory.close()


async def test_fscache_is_not_supported_yet(runtime: StorageRuntime, config: ConfigV2) -> None:
    """And says what to use."""
    factory = new_factory(runtime)
    with pytest.raises(ConfigError, match="'fscache' is not supported yet: use 'filecache'"):
        await factory.ensure_manager(with_cache(config, type="fscache"))
    await factory.close()
