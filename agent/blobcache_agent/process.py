"""What belongs to the process as a whole: its hardening and its signals."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable

from blobcache_agent.logs import get_logger

_PR_SET_DUMPABLE = 4
_SIGNAL_EXIT_BASE = 128
_M_ARENA_MAX = -8

log = get_logger(__name__)


def harden() -> None:
    """Keep credentials in this process's memory: no core dump, no other process looks in."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("Could not forbid memory dumps", error=os.strerror(ctypes.get_errno()))


def keep_one_heap() -> None:
    """Have all threads allocate from one heap: each one's own would keep what is freed in it.

    glibc alone has such heaps (malloc.h, M_ARENA_MAX); elsewhere nothing is to do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def raise_file_limit() -> int:
    """Take all file descriptors the administrator grants and return how many these are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


class Signals:
    """SIGTERM and SIGINT stop gracefully, a second one at once; SIGHUP reloads.

    Args:
        on_reload: Called in the event loop at SIGHUP.
    """

    def __init__(self, on_reload: Callable[[], None]) -> None:
        self._on_reload = on_reload
        self._stop = asyncio.Event()

    def install(self) -> None:
        """Take over the signals; needs the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)

    async def wait_for_stop(self) -> None:
        """Return when the first stop signal came."""
        await self._stop.wait()

    def _on_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("Stopped at once by a second signal", signal=number.name)
            # Nothing is lost but bytes not yet recorded: the cache's order of writes holds.
            os._exit(_SIGNAL_EXIT_BASE + number)
        log.info("Stopping; a second signal stops at once", signal=number.name)
        self._stop.set()
