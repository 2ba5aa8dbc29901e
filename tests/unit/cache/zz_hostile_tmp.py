from __future__ import annotations
import asyncio, contextlib, os, threading, errno
from pathlib import Path
import pytest
from tests.unit.cache.rig import CHUNK, Rig, collect, take, FakeClock
from blobcache_storage.cache.disk import Disk
from blobcache_storage.cache.shared import SharedWork
from blobcache_storage.device import BlobInfo, RangeRequest
from blobcache_storage.errors import *
from blobcache_storage.testing.cache_suite import until
from blobcache_storage.testing.faulty_disk import WatchedDisk, FaultyDisk
from blobcache_storage.testing.memory_backend import Fault, MemoryBackend


class SlowDisk(WatchedDisk):
    def __init__(self):
        super().__init__()
        self.gate = threading.Event(); self.gate.set()
        self.when = lambda call: False
        self.entered = threading.Event()
    def before(self, call, buffers):
        if self.when(call):
            self.entered.set()
            self.gate.wait(10)
        return -1


def nfds(): return len(os.listdir("/proc/self/fd"))


async def test_1_load_cancelled_leaks_fds(tmp_path):
    disk = SlowDisk()
    rig = await Rig(tmp_path / "r", disk=disk).start()
    rig.put("a", 3 * CHUNK); await rig.read("a"); await rig.durable()
    await rig.restart()
    rig.manager.table.folder.directory()
    before = nfds()
    disk.when = lambda c: c.operation == "open" and c.name.endswith(".data")
    disk.gate.clear()
    t = asyncio.create_task(rig.read("a"))
    await asyncio.to_thread(disk.entered.wait, 5)
    t.cancel()
    with contextlib.suppress(asyncio.CancelledError): await t
    disk.gate.set()
    await asyncio.sleep(0.3)
    disk.when = lambda c: False
    left = {n for n in disk.open_files.values()}
    print("open", left, nfds() - before)
    await rig.stop()
    assert not any(n.endswith((".data", ".map")) for n in disk.open_files.values()), disk.open_files


async def test_2_innocent_waiter_cancelled(tmp_path):
    started = asyncio.Event()
    async def work():
        started.set()
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.1)
        return 1
    shared = SharedWork(work())
    a = asyncio.create_task(shared.wait())
    await started.wait()
    a.cancel()
    await asyncio.wait([a])
    b = asyncio.create_task(shared.wait())
    await asyncio.wait([b])
    assert not b.cancelled()


async def test_2b_innocent_reader(tmp_path):
    rig = await Rig(tmp_path / "r").start()
    data = rig.put("a", 3 * CHUNK)
    rig.backend.fail_next(Fault(latency_seconds=5))
    a = asyncio.create_task(rig.read("a"))
    await asyncio.sleep(0.05)
    b = None
    a.cancel()
    # b comes in the very turn in which a gave up
    await asyncio.sleep(0)
    b = asyncio.create_task(rig.read("a"))
    await asyncio.wait([a, b], timeout=3)
    try:
        assert not b.cancelled(), "innocent reader cancelled"
        assert b.result()[0] == data
    finally:
        await rig.stop()


async def test_3_make_room_cancelled_leaks_budget(tmp_path):
    disk = SlowDisk()
    rig = await Rig(tmp_path / "r", disk=disk, capacity_bytes_config=20 * CHUNK).start()
    rig.put("a", 15 * CHUNK); rig.put("b", 15 * CHUNK)
    await rig.read("a"); await rig.durable()
    await rig.restart(capacity_bytes=20 * CHUNK)
    disk.when = lambda c: c.operation == "unlink" and c.name.endswith(".map")
    disk.gate.clear()
    t = asyncio.create_task(rig.read("b"))
    await asyncio.to_thread(disk.entered.wait, 5)
    t.cancel()
    with contextlib.suppress(asyncio.CancelledError): await t
    disk.gate.set()
    await asyncio.sleep(0.3)
    disk.when = lambda c: False
    await rig.settled()
    entries = sum(e.bytes for e in rig.manager.table.folder.entries.values())
    retired = sum(g.entry.bytes for g in rig.manager.table.open_generations() if g.retired)
    used = rig.manager.table.folder.budget.used_bytes
    streams = rig.backend.open_streams
    await rig.stop()
    assert (used, streams) == (entries + retired, 0)


async def test_5_digest_read_origin_dies(tmp_path):
    backend = MemoryBackend(digest_ids=True)
    rig = await Rig(tmp_path / "r", backend=backend).start()
    import hashlib
    data = os.urandom(10 * CHUNK)
    name = "sha256:" + hashlib.sha256(data).hexdigest()
    backend.put(name, data)
    backend.fail_next(Fault(cut_after_bytes=9 * CHUNK + 100, cut_error=OriginUnreachable("cut")))
    with rig.manager.get_blob_cache(BlobInfo(name)) as cache:
        read = await cache.read(RangeRequest())
        backend.down = OriginUnreachable("down")
        try:
            got = await asyncio.wait_for(take(read), 15)
            print(len(got[0]), got[1], backend.requests)
        except TimeoutError:
            pytest.fail(f"hangs; {backend.requests} requests")
        finally:
            await read.aclose()
    await rig.stop()


async def test_6_full_disk_restart_evicts(tmp_path):
    disk = FaultyDisk(errno.ENOSPC)
    rig = await Rig(tmp_path / "r", disk=disk, capacity_bytes_config=20 * CHUNK).start()
    rig.put("a", 15 * CHUNK); await rig.read("a"); await rig.durable()
    await rig.restart(capacity_bytes=20 * CHUNK)
    disk.lasting, disk.nth = True, 1
    from blobcache_storage.cache.base import Victim
    from blobcache_storage.cache.table import version_name
    e = rig.manager.table.folder.entries["a"]
    r = await rig.manager.evict([Victim("a", version_name(e), 1e12)])
    print(r)
    files = [p.name for p in (tmp_path / "r").rglob("*.data")]
    disk.heal()
    await rig.stop()
    assert not files
