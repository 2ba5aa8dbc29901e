"""Every call the cache makes on its disk, in one small class.

Nothing else in `cache` calls `os` on files, so that a test can put a faulty or recording disk in
its place (`blobcache_storage.testing.recorder`). All calls block (`read_resident` excepted) and
belong in worker threads; the class has no state and may be used by many threads at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from blobcache_storage.errors import CacheError, DiskError, DiskFull

_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_IOV_MAX = 512
"""Buffers per `pwritev`, below Linux's 1024."""
BLOCK_SIZE_BYTES = 512
"""Unit of `st_blocks`."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A name in a directory, as one scan sees it."""

    name: str
    is_directory: bool
    is_regular: bool
    size_bytes: int
    allocated_bytes: int
    mtime: float


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """Of the file system the cache lies on."""

    free_bytes: int
    total_bytes: int


def cache_error(error: OSError) -> CacheError:
    """Return the engine's error for an error of the cache's disk."""
    if error.errno in _FULL_ERRNOS:
        return DiskFull(f"the cache's disk is full: {error.strerror}")
    return DiskError(f"the cache's disk failed: {error.strerror or error}")


class Disk:
    """The real disk. No symbolic link is ever followed and no descriptor is inherited."""

    def open(self, name: str, flags: int, *, dir_fd: int | None = None, mode: int = 0o600) -> int:
        """Open a name below a directory (or a path) and return its descriptor."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def lock(self, fd: int) -> bool:
        """Take an exclusive lock without waiting; False if another process has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
        """Write once and return how many bytes were taken: maybe fewer than given."""
        return os.pwritev(fd, buffers, offset)

    def write_all(
        self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int
    ) -> None:
        """Write all bytes of all buffers, one after the other from `offset`.

        Raises:
            OSError: Also where the kernel takes nothing, which would else loop for ever.
        """
        rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while rest:
            written = self.write(fd, rest[:_IOV_MAX], offset)
            if written <= 0:
                raise OSError(errno.EIO, "the disk took no byte")
            offset += written
            while rest and written >= len(rest[0]):
                written -= len(rest[0])
                rest.pop(0)
            if written:
                rest[0] = rest[0][written:]

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Read up to `length` bytes; fewer only at the file's end."""
        pieces = []
        while length > 0:
            piece = os.pread(fd, length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_resident(self, fd: int, length: int, offset: int) -> bytearray | None:
        """Read bytes if all of them are in the page cache; never waits for the disk.

        Returns:
            None where not all bytes are resident, or the file system cannot tell.
        """
        buffer = bytearray(length)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            # EAGAIN, EOPNOTSUPP, EIO: whatever it is, the reading thread meets it again.
            return None
        return buffer if count == length else None

    def sync_data(self, fd: int) -> None:
        """Make a file's data durable (`fdatasync`)."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """Make a file or a directory durable (`fsync`)."""
        os.fsync(fd)

    def unlink(self, name: str, *, dir_fd: int) -> bool:
        """Remove a name; False if there was none."""
        try:
            os.unlink(name, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        return True

    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        """Rename within one directory, replacing any file of that name."""
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def make_directory(self, name: str, *, dir_fd: int) -> None:
        """Make a directory of mode 0700 unless it is there."""
        try:
            os.mkdir(name, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            return

    def remove_directory(self, name: str, *, dir_fd: int) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=dir_fd)

    def list(self, fd: int) -> list[FileFacts]:
        """Return the names in an open directory; those that vanish meanwhile are left out."""
        found = []
        for name in os.listdir(fd):
            try:
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append(
                FileFacts(
                    name,
                    stat.S_ISDIR(facts.st_mode),
                    stat.S_ISREG(facts.st_mode),
                    facts.st_size,
                    facts.st_blocks * BLOCK_SIZE_BYTES,
                    facts.st_mtime,
                )
            )
        return found

    def facts(self, fd: int) -> os.stat_result:
        """Return what `fstat` says of an open file."""
        return os.fstat(fd)

    def allocated(self, fd: int) -> int:
        """Return the bytes an open file takes on disk."""
        return os.fstat(fd).st_blocks * BLOCK_SIZE_BYTES

    def free_space(self, fd: int) -> FreeSpace:
        """Return the room for unprivileged writers on the file system of an open file."""
        found = os.fstatvfs(fd)
        return FreeSpace(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
