"""Which configurations share a manager, and how long one lives."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from tests.unit.factory.fakes import FakeManager, RecordingFactory, with_backend, with_cache

from blobcache_storage.config import ConfigV2, PrefetchConfig, S3Config
from blobcache_storage.credentials import AccessKey, Anonymous
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import CacheBusy, CacheError, ConfigError, InvalidBlobId
from blobcache_storage.factory import ManagerKey

BLOB = BlobInfo("blob")


async def settle() -> None:
    """Let background tasks go on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_new_factory_has_no_managers(factory: RecordingFactory) -> None:
    """And gc and a check of nothing are no errors."""
    assert factory.managers() == {}
    factory.gc(None)
    factory.check_cache_stat()


async def test_equal_configurations_share_a_manager(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Equal, not identical."""
    first = factory.new_blob_cache(config, BLOB)
    second = factory.new_blob_cache(replace(config), BlobInfo("other"))
    assert len(factory.made) == 1
    assert factory.made[0].started
    assert len(factory.made[0].configs) == 1
    assert (first.blob_id, second.blob_id) == ("blob", "other")


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "team/other"},
        {"uid": "u2"},
        {"cache": {"type": "dummycache"}},
        {"cache": {"work_dir": "/elsewhere"}},
        {"cache": {"chunk_size_bytes": 1 << 20}},
        {"cache": {"validate": False}},
        {"backend": {"s3": S3Config("https://s3.example.com", "r", "other")}},
        {"backend": {"ca_bundle_pem": "x"}},
        {"backend": {"insecure_skip_verify": True}},
    ],
)
async def test_what_decides_bytes_or_their_place_makes_another_manager(
    factory: RecordingFactory, config: ConfigV2, changes: dict[str, Any]
) -> None:
    """One field is enough."""
    other = with_cache(config, **changes.pop("cache", {}))
    other = with_backend(other, **changes.pop("backend", {}))
    factory.new_blob_cache(config, BLOB)
    factory.new_blob_cache(replace(other, **changes), BLOB)
    assert len(factory.managers()) == 2


@pytest.mark.parametrize(
    ("backend", "cache"),
    [
        ({"credentials": AccessKey("AK", SecretStr("rotated"))}, {}),
        ({"timeout_seconds": 9.0}, {}),
        ({"retry_limit": 0}, {}),
        ({"bytes_per_second_limit": 1}, {}),
        ({}, {"capacity_bytes": 1}),
        ({}, {"prefetch": PrefetchConfig(enable=True)}),
        ({}, {"pinned": frozenset({"a"})}),
        ({}, {"ttl_seconds": 60}),
        ({}, {"suspend": True}),
    ],
)
async def test_what_may_change_does_so_in_place(
    factory: RecordingFactory, config: ConfigV2, backend: dict[str, Any], cache: dict[str, Any]
) -> None:
    """A rotated credential, above all, makes no second manager over the same files."""
    factory.new_blob_cache(config, BLOB)
    changed = with_cache(with_backend(config, **backend), **cache)
    factory.new_blob_cache(changed, BLOB)
    await factory.ensure_manager(replace(changed))
    assert len(factory.made) == 1
    assert factory.made[0].configs == [config, changed]


async def test_a_key_holds_no_secret(config: ConfigV2) -> None:
    """It may end up in a log line."""
    secret = with_backend(config, credentials=AccessKey("AK", SecretStr("hunter2")))
    assert "AK" not in repr(ManagerKey.of(secret))
    assert ManagerKey.of(secret) == ManagerKey.of(with_backend(config, credentials=Anonymous()))


async def test_a_missing_section_is_named(factory: RecordingFactory, config: ConfigV2) -> None:
    """Backend or cache."""
    with pytest.raises(ConfigError, match="`backend` section"):
        factory.new_blob_cache(replace(config, backend=None), BLOB)
    with pytest.raises(ConfigError, match="`cache` section"):
        factory.new_blob_cache(replace(config, cache=None), BLOB)


async def test_a_failed_backend_leaves_nothing(factory: RecordingFactory, config: ConfigV2) -> None:
    """The next try starts afresh."""
    with pytest.raises(ConfigError, match=r"^unsupported backend type 'nfs'$"):
        factory.new_blob_cache(with_backend(config, type="nfs"), BLOB)
    assert factory.managers() == {}


async def test_a_failed_init_leaves_nothing(factory: RecordingFactory, config: ConfigV2) -> None:
    """The manager that did not start is ended, its backend closed."""

    def break_init(manager: FakeManager) -> None:
        def fail() -> None:
            raise CacheError("no workers")

        manager.init = fail  # type: ignore[method-assign]

    factory.on_make = break_init
    with pytest.raises(CacheError, match="no workers"):
        factory.new_blob_cache(config, BLOB)
    assert factory.managers() == {}
    await settle()
    assert factory.made[0].destroyed == 1
    assert factory.backends[0].is_shut_down
    factory.on_make = lambda manager: None
    assert factory.new_blob_cache(config, BLOB).blob_id == "blob"


async def test_a_refused_blob_leaves_an_empty_manager_until_gc(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """As in the seed."""
    with pytest.raises(InvalidBlobId):
        factory.new_blob_cache(config, BlobInfo(".."))
    assert len(factory.managers()) == 1
    factory.gc(None)
    assert factory.managers() == {}


async def test_gc_drops_only_what_nobody_uses(factory: RecordingFactory, config: ConfigV2) -> None:
    """The manager goes with its last blob, and ends in the background."""
    handle = factory.new_blob_cache(config, BLOB)
    factory.gc(None)
    assert len(factory.managers()) == 1
    handle.close()
    factory.gc(None)
    assert factory.managers() == {}
    assert factory.made[0].destroyed == 0
    await settle()
    assert factory.made[0].destroyed == 1


async def test_gc_with_a_victim_touches_only_that_blob(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Its manager goes if it was the last one; other managers stay."""
    other = replace(config, uid="u2")
    for of, blob_id in ((config, "a"), (config, "b"), (other, "a")):
        factory.new_blob_cache(of, BlobInfo(blob_id)).close()
    factory.gc((config, "a"))
    assert factory.made[0].blobs == {"b"}
    assert len(factory.managers()) == 2
    factory.gc((replace(config), "b"))
    assert list(factory.managers().values()) == [factory.made[1]]
    factory.gc((config, "b"))


async def test_a_manager_that_ends_badly_is_told_and_forgotten(
    factory: RecordingFactory, config: ConfigV2, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it who could be told."""
    factory.new_blob_cache(config, BLOB).close()
    factory.made[0].destroy_error = OSError("gone")
    factory.gc(None)
    await settle()
    assert "did not end cleanly" in caplog.text


async def test_a_retained_manager_outlives_its_blobs(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Until it is released."""
    manager = await factory.ensure_manager(config)
    assert await factory.ensure_manager(replace(config)) is manager
    factory.new_blob_cache(config, BLOB).close()
    factory.gc(None)
    assert factory.made[0].blobs == set()
    assert list(factory.managers().values()) == [manager]
    await factory.release_manager(config)
    assert factory.managers() == {}


async def test_a_released_manager_serves_its_readers_to_the_end(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Its prefetch stops at once; the checker ends it after the last reader."""
    wanted = with_cache(config, prefetch=PrefetchConfig(enable=True, blobs=(BLOB,)))
    await factory.ensure_manager(wanted)
    handle = factory.new_blob_cache(wanted, BLOB)
    await factory.release_manager(wanted)
    assert factory.made[0].configs == [wanted, config]
    factory.check_cache_stat()
    assert len(factory.managers()) == 1
    handle.close()
    factory.check_cache_stat()
    assert factory.managers() == {}


async def test_a_released_manager_can_be_taken_back(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """While it has not ended."""
    manager = await factory.ensure_manager(config)
    factory.new_blob_cache(config, BLOB)
    await factory.release_manager(config)
    assert await factory.ensure_manager(config) is manager
    factory.made[0].handles.clear()
    factory.check_cache_stat()
    factory.gc(None)
    assert len(factory.managers()) == 1


async def test_releasing_what_is_not_there_is_no_error(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Whoever releases twice is right both times."""
    await factory.release_manager(config)


async def test_a_folder_has_one_manager_at_a_time(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """A changed endpoint's manager begins when the former one has ended, readers or not."""
    await factory.ensure_manager(config)
    factory.new_blob_cache(config, BLOB)
    former = factory.made[0]
    former.may_end.clear()
    moved = with_backend(config, s3=S3Config("https://s3.example.com", "r", "moved"))
    waiting = [asyncio.create_task(factory.ensure_manager(moved)) for _ in range(2)]
    await settle()
    assert factory.managers() == {}
    with pytest.raises(CacheBusy):
        factory.new_blob_cache(moved, BLOB)
    former.may_end.set()
    managers = await asyncio.gather(*waiting)
    assert managers == [factory.made[1]] * 2
    assert former.destroyed == 1
    assert list(factory.managers()) == [ManagerKey.of(moved)]


async def test_pass_through_managers_have_no_folder_to_quarrel_over(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """Two of them may stand side by side."""
    dummy = with_cache(config, type="")
    await factory.ensure_manager(dummy)
    await factory.ensure_manager(with_backend(dummy, insecure_skip_verify=True))
    assert len(factory.managers()) == 2


async def test_the_checker_starts_once_and_ticks_at_once(
    factory: RecordingFactory, config: ConfigV2
) -> None:
    """The next tick is seconds away."""
    await factory.ensure_manager(config)
    factory.start_mgr_checker()
    factory.start_mgr_checker()
    await settle()
    assert factory.made[0].checks == 1


@pytest.mark.usefixtures("fast_checker")
async def test_one_failing_manager_does_not_stop_the_checker(
    factory: RecordingFactory, config: ConfigV2, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor the checks of the others."""
    caplog.set_level(logging.CRITICAL)
    for uid in ("u1", "u2"):
        await factory.ensure_manager(replace(config, uid=uid))
    factory.made[0].check_error = RuntimeError("broken")
    factory.start_mgr_checker()
    async with asyncio.timeout(30):
        await factory.made[1].checked_thrice.wait()
    assert factory.made[0].checks >= 3


async def test_close_waits_for_every_manager(factory: RecordingFactory, config: ConfigV2) -> None:
    """Those that were ending already too; and it may be called twice."""
    for uid in ("u1", "u2"):
        factory.new_blob_cache(replace(config, uid=uid), BLOB)
        factory.made[-1].may_end.clear()
    factory.made[0].handles.clear()
    factory.start_mgr_checker()
    factory.gc(None)
    closing = asyncio.create_task(factory.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    for manager in factory.made:
        manager.may_end.set()
    await closing
    assert [manager.destroyed for manager in factory.made] == [1, 1]
    await factory.close()
    with pytest.raises(CacheError, match="closed"):
        factory.new_blob_cache(config, BLOB)
