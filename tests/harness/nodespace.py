"""
Places on this machine that look like machines of their own to what runs in them.

A `NodeSpace` has its own root file system (a copy-on-write view of the machine's), processes,
network and host name; a `NodeNetwork` is the wire between some of them and this machine. Needs
root. All of it lives as long as one process of ours: whatever ends us, the kernel ends the spaces,
everything that runs in them, and their mounts and addresses.
"""

import contextlib
import fcntl
import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness.process import Child, poll_until

START_TIMEOUT_SECONDS = 60.0
END_TIMEOUT_SECONDS = 60.0
RUN_TIMEOUT_SECONDS = 120.0
NETWORKS_MAX = 8
"""Networks of this kind that fit on one machine at a time."""
TOOLS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "pivot_root": "util-linux",
    "ip": "iproute2",
    "mount": "mount",
    "hostname": "hostname",
}
"""Programs spaces are made with, and the Debian packages that have them."""

_INIT = Path(__file__).with_name("_node_init.py")
_CGROUPS = Path("/sys/fs/cgroup")
_BLOCK = ipaddress.IPv4Network("198.18.0.0/15")
"""For tests between networks (RFC 2544): no machine is at home there."""


class NodeSpaceError(RuntimeError):
    """A space or network could not be made; the message says what failed."""


def why_not_here() -> str:
    """Return why this machine cannot have spaces; empty when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "own namespaces need root on Linux"
    if absent := {package for tool, package in TOOLS.items() if shutil.which(tool) is None}:
        return f"please run: apt-get install {' '.join(sorted(absent))}"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--net", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces are refused: {tried.stderr.strip()}" if tried.returncode else ""


class NodeNetwork:
    """
    A bridge on this machine to which spaces are wired, with addresses that belong to nobody.

    Spaces reach this machine at `host_address` and `origin_address`, and each other; nothing
    further. A context manager.
    """

    def __init__(self) -> None:
        self._slot = -1
        self._lock: Any = None

    @property
    def name(self) -> str:
        """The bridge's name."""
        return f"blobcache{self._slot}"

    @property
    def host_address(self) -> str:
        """This machine's address, the gateway of all spaces."""
        return str(self._subnet(0)[254])

    @property
    def origin_address(self) -> str:
        """A second address of this machine: a cluster's API server may not be an origin."""
        return str(self._subnet(0)[253])

    @property
    def range(self) -> str:
        """All addresses of this network, in CIDR notation; those of `services` are in it."""
        return str(self._range)

    @property
    def services(self) -> str:
        """A range for the addresses of Services."""
        return str(list(self._range.subnets(new_prefix=20))[1])

    def address_of(self, index: int) -> str:
        """Return the address of space `index` (1 to 15)."""
        return str(self._subnet(0)[index])

    def pods_of(self, index: int) -> str:
        """Return the range of the pods of space `index`, in CIDR notation."""
        return str(self._subnet(index))

    def start(self) -> None:
        """Take a free slot and make the bridge."""
        self._take_slot()
        with contextlib.suppress(NodeSpaceError):
            _ip("link", "delete", self.name)
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.host_address}/24", "dev", self.name)
        _ip("address", "add", f"{self.origin_address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def stop(self) -> None:
        """Remove the bridge; harmless when repeated."""
        if self._lock is None:
            return
        with contextlib.suppress(NodeSpaceError):
            _ip("link", "delete", self.name)
        self._lock.close()
        self._lock = None

    def connect(self, space: "NodeSpace", index: int) -> None:
        """Wire a started space to the bridge and route its pods' addresses to it."""
        outer = f"{self.name}n{index}"
        peer = ["peer", "name", "eth0", "netns", str(space.pid)]
        _ip("link", "add", outer, "type", "veth", *peer)
        _ip("link", "set", outer, "master", self.name, "up")
        space.run("ip", "address", "add", f"{self.address_of(index)}/24", "dev", "eth0")
        space.run("ip", "link", "set", "eth0", "up")
        space.run("ip", "route", "add", "default", "via", self.host_address)
        _ip("route", "replace", self.pods_of(index), "via", self.address_of(index))

    def _take_slot(self) -> None:
        for slot in range(NETWORKS_MAX):
            lock = Path(f"/run/blobcache-network-{slot}.lock").open("w")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            self._slot, self._lock = slot, lock
            return
        raise NodeSpaceError(f"{NETWORKS_MAX} networks are in use already")

    @property
    def _range(self) -> ipaddress.IPv4Network:
        return list(_BLOCK.subnets(new_prefix=19))[self._slot]

    def _subnet(self, number: int) -> ipaddress.IPv4Network:
        return list(self._range.subnets(new_prefix=24))[number]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class NodeSpace:
    """
    A root file system, processes and network of their own, for a node's programs.

    A context manager. What is written in it lands below `folder`: `changes` has all changes of
    files but those of `/var/lib` (`var-lib`) and `/var/log` (`var-log`).

    Args:
        folder: Empty or absent; on a file system that can be an overlay's upper layer.
        name: The host name; also that of its cgroup.
        shared: Folders of this machine that are the same inside, such as where programs lie.
    """

    def __init__(self, folder: Path, name: str, shared: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.name = name
        self._shared = [str(path) for path in shared]
        self._init: Child | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """The process that the space lives by, as this machine counts."""
        return self._pid

    @property
    def cgroup(self) -> str:
        """The cgroup for what runs in the space, as a path from the root of each hierarchy."""
        return f"/{self.name}"

    def start(self) -> None:
        """Make the space and wait until it can be entered."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        for inner in ("root", "changes", "work", "var-lib", "var-log"):
            (self.folder / inner).mkdir(parents=True, exist_ok=True)
        self._make_cgroups()
        namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--propagation", "private"]
        init = [sys.executable, "-I", "-S", str(_INIT), str(self.folder), self.name, *self._shared]
        self._init = Child(
            ["unshare", *namespaces, "--fork", "--kill-child", *init],
            log=self.folder / "init.log",
        )
        ready = self.folder / "ready"
        self._init.wait_until(ready.exists, timeout=START_TIMEOUT_SECONDS)
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        self._pid = int(children.read_text())

    def stop(self) -> None:
        """End everything in the space and remove its cgroups; files stay."""
        if self._init is not None:
            self._init.kill()
            self._init = None
        if self._pid:
            poll_until(lambda: not Path(f"/proc/{self._pid}").exists(), timeout=END_TIMEOUT_SECONDS)
        self._remove_cgroups()

    def command(self, *command: str | Path) -> list[str]:
        """Return a command line that runs this one inside."""
        # Not `--all`: the cgroup and user namespaces are this machine's own.
        enter = ["--mount", "--net", "--pid", "--uts", "--ipc"]
        return ["nsenter", f"--target={self._pid}", *enter, "--wd=/", "--", *map(str, command)]

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = RUN_TIMEOUT_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """
        Run a program inside to its end.

        Raises:
            NodeSpaceError: It failed and `check` is on.
        """
        done = subprocess.run(
            self.command(*command), capture_output=True, text=True, check=False, timeout=timeout
        )
        if check and done.returncode != 0:
            told = (done.stderr + done.stdout).strip()
            raise NodeSpaceError(f"{self.name}: '{' '.join(map(str, command))}' failed: {told}")
        return done

    def spawn(self, *command: str | Path, log: Path) -> Child:
        """Start a program inside; stopping the child stops it."""
        paths = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return Child(self.command(*command), log=log, env={"PATH": paths, "HOME": "/root"})

    def path(self, inside: str) -> Path:
        """Return how this machine sees a path of the space; valid while it lives."""
        return Path(f"/proc/{self._pid}/root") / inside.lstrip("/")

    def _make_cgroups(self) -> None:
        for hierarchy in _hierarchies():
            group = hierarchy / self.name
            group.mkdir(exist_ok=True)
            # A cpuset without processors and memory takes nobody in.
            for knob in ("cpuset.cpus", "cpuset.mems"):
                if (group / knob).exists() and (hierarchy / knob).exists():
                    (group / knob).write_text((hierarchy / knob).read_text())

    def _remove_cgroups(self) -> None:
        for hierarchy in _hierarchies():
            top = hierarchy / self.name
            # A group whose last process has just ended is busy for a moment longer.
            poll_until(lambda top=top: _remove_tree(top), timeout=END_TIMEOUT_SECONDS)  # type: ignore[misc]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _hierarchies() -> list[Path]:
    """Return the roots of all cgroup hierarchies: one of version 2, or several of version 1."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if (path / "cgroup.procs").exists()]


def _remove_tree(top: Path) -> bool:
    """Remove a cgroup and those below it, the deepest first; say whether all are gone."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not top.exists()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NodeSpaceError(f"'ip {' '.join(arguments)}' failed: {done.stderr.strip()}")
