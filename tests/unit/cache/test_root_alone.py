"""A root that no configuration uses at the moment."""

from __future__ import annotations

from pathlib import Path

from tests.unit.cache.rig import CHUNK, FakeClock, Rig

from blobcache_storage.backend.open import BackendEnvironment
from blobcache_storage.cache.root import ORPHAN_SECONDS_MAX
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.factory import BlobFactory
from blobcache_storage.testing.cache_suite import until


async def test_orphans_go_though_there_is_no_manager(tmp_path: Path) -> None:
    """The last configuration of a node may go for good; its bytes must not stay."""
    clock = FakeClock()
    rig = await Rig(tmp_path / "root", clock=clock).start()
    rig.put("a", 3 * CHUNK)
    await rig.read("a")
    await rig.stop()
    runtime = StorageRuntime(clock=clock)
    factory = BlobFactory(runtime, BackendEnvironment())
    root = await factory.open_root(str(tmp_path / "root"))
    factory.check_cache_stat()
    await root.settled()
    assert [orphan.blob_id for orphan in root.orphans()] == ["a"]
    clock.advance(ORPHAN_SECONDS_MAX)
    factory.check_cache_stat()
    await until(lambda: not root.orphans())
    assert root.budget.used_bytes == 0
    await factory.close()
    await runtime.close()
