"""Waiting for changes."""

from __future__ import annotations

import asyncio

from blobcache_storage.cache.shared import Changes


async def test_a_change_between_looking_and_waiting_is_not_lost() -> None:
    """However many others waited and were woken meanwhile."""
    changes = Changes()
    seen = changes.count
    other = changes.since(seen)
    changes.note()
    assert other.done()
    assert not changes.since(changes.count).done()
    await asyncio.wait_for(changes.since(seen), timeout=1)


async def test_all_who_wait_are_woken_and_those_who_gave_up_forgotten() -> None:
    """A waiter that was cancelled leaves nothing behind."""
    changes = Changes()
    waiters = [changes.since(0) for _ in range(3)]
    waiters[0].cancel()
    await asyncio.sleep(0)
    assert len(changes._waiters) == 2
    changes.note()
    await asyncio.gather(*waiters[1:])
    assert not changes._waiters
