"""
Real containerds, each in a `NodeSpace`: Debian's 1.6 and a 2.2 built from the Go module proxy.

For pulls no more is needed: `with NodeNetwork() as network, Containerd(folder, "2.2", network) as
containerd: containerd.pull("198.18.0.253:5000/app:1")`. With a kubelet beside it, it is a node.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.harness.binaries import locate
from tests.harness.nodespace import NodeNetwork, NodeSpace
from tests.harness.process import Child

Version = Literal["1.6", "2.2"]
NAMESPACE = "k8s.io"
"""The namespace of containerd in which the kubelet's images and containers are."""
HOSTS_FOLDER = "/etc/containerd/certs.d"
SOCKET = "/run/containerd/containerd.sock"
CNI_PROGRAMS = "/usr/lib/cni"
START_TIMEOUT_SECONDS = 60.0
PULL_TIMEOUT_SECONDS = 300.0
DEBIAN_PACKAGES = ("containerd", "runc", "containernetworking-plugins")

_CONFIG_1_6 = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  # Without CAP_SYS_RESOURCE no process may be made harder to kill than its parent.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{hosts}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
_CONFIG_2_2 = """\
version = 3
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{sandbox_image}"
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "{hosts}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni}"]
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def missing_packages() -> list[str]:
    """Return the Debian packages that containerd and its containers need and that are absent."""
    probes = {
        "containerd": Path("/usr/bin/containerd"),
        "runc": Path("/usr/sbin/runc"),
        "containernetworking-plugins": Path(CNI_PROGRAMS) / "bridge",
    }
    return [package for package in DEBIAN_PACKAGES if not probes[package].exists()]


class Containerd:
    """
    A containerd in a node space of its own, which it makes, wires to a network, and ends.

    A context manager.

    Args:
        folder: Empty or absent; everything is below it.
        version: Which one: Debian's, or the one built here.
        network: Where registries and mirrors are reached: this machine is its `host_address`.
        index: Which of the network's addresses it gets (1 to 15).
        name: Host name and cgroup; by default made from network and index.
        sandbox_image: Image of pods' first container.
        shared: More folders of this machine that are seen inside.
    """

    def __init__(
        self,
        folder: Path,
        version: Version,
        network: NodeNetwork,
        *,
        index: int = 1,
        name: str | None = None,
        sandbox_image: str = "localhost/pause:1",
        shared: Sequence[Path] = (),
    ) -> None:
        self.version = version
        self.network = network
        self.index = index
        self._sandbox_image = sandbox_image
        self._programs = folder / "programs"
        self._folder = folder
        self._child: Child | None = None
        shared = [*shared, self._programs, locate("containerd").parent]
        self.space = NodeSpace(folder, name or f"{network.name}-containerd-{index}", shared)

    @property
    def address(self) -> str:
        """The space's address on the network."""
        return self.network.address_of(self.index)

    @property
    def log(self) -> Path:
        """What containerd said."""
        return self._folder / "containerd.log"

    def start(self) -> None:
        """Make the space and start containerd in it."""
        self._programs.mkdir(parents=True, exist_ok=True)
        if self.version == "2.2":
            for program in ("containerd", "containerd-shim-runc-v2", "ctr"):
                (self._programs / program).symlink_to(locate(program))
        try:
            self.space.start()
            self.network.connect(self.space, self.index)
            self._write_config()
            self.start_containerd()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the space and all in it."""
        self.stop_containerd()
        self.space.stop()

    def start_containerd(self) -> None:
        """Start containerd itself and wait until it answers."""
        self._child = self.space.spawn(self._program("containerd"), log=self.log)
        self._child.wait_until(
            lambda: self._ctr("version").returncode == 0, timeout=START_TIMEOUT_SECONDS
        )

    def stop_containerd(self) -> None:
        """Stop containerd; containers go on running."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def ctr(self, *arguments: str, timeout: float = PULL_TIMEOUT_SECONDS) -> str:
        """
        Run this containerd's `ctr` and return what it wrote.

        Raises:
            CalledProcessError: It failed; its error output is in the message.
        """
        done = self._ctr(*arguments, timeout=timeout)
        if done.returncode != 0:
            error = subprocess.CalledProcessError(
                done.returncode, ["ctr", *arguments], done.stdout, done.stderr
            )
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def pull(self, reference: str, *flags: str) -> str:
        """Pull an image, by the mirrors in `HOSTS_FOLDER`, and return what `ctr` told."""
        return self.ctr("images", "pull", "--hosts-dir", HOSTS_FOLDER, *flags, reference)

    def write_hosts(self, host: str, text: str) -> None:
        """Write the `hosts.toml` of a registry host (as in a reference, port and all)."""
        self.write(f"{HOSTS_FOLDER}/{host}/hosts.toml", text)

    def write(self, inside: str, text: str) -> None:
        """Write a file inside the space, folders included."""
        path = self.space.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def load_image(self, archive: Path) -> None:
        """Take in the images of a docker or OCI archive."""
        inside = "/var/lib/load.tar"
        seen = self.space.path(inside)
        try:
            # The archive may lie where the space does not look; a link costs nothing.
            (self._folder / "var-lib" / "load.tar").hardlink_to(archive)
        except OSError:
            shutil.copyfile(archive, seen)
        try:
            self.ctr("images", "import", inside)
        finally:
            seen.unlink()

    def images(self) -> list[str]:
        """Return the names of the images it has."""
        return self.ctr("images", "list", "--quiet").split()

    def contents(self) -> list[str]:
        """Return the digests of the blobs it has."""
        return self.ctr("content", "list", "--quiet").split()

    def remove_image(self, *names: str) -> None:
        """Forget images, and wait until what only they needed is deleted."""
        self.ctr("images", "remove", "--sync", *names)

    def _ctr(
        self, *arguments: str, timeout: float = PULL_TIMEOUT_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        where = ["--address", SOCKET, "--namespace", NAMESPACE]
        command = [self._program("ctr"), *where, *arguments]
        return self.space.run(*command, check=False, timeout=timeout)

    def _program(self, name: str) -> str:
        return name if self.version == "1.6" else str(self._programs / name)

    def _write_config(self) -> None:
        text = _CONFIG_1_6 if self.version == "1.6" else _CONFIG_2_2
        values = {"hosts": HOSTS_FOLDER, "cni": CNI_PROGRAMS, "sandbox_image": self._sandbox_image}
        self.write("/etc/containerd/config.toml", text.format(**values))

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
