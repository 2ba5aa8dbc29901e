"""A factory with fake managers, and a configuration for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.factory.fakes import RecordingFactory

from blobcache_storage import factory as module
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import BackendConfig, CacheConfig, ConfigV2, S3Config


@pytest.fixture
async def runtime() -> AsyncIterator[StorageRuntime]:
    """The threads and memory of one test."""
    made = StorageRuntime()
    yield made
    await made.close()


@pytest.fixture
async def factory(runtime: StorageRuntime) -> AsyncIterator[RecordingFactory]:
    """A factory with fake managers, closed afterwards."""
    made = RecordingFactory(runtime)
    yield made
    for manager in made.made:
        manager.may_end.set()
    await made.close()


@pytest.fixture
def config(tmp_path: Path) -> ConfigV2:
    """A configuration of a file cache over S3."""
    return ConfigV2(
        id="team/models",
        uid="u1",
        backend=BackendConfig("s3", s3=S3Config("https://s3.example.com", "r", "b")),
        cache=CacheConfig(work_dir=str(tmp_path / "root")),
    )


@pytest.fixture
def fast_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the checker tick every millisecond."""
    monkeypatch.setattr(module, "CHECK_INTERVAL_SECONDS", 0.001)
