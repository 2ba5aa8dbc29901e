"""Removing a cache root from a node: what `blobcache-agent remove-cache` does after uninstalling.

Only what this software made goes: an administrator who gave it a folder with other things in it
keeps them. Blocking.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blobcache_agent.errors import StartError
from blobcache_storage.cache.root import LAYOUT_NAME, LOCK_NAME

LOCK_RETRY_SECONDS = 0.5
_STATE_NAMES = ("agent-state", ".agent-state.new")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of a folder."""

    was_there: bool
    is_gone: bool
    foreign: tuple[str, ...] = ()
    """What is still in it and not ours, sorted."""


def remove_cache(
    root: Path,
    *,
    wait_seconds: float,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Removal:
    """Delete the cached bytes, and the folder if nothing else is in it.

    Args:
        root: The folder; one that is missing is a success.
        wait_seconds: How long an agent that still uses it may take to end.

    Raises:
        StartError: It is a link or no folder, an agent goes on using it, or the disk refuses.
    """
    try:
        root_fd = os.open(root, _DIRECTORY)
    except FileNotFoundError:
        return Removal(was_there=False, is_gone=True)
    except OSError as error:
        raise StartError(f"'{root}' must be a directory and no link: {error.strerror}") from error
    try:
        with _locked(root_fd, root, wait_seconds, monotonic, sleep):
            _remove_ours(root_fd)
        foreign = tuple(sorted(os.listdir(root_fd)))
        return Removal(was_there=True, is_gone=_remove_folder(root, foreign), foreign=foreign)
    except OSError as error:
        raise StartError(f"the cache root '{root}' could not be removed: {error}") from error
    finally:
        os.close(root_fd)


@contextlib.contextmanager
def _locked(
    root_fd: int,
    root: Path,
    wait_seconds: float,
    monotonic: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[None]:
    """Hold the root's lock, which the agent holds for its life; a root without one is unused."""
    try:
        lock_fd = os.open(LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    except FileNotFoundError:
        yield
        return
    deadline = monotonic() + wait_seconds
    try:
        while not _try_lock(lock_fd):
            if monotonic() >= deadline:
                raise StartError(
                    f"the cache root '{root}' is still used by an agent after {wait_seconds:g} s"
                )
            sleep(LOCK_RETRY_SECONDS)
        yield
        os.unlink(LOCK_NAME, dir_fd=root_fd)
    finally:
        os.close(lock_fd)


def _try_lock(lock_fd: int) -> bool:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_ours(root_fd: int) -> None:
    """Delete what agents write; the layout is a folder of ours, a link in its place is not."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(LAYOUT_NAME, dir_fd=root_fd)
    for name in _STATE_NAMES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=root_fd)


def _remove_folder(root: Path, foreign: tuple[str, ...]) -> bool:
    """Delete the empty folder; one where a disk is mounted stays, for it was there before us."""
    if foreign:
        return False
    try:
        os.rmdir(root)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True
