"""A disk that remembers the order of what was done to it, and fails on command."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from blobcache_storage.cache.disk import Disk

DATA = "data"
MAP = "map"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that changes the disk, in the order of completion."""

    kind: str
    """write, sync_data, sync, unlink, rename or create."""
    name: str
    """The file's own name, without its directory."""
    offset: int = 0
    length: int = 0

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return self.name.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """`data`, `map`, or another."""
        return self.name.rpartition(".")[2]


class RecordingDisk(Disk):
    """The real disk, with a log of changes and faults by number. Safe for many threads.

    Attributes:
        fail_at: The number (from 1, as counted by `calls`) of the call that fails; 0 = none.
        fail_until: Calls up to this number fail too; 0 = only `fail_at`.
        fail_with: The errno.
        fail_kinds: Which kinds of call are counted and may fail.
        short_writes: Every write takes at most so many bytes; 0 = all.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.calls = 0
        self.fail_at = 0
        self.fail_until = 0
        self.fail_with = errno.EIO
        self.fail_kinds: frozenset[str] = frozenset({"create", "write", "sync_data"})
        self.short_writes = 0
        self._lock = threading.Lock()

    @override
    def open(self, name: str, flags: int, *, dir_fd: int | None = None, mode: int = 0o600) -> int:
        if flags & os.O_CREAT and dir_fd is not None:
            self._before("create")
        fd = super().open(name, flags, dir_fd=dir_fd, mode=mode)
        if flags & os.O_CREAT and dir_fd is not None:
            self._note("create", name)
        return fd

    @override
    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
        self._before("write")
        if self.short_writes:
            buffers = [memoryview(buffers[0])[: self.short_writes]]
        written = super().write(fd, buffers, offset)
        self._note("write", _name_of(fd), offset, written)
        return written

    @override
    def read(self, fd: int, length: int, offset: int) -> bytes:
        self._before("read")
        return super().read(fd, length, offset)

    @override
    def sync_data(self, fd: int) -> None:
        self._before("sync_data")
        super().sync_data(fd)
        self._note("sync_data", _name_of(fd))

    @override
    def sync(self, fd: int) -> None:
        self._before("sync")
        super().sync(fd)
        self._note("sync", _name_of(fd))

    @override
    def unlink(self, name: str, *, dir_fd: int) -> bool:
        self._before("unlink")
        found = super().unlink(name, dir_fd=dir_fd)
        if found:
            self._note("unlink", name)
        return found

    @override
    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        self._before("rename")
        super().rename(old, new, dir_fd=dir_fd)
        self._note("rename", new)

    def _before(self, kind: str) -> None:
        if kind not in self.fail_kinds:
            return
        with self._lock:
            self.calls += 1
            number = self.calls
        if self.fail_at and self.fail_at <= number <= max(self.fail_at, self.fail_until):
            raise OSError(self.fail_with, os.strerror(self.fail_with))

    def _note(self, kind: str, name: str, offset: int = 0, length: int = 0) -> None:
        operation = Operation(kind, os.path.basename(name), offset, length)
        with self._lock:
            self.operations.append(operation)


def _name_of(fd: int) -> str:
    """Return an open file's name; that of an unlinked one without the kernel's remark."""
    return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
