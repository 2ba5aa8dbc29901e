"""Disks that fail, or are watched, for tests: in place of `cache.disk.Disk`.

`WatchedDisk` numbers every call and shows it to whoever derives from it, before it is made.
`FaultyDisk` fails the calls it is told to. Close is watched but never fails: no local file system
fails it, and the descriptor would be gone all the same.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from typing_extensions import override

from blobcache_storage.cache.disk import Disk, FileFacts, FreeSpace

MUTATING = frozenset(
    {"create", "write", "sync_data", "sync", "unlink", "rename", "make_directory",
     "remove_directory"}
)  # fmt: skip
"""Calls that change what is on the disk."""


@dataclass(frozen=True, slots=True)
class DiskCall:
    """One call of the cache on its disk."""

    number: int
    """From 1, in the order in which calls began."""
    operation: str
    """The method's name; an `open` that may make the file is a `create`."""
    name: str
    """Of the file or directory, as it was opened."""
    fd: int = -1
    offset: int = 0
    length: int = 0

    @property
    def kind(self) -> str:
        """What it is done on: data, map, index, owner, lock or directory."""
        for suffix, kind in _KINDS.items():
            if self.name.removesuffix(".tmp").endswith(suffix):
                return kind
        return "directory"

    def __str__(self) -> str:
        return f"#{self.number} {self.operation} {self.kind}"


_KINDS = {
    ".data": "data", ".map": "map", "index.json": "index", "owner.json": "owner", "LOCK": "lock",
}  # fmt: skip


class WatchedDisk(Disk):
    """See the module. Safe for use by many threads; `before` may be called by any of them."""

    def __init__(self) -> None:
        self.calls = 0
        self.guard = threading.RLock()
        """Held while a descriptor is closed, so that `open_files` can be used under it."""
        self.open_files: dict[int, str] = {}

    def before(self, call: DiskCall, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        """See a call coming; raise OSError to fail it.

        Args:
            buffers: What a write is about to write.

        Returns:
            How many bytes of a write to take at most; -1 for all.
        """
        return -1

    def after(self, call: DiskCall, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """See a call that succeeded."""

    def _enter(
        self,
        operation: str,
        name: str | None = None,
        fd: int = -1,
        offset: int = 0,
        buffers: Sequence[bytes | bytearray | memoryview] = (),
        length: int = 0,
    ) -> tuple[DiskCall, int]:
        with self.guard:
            self.calls += 1
            if name is None:
                name = self.open_files.get(fd, "?")
            length = sum(map(len, buffers)) or length
            call = DiskCall(self.calls, operation, name, fd, offset, length)
        return call, self.before(call, buffers)

    @override
    def open(self, name: str, flags: int, *, dir_fd: int | None = None, mode: int = 0o600) -> int:
        call, _ = self._enter("create" if flags & os.O_CREAT else "open", name)
        fd = super().open(name, flags, dir_fd=dir_fd, mode=mode)
        with self.guard:
            self.open_files[fd] = name
        self.after(call, ())
        return fd

    @override
    def close(self, fd: int) -> None:
        self._enter("close", fd=fd)
        with self.guard:
            self.open_files.pop(fd, None)
            super().close(fd)

    @override
    def lock(self, fd: int) -> bool:
        self._enter("lock", fd=fd)
        return super().lock(fd)

    @override
    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
        call, taken = self._enter("write", fd=fd, offset=offset, buffers=buffers)
        if taken >= 0:
            buffers = [memoryview(b"".join(buffers))[:taken]]
        written = self.put(fd, buffers, offset)
        self.after(call, buffers)
        return written

    def put(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
        """Make a write."""
        return super().write(fd, buffers, offset)

    @override
    def read(self, fd: int, length: int, offset: int) -> bytes:
        self._enter("read", fd=fd, offset=offset, length=length)
        return super().read(fd, length, offset)

    @override
    def read_resident(self, fd: int, length: int, offset: int) -> bytearray | None:
        try:
            self._enter("read_resident", fd=fd, offset=offset, length=length)
        except OSError:
            return None
        return super().read_resident(fd, length, offset)

    @override
    def sync_data(self, fd: int) -> None:
        call, _ = self._enter("sync_data", fd=fd)
        super().sync_data(fd)
        self.after(call, ())

    @override
    def sync(self, fd: int) -> None:
        call, _ = self._enter("sync", fd=fd)
        super().sync(fd)
        self.after(call, ())

    @override
    def unlink(self, name: str, *, dir_fd: int) -> bool:
        call, _ = self._enter("unlink", name, dir_fd)
        removed = super().unlink(name, dir_fd=dir_fd)
        self.after(call, ())
        return removed

    @override
    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        call, _ = self._enter("rename", new, dir_fd)
        super().rename(old, new, dir_fd=dir_fd)
        self.after(call, ())

    @override
    def make_directory(self, name: str, *, dir_fd: int) -> None:
        call, _ = self._enter("make_directory", name, dir_fd)
        super().make_directory(name, dir_fd=dir_fd)
        self.after(call, ())

    @override
    def remove_directory(self, name: str, *, dir_fd: int) -> None:
        call, _ = self._enter("remove_directory", name, dir_fd)
        super().remove_directory(name, dir_fd=dir_fd)
        self.after(call, ())

    @override
    def list(self, fd: int) -> list[FileFacts]:
        self._enter("list", fd=fd)
        return super().list(fd)

    @override
    def facts(self, fd: int) -> os.stat_result:
        self._enter("facts", fd=fd)
        return super().facts(fd)

    @override
    def free_space(self, fd: int) -> FreeSpace:
        self._enter("free_space", fd=fd)
        return super().free_space(fd)


NEVER_FAILS = frozenset({"close"})
SHORT_WRITE = -1
"""In place of an error number: a write takes only half of its bytes."""
ERRORS_OF: dict[int, Collection[str]] = {
    errno.ENOSPC: {"create", "write", "sync_data", "sync", "rename", "make_directory"},
    errno.EDQUOT: {"create", "write", "sync_data", "sync", "rename", "make_directory"},
    errno.EMFILE: {"create", "open"},
    SHORT_WRITE: {"write"},
}
"""Which calls can meet an error; those not named can be met by any call."""


class FaultyDisk(WatchedDisk):
    """A disk whose calls fail from the N-th on which can meet the error, or only that one.

    Args:
        error: An error number, or SHORT_WRITE.
        nth: From 1; 0 fails nothing, and `eligible` then tells how many calls could fail.
        lasting: Whether all later ones fail too, until `heal`.
    """

    def __init__(self, error: int = errno.EIO, nth: int = 0, *, lasting: bool = False) -> None:
        super().__init__()
        self.error = error
        self.nth = nth
        self.lasting = lasting
        self.eligible = 0
        self.failed: list[DiskCall] = []
        self.only: Callable[[DiskCall], bool] = lambda _: True
        """Further condition of a call that may fail."""

    def heal(self) -> None:
        """Fail nothing any more."""
        self.nth = 0

    @override
    def before(self, call: DiskCall, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        may_fail = ERRORS_OF.get(self.error)
        if call.operation in NEVER_FAILS or (may_fail and call.operation not in may_fail):
            return -1
        if not self.only(call):
            return -1
        with self.guard:
            self.eligible += 1
            due = self.eligible == self.nth or (self.lasting and 0 < self.nth < self.eligible)
            if not due:
                return -1
            self.failed.append(call)
        if self.error == SHORT_WRITE:
            return max(1, call.length // 2)
        raise OSError(self.error, f"injected: {os.strerror(self.error)}")
