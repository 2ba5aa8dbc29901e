"""One small file that is either the old or the new content after a crash, never a mixture.

Layout: a line `blobcache-agent-state <format> <sha256 of the rest>`, then the content. Anything
that does not verify counts as absent: the operator pushes again, so nothing is worth a guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat

MAGIC = b"blobcache-agent-state"
FORMAT = b"1"
CONTENT_BYTES_MAX = 256 * 1024 * 1024
"""Far above any state within the bounds of the API; a larger file is not ours."""
_MODE = 0o600
_HEADER_BYTES_MAX = 256


class StateFileCorrupt(Exception):
    """The file is there but is not what was written; the message says how."""


class StateFile:
    """A file in a directory, addressed by the directory's descriptor.

    Not safe for two writers at a time: the caller serialises. Blocking: call it from a thread.

    Args:
        directory_fd: Stays the caller's and open as long as this is used.
        name: The file's name; `.<name>.new` beside it is used while writing.
    """

    def __init__(self, directory_fd: int, name: str = "agent-state") -> None:
        self._directory_fd = directory_fd
        self._name = name
        self._new_name = f".{name}.new"

    def write(self, content: bytes) -> None:
        """Replace the content; on return it survives a power cut.

        Raises:
            OSError: It may not have; the old content is then still there, or the new one.
        """
        header = b" ".join((MAGIC, FORMAT, hashlib.sha256(content).hexdigest().encode()))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._new_name, flags, _MODE, dir_fd=self._directory_fd)
        try:
            # A file left by a crash keeps its mode through O_CREAT.
            os.fchmod(fd, _MODE)
            rest = memoryview(header + b"\n" + content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(
            self._new_name,
            self._name,
            src_dir_fd=self._directory_fd,
            dst_dir_fd=self._directory_fd,
        )
        os.fsync(self._directory_fd)

    def read(self) -> bytes | None:
        """Return the content, None if there is no such file.

        Raises:
            StateFileCorrupt: There is, but it does not verify.
            OSError: It cannot be read.
        """
        # Without O_NONBLOCK a pipe in its place would keep the agent from starting, for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._name, flags, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StateFileCorrupt("it is not a regular file")
        with os.fdopen(fd, "rb") as file:
            raw = file.read(CONTENT_BYTES_MAX + _HEADER_BYTES_MAX + 1)
        header, _, content = raw.partition(b"\n")
        words = header[:_HEADER_BYTES_MAX].split(b" ")
        if words[0] != MAGIC or len(words) != 3:
            raise StateFileCorrupt("it does not begin as a state file does")
        if words[1] != FORMAT:
            raise StateFileCorrupt("it was written by another version of the agent")
        if hashlib.sha256(content).hexdigest().encode() != words[2]:
            raise StateFileCorrupt("its checksum does not match")
        return content

    def discard(self) -> None:
        """Delete the file if that is possible; the fact need not survive a power cut."""
        for name in (self._name, self._new_name):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory_fd)
