"""A file system of its own on a loop device over memory, whose power can be cut.

The image lies in a memfd and the device detaches itself with its last user, so that whatever ends
the process, kill -9 included, leaves nothing behind; mounts belong to a mount namespace that dies
with it too (`enter_private_namespace`). Devices of others are never touched: the kernel hands out
free ones, and one that somebody else took first is refused by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import stat
import struct
import subprocess
from pathlib import Path

MIB = 1024 * 1024
IMAGE_BYTES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
"""mkfs.xfs takes nothing smaller than 300 MiB; what is not written takes no memory."""
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", "-N", "2048"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
}

_LOOP_MAJOR = 7
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_LOOP_CONFIG_BYTES = 304
_LOOP_FLAGS_OFFSET = 8 + 52
_FS_IOC_SHUTDOWN = 0x8004587D
_SHUTDOWN_WITHOUT_LOG_FLUSH = struct.pack("I", 2)
_CLONE_NEWNS = 0x00020000
_MS_NOATIME = 1024
_MS_REC_PRIVATE = 0x4000 | 0x40000
_PR_SET_PDEATHSIG = 1
_UMOUNT_TRIES = 200

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This machine cannot have such a volume; the message says why."""


def check_available(kind: str) -> None:
    """Raise unless volumes of a kind (ext4, xfs) can be made here.

    Raises:
        Unavailable: They cannot.
    """
    if os.geteuid() != 0:
        raise Unavailable("mounting needs root")
    if not Path("/dev/loop-control").exists():
        raise Unavailable("there is no /dev/loop-control")
    if kind not in Path("/proc/filesystems").read_text().split():
        raise Unavailable(f"the kernel has no {kind}")
    if shutil.which(MKFS[kind][0]) is None:
        raise Unavailable(f"{MKFS[kind][0]} is not installed")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def enter_private_namespace() -> None:
    """Give this process mounts of its own, and have it killed with its parent."""
    die_with_parent()
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None), "make mounts private")


class LoopVolume:
    """One volume, mounted at `path` between `mount` and `unmount`.

    Args:
        kind: ext4 or xfs.
        path: An empty directory.
        image_bytes: The volume's size; by default the smallest that is useful.
    """

    def __init__(self, kind: str, path: str, image_bytes: int | None = None) -> None:
        check_available(kind)
        self.kind = kind
        self.path = path
        self._image_fd = os.memfd_create("blobcache-volume", os.MFD_CLOEXEC)
        os.ftruncate(self._image_fd, image_bytes or IMAGE_BYTES[kind])
        self._directory_fd = -1
        self.make()

    def make(self) -> None:
        """Make a fresh file system."""
        image = f"/proc/{os.getpid()}/fd/{self._image_fd}"
        subprocess.run([*MKFS[self.kind], image], check=True, capture_output=True)

    def mount(self) -> None:
        """Mount it, which replays its journal.

        By a device attached anew: the page cache of the former one may hold metadata that never
        reached the medium.
        """
        loop_fd, device = _attach(self._image_fd)
        try:
            source, target = device.encode(), self.path.encode()
            _check(_libc.mount(source, target, self.kind.encode(), _MS_NOATIME, None), "mount")
        finally:
            os.close(loop_fd)
        self._directory_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def cut_power(self) -> None:
        """Stop all writing to the device this instant; what is only in memory is lost.

        From now on every write and sync fails. May be called from any thread.
        """
        fcntl.ioctl(self._directory_fd, _FS_IOC_SHUTDOWN, _SHUTDOWN_WITHOUT_LOG_FLUSH)

    def unmount(self) -> None:
        """Unmount it, which needs all its files to be closed."""
        if self._directory_fd < 0:
            return
        os.close(self._directory_fd)
        self._directory_fd = -1
        for _ in range(_UMOUNT_TRIES):
            if _libc.umount2(self.path.encode(), 0) == 0:
                return
            if ctypes.get_errno() != errno.EBUSY:
                break
        number = ctypes.get_errno()
        raise OSError(number, f"unmount: {os.strerror(number)}; open: {_open_below(self.path)}")

    def close(self) -> None:
        """Unmount and detach."""
        with contextlib.suppress(OSError):
            self.unmount()
        os.close(self._image_fd)


def _open_below(path: str) -> list[str]:
    """Name our own open files that keep a mount busy."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith(path):
                found.append(target)
    return found


def _attach(image_fd: int) -> tuple[int, str]:
    """Put an image behind a free loop device."""
    config = bytearray(_LOOP_CONFIG_BYTES)
    struct.pack_into("II", config, 0, image_fd, 0)
    struct.pack_into("I", config, _LOOP_FLAGS_OFFSET, _LO_FLAGS_AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = f"/dev/loop{number}"
            if not Path(device).exists():
                with contextlib.suppress(FileExistsError):
                    os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, bytes(config))
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return fd, device
    finally:
        os.close(control)
    raise Unavailable("no loop device is free")
