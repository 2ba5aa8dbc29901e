"""
Process 1 of a `NodeSpace`: gives it a root file system, then reaps what nobody else does.

Run by `unshare` in fresh mount, process, network, host-name and IPC namespaces as
`python -I -S _node_init.py FOLDER NAME SHARED...`. The root is the machine's own, seen through an
overlay that keeps each change in FOLDER/changes; folders in which containers' layers or the cache
lie are real ones below FOLDER, for an overlay does not stand on another. When this process ends,
the kernel ends all others of the space and its mounts and network with them.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

OWN_FOLDERS = ("var/lib", "var/log")
"""Folders of the node that are empty at first, and real ones."""


def main(arguments: list[str]) -> None:
    """Make the root, say that it is done, and reap until told to end."""
    folder, name, *shared = arguments
    root = Path(folder) / "root"
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _mount_root(Path(folder), root)
    for inside in OWN_FOLDERS:
        _mount("--bind", str(Path(folder) / inside.replace("/", "-")), str(root / inside))
    for outside in shared:
        (inner := root / outside.lstrip("/")).mkdir(parents=True, exist_ok=True)
        _mount("--rbind", outside, str(inner))
    _enter(root)
    _run("hostname", name)
    _run("ip", "link", "set", "lo", "up")
    # By what was opened before: `folder` is not to be seen from the new root.
    os.close(os.open("ready", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    os.close(here)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
            continue
        # Nobody is here yet: a process that loses its parent later raises SIGCHLD when it ends.
        signal.sigtimedwait({signal.SIGCHLD}, 1)


def _mount_root(folder: Path, root: Path) -> None:
    layers = f"lowerdir=/,upperdir={folder}/changes,workdir={folder}/work"
    _mount("-t", "overlay", "overlay", "-o", layers, str(root))
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("--rbind", "/sys", str(root / "sys"))
    _mount("--rbind", "/dev", str(root / "dev"))
    _mount("-t", "tmpfs", "tmpfs", str(root / "run"))
    (root / "run" / "lock").mkdir()


def _enter(root: Path) -> None:
    """Make `root` the root of this namespace: a mere chroot is a place runc cannot pivot from."""
    old = root / "run" / "machine"
    old.mkdir()
    _run("pivot_root", str(root), str(old))
    os.chdir("/")
    _run("umount", "--lazy", "/run/machine")
    Path("/run/machine").rmdir()
    # Volumes that follow the node's mounts need a root that passes mounts on.
    _mount("--make-rshared", "/")


def _mount(*arguments: str) -> None:
    _run("mount", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
