"""Bounded threads and bounded memory: what all managers of a process share."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol, TypeVar

from blobcache_storage.errors import CacheBusy

T = TypeVar("T")

_Job = Callable[[], None]


class WorkerPool:
    """At most `threads_max` threads which end after `idle_seconds` without work.

    Unlike `ThreadPoolExecutor` it gives threads back, as Nydus's flusher does. `run` belongs to
    one event loop's thread. Jobs are bounded by those who submit them (one write and one sync per
    file, one read per reader), so the queue has no bound of its own.
    """

    def __init__(self, name: str, threads_max: int, *, idle_seconds: float = 10.0) -> None:
        self._name = name
        self._threads_max = threads_max
        self._idle_seconds = idle_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        """Held for moments, to put a job or to leave: no job is stranded, no thread uncounted."""
        self._pending = 0
        self._closed = False

    @property
    def thread_count(self) -> int:
        """Threads now alive."""
        return len(self._threads)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a blocking function in a thread and return what it returns.

        A caller that is cancelled leaves the function running: what it touches must stay open
        until `run` was seen to end; shield it where that matters.
        """
        assert not self._closed, f"the pool '{self._name}' is closed"
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            self._pending -= 1
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:
                error = raised
            loop.call_soon_threadsafe(deliver, result, error)

        self._pending += 1
        with self._lock:
            self._jobs.put(job)
            if len(self._threads) < min(self._threads_max, self._pending):
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.add(thread)
                thread.start()
        return await future

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_seconds)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._threads.discard(threading.current_thread())
                        return
                continue
            if job is None:
                return
            job()

    def close(self) -> None:
        """Let threads end after the jobs already queued; blocks until they did. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            threads = list(self._threads)
            for _ in threads:
                self._jobs.put(None)
        for thread in threads:
            thread.join()


class Spare(Protocol):
    """Memory of the pool that is kept in case somebody wants it again."""

    def reclaim(self) -> None:
        """Note that the pool took it, for somebody who needs it."""


class BufferPool:
    """Memory for chunks on their way: a bounded number of bytes, then a bounded queue.

    What is kept only in case (`offer`) is used memory that gives way, the longest kept first.
    Belongs to one event loop; first come, first served.
    """

    def __init__(self, bytes_max: int, waiters_max: int) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0
        self._waiters_max = waiters_max
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._spare: OrderedDict[Spare, int] = OrderedDict()
        self._spare_bytes = 0

    def try_acquire(self, length: int) -> bool:
        """Take `length` bytes at once; False where one would have to wait."""
        if self._waiters or not self._make_fit(length):
            return False
        self.used_bytes += length
        return True

    async def acquire(self, length: int) -> None:
        """Take `length` bytes, waiting in the queue if need be; `release` gives them back.

        Raises:
            CacheBusy: The queue is full too.
        """
        if self.try_acquire(length):
            return
        if len(self._waiters) >= self._waiters_max:
            raise CacheBusy("the cache's memory for blobs on their way is used up")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (length, granted)
        self._waiters.append(place)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(length)
            else:
                self._waiters.remove(place)
                self._grant()
            raise

    def release(self, length: int) -> None:
        """Give bytes back and let waiters in."""
        assert length <= self.used_bytes, "more memory released than was acquired"
        self.used_bytes -= length
        self._grant()

    def offer(self, spare: Spare, length: int) -> None:
        """Leave acquired bytes to whoever needs them; they stay used until then."""
        self._spare[spare] = length
        self._spare_bytes += length
        self._grant()

    def withdraw(self, spare: Spare) -> None:
        """Take back what was offered and not reclaimed yet."""
        self._spare_bytes -= self._spare.pop(spare)

    def _make_fit(self, length: int) -> bool:
        """Whether `length` bytes fit, now that as much as needed was reclaimed."""
        needed = self.used_bytes - self._spare_bytes
        # One request larger than the pool passes when it is alone, or it would wait for ever.
        if needed and needed + length > self.bytes_max:
            return False
        while self._spare and self.used_bytes + length > self.bytes_max:
            spare, spare_length = self._spare.popitem(last=False)
            self._spare_bytes -= spare_length
            self.used_bytes -= spare_length
            spare.reclaim()
        return True

    def _grant(self) -> None:
        while self._waiters:
            length, granted = self._waiters[0]
            if granted.done():
                # Cancelled, but its task has not run yet to leave the queue itself.
                return
            if not self._make_fit(length):
                return
            self._waiters.popleft()
            self.used_bytes += length
            granted.set_result(None)


class Throttle:
    """A rate in bytes per second, spread over whoever asks; belongs to one event loop."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0

    async def spend(self, length: int, lifted: asyncio.Event) -> None:
        """Wait until `length` bytes may pass, or until `lifted` is set."""
        rate = self.bytes_per_second
        if rate is None or lifted.is_set():
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        self._free_at = start + length / rate
        if start > now:
            try:
                await asyncio.wait_for(lifted.wait(), start - now)
            except TimeoutError:
                return
