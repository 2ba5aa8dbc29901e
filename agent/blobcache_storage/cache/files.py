"""The two files of one version of a blob, and nothing about its chunks' states.

Blocking, but for `close`: for worker threads. The descriptors are -1 while the files are not open;
they are set once, both together, and stay valid until `close`.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crc32c import crc32c

from blobcache_storage.cache.chunk_map import (
    HEADER_SIZE_BYTES,
    MapHeader,
    decode_header,
    decode_slots,
    decode_whole_record,
    encode_header,
)
from blobcache_storage.cache.disk import Disk

if TYPE_CHECKING:
    from blobcache_storage.cache.folder import Folder

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}
"""What opening says if there is no such file, or something that is none."""


@dataclass(frozen=True, slots=True)
class FoundRecords:
    """What an existing map says."""

    slots: array[int]
    whole_sha256: bytes | None


class BlobFiles:
    """See the module."""

    def __init__(self, folder: Folder, stem: str, header: MapHeader, disk: Disk) -> None:
        self._folder = folder
        self._stem = stem
        self._header = header
        self._disk = disk
        self.data_fd = -1
        self.map_fd = -1

    def load(self) -> FoundRecords | None:
        """Open existing files; None if they are missing, foreign, or of something else.

        Raises:
            OSError: They cannot be opened now, which says nothing about them.
        """
        disk, stem, header = self._disk, self._stem, self._header
        fds: list[int] = []
        try:
            directory = self._folder.directory()
            for suffix in ("data", "map"):
                fds.append(disk.open(f"{stem}.{suffix}", os.O_RDWR, dir_fd=directory))
            regular = all(stat.S_ISREG(disk.facts(fd).st_mode) for fd in fds)
            page = disk.read(fds[1], HEADER_SIZE_BYTES, 0)
            if regular and decode_header(page) == header:
                body = disk.read(fds[1], header.map_size_bytes, HEADER_SIZE_BYTES)
                self.data_fd, self.map_fd = fds
                return FoundRecords(
                    decode_slots(header, body), decode_whole_record(header.generation, page)
                )
        except OSError as error:
            # Not there, no files, or a map that cannot be read: the entry is discarded.
            if len(fds) < 2 and error.errno not in _NOT_THERE:
                raise
        finally:
            if self.data_fd < 0:
                for fd in fds:
                    disk.close(fd)
        return None

    def create(self) -> None:
        """Make the two files, the map with its header, unless they are open."""
        if self.data_fd >= 0:
            return
        disk, stem = self._disk, self._stem
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        directory = self._folder.made_directory()
        data_fd = disk.open(f"{stem}.data", flags, dir_fd=directory)
        map_fd = -1
        try:
            map_fd = disk.open(f"{stem}.map", flags, dir_fd=directory)
            disk.write_all(map_fd, [encode_header(self._header)], 0)
        except OSError:
            for fd in (data_fd, map_fd):
                if fd >= 0:
                    disk.close(fd)
            self._folder.unlink(stem)
            raise
        # Both or neither: whoever sees a descriptor sees whole files.
        self.map_fd = map_fd
        self.data_fd = data_fd

    def read(self, offset: int, length: int, crc: int) -> bytes | None:
        """Return bytes of the data file if they have that CRC."""
        try:
            data = self._disk.read(self.data_fd, length, offset)
        except OSError:
            return None  # an unreadable chunk is a wrong one: discarded and fetched again
        return data if len(data) == length and crc32c(data) == crc else None

    def allocated_bytes(self) -> int:
        """Return what both files take on disk."""
        return self._disk.allocated(self.data_fd) + self._disk.allocated(self.map_fd)

    def close(self) -> None:
        """Close the files, if they are open.

        Local file systems do not write back at a close, so the event loop may call it.
        """
        for fd in (self.data_fd, self.map_fd):
            if fd >= 0:
                self._disk.close(fd)
        self.data_fd = self.map_fd = -1
