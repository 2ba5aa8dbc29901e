"""
The project's images, built by buildah from its own Dockerfiles without any registry.

The base is a Debian by debootstrap instead of Docker Hub's Python: `BASE` is a build argument. All
is kept in the user's cache folder under a hash of what went in, so a second run builds nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.binaries import cache_folder

ROOT = Path(__file__).resolve().parents[2]
PREVIOUS = "6649945"
"""The commit that closed the main-job issue: what an upgrade starts from."""
SUITE = "bookworm"
PYTHON_PACKAGES = "python3-minimal,python3-venv,ca-certificates"
BUILD_TIMEOUT_SECONDS = 900.0
ARCHIVES_KEPT = 4
"""Archives of one image that are kept, the newest; each is 70 to 300 MB."""
STORAGE_BYTES_MAX = 8 << 30
"""What buildah's layers may take before they are all dropped and built again."""
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap"}
"""Programs images are built with, and the Debian packages that have them."""

_INPUTS = ("pyproject.toml", "constraints.txt", "README.md", "crds", "agent", "operator")
_NEEDLESS = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man")


class ImageBuildError(RuntimeError):
    """An image could not be built; the message carries the end of what the builder said."""


@dataclass(frozen=True)
class Image:
    """A built image, as an archive that a node can take in."""

    name: str
    """Repository without tag, such as `localhost/blobcache-agent`."""
    tag: str
    """A hash of what went in."""
    archive: Path
    size_bytes: int
    """Of its layers, unpacked."""

    @property
    def reference(self) -> str:
        """Name and tag."""
        return f"{self.name}:{self.tag}"


@dataclass(frozen=True)
class Images:
    """What one installation of the project needs."""

    agent: Image
    operator: Image
    base: Image
    """Sleeps for ever when started as it is: nodes take it for their pods' first container."""


def build(source: Path = ROOT) -> Images:
    """Return the images of a source tree, building what is not there."""
    with _turn():
        base = _base()
        return Images(
            agent=_component("agent", source, base),
            operator=_component("operator", source, base),
            base=base,
        )


def previous_source(folder: Path) -> Path:
    """Write the tree of `PREVIOUS` into a folder and return it."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", PREVIOUS], capture_output=True, check=True
    ).stdout
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def has_previous() -> bool:
    """Say whether this clone knows `PREVIOUS`: a shallow one does not."""
    commit = f"{PREVIOUS}^{{commit}}"
    told = subprocess.run(
        ["git", "-C", str(ROOT), "cat-file", "-e", commit], capture_output=True, check=False
    )
    return told.returncode == 0


def missing_packages() -> list[str]:
    """Return the Debian packages that building needs and that are absent."""
    return sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})


def build_application(name: str, payload: bytes) -> Image:
    """Return an image of the base and one more layer, for pods that only have to run."""
    with _turn():
        base = _base()
        tag = hashlib.sha256(base.tag.encode() + payload).hexdigest()[:12]
        if found := _kept(name, tag):
            return found
        with tempfile.TemporaryDirectory(prefix="blobcache-image-") as context:
            Path(context, "payload").write_bytes(payload)
            file = Path(context, "Dockerfile")
            file.write_text(f"FROM {base.reference}\nCOPY payload /payload\n")
            return _build(name, tag, file, Path(context), [])


def push(image: Image, reference: str) -> None:
    """Push a built image to a registry without TLS or users."""
    with _turn():
        if not _has(image.reference):
            _buildah("pull", f"docker-archive:{image.archive}")
        _buildah("push", "--tls-verify=false", image.reference, f"docker://{reference}")


def list_files(image: Image) -> list[str]:
    """Return the paths of an image's files, of all layers, without a leading slash."""
    with _turn():
        if not _has(image.reference):
            _buildah("pull", f"docker-archive:{image.archive}")
        container = _buildah("from", image.reference).strip()
        try:
            root = Path(_buildah("mount", container).strip())
            return [
                str(Path(folder, file).relative_to(root))
                for folder, _, files in os.walk(root)
                for file in files
            ]
        finally:
            _buildah("rm", container)


def inspect(image: Image) -> dict[str, Any]:
    """Return an image's OCI configuration: `config` with labels, user and entry point."""
    with _turn():
        if not _has(image.reference):
            _buildah("pull", f"docker-archive:{image.archive}")
        told = json.loads(_buildah("inspect", "--type", "image", image.reference))
    configuration: dict[str, Any] = told["OCIv1"]
    return configuration


def _component(component: str, source: Path, base: Image) -> Image:
    name = f"localhost/blobcache-{component}"
    file = source / component / "Dockerfile"
    tag = _hash(base.tag, source)
    if found := _kept(name, tag):
        return found
    return _build(name, tag, file, source, ["--build-arg", f"BASE={base.reference}"])


def _base() -> Image:
    """Return the base image: Debian's Python, without what only people read."""
    name, tag = "localhost/blobcache-base", f"{SUITE}-1"
    if found := _kept(name, tag):
        return found
    _say(f"bootstrapping {SUITE} for the base image (about 1 min, first time only)")
    with tempfile.TemporaryDirectory(prefix="blobcache-base-") as folder:
        tree = Path(folder, "tree")
        include = f"--include={PYTHON_PACKAGES}"
        _run("debootstrap", "--variant=minbase", include, SUITE, str(tree))
        for needless in _NEEDLESS:
            shutil.rmtree(tree / needless, ignore_errors=True)
        # As in the images that Dockerfiles name by default.
        (tree / "usr" / "bin" / "python").symlink_to("python3")
        file = Path(folder, "Dockerfile")
        file.write_text('FROM scratch\nCOPY . /\nCMD ["sleep", "infinity"]\n')
        return _build(name, tag, file, tree, [])


def _build(name: str, tag: str, file: Path, context: Path, arguments: Sequence[str]) -> Image:
    reference = f"{name}:{tag}"
    _say(f"building {reference}")
    _drop_layers_beyond_bound()
    with _pip_configuration() as volumes:
        _buildah(
            *("build", "--layers", "--isolation", "chroot", "--network", "host", *volumes),
            *arguments,
            *("--tag", reference, "--file", str(file), str(context)),
        )
    archive = _archive(name, tag)
    partial = archive.with_suffix(".part")
    partial.unlink(missing_ok=True)
    _buildah("push", reference, f"docker-archive:{partial}:{reference}")
    # The layers as they lie in the archive, which does not compress them.
    size = partial.stat().st_size
    archive.with_suffix(".json").write_text(json.dumps({"size_bytes": size}))
    partial.rename(archive)
    _drop_old_archives(name)
    return Image(name, tag, archive, size)


def _kept(name: str, tag: str) -> Image | None:
    archive = _archive(name, tag)
    if not archive.exists():
        return None
    os.utime(archive)
    told = json.loads(archive.with_suffix(".json").read_text())
    return Image(name, tag, archive, told["size_bytes"])


def _archive(name: str, tag: str) -> Path:
    return _folder() / f"{name.rpartition('/')[2]}-{tag}.tar"


def _drop_old_archives(name: str) -> None:
    kept = _folder().glob(f"{name.rpartition('/')[2]}-*.tar")
    for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-ARCHIVES_KEPT]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)


def _drop_layers_beyond_bound() -> None:
    told = subprocess.run(
        ["du", "-s", "-B1", str(_folder() / "storage")],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if told and int(told[0]) > STORAGE_BYTES_MAX:
        _buildah("rmi", "--all", "--force")


@contextlib.contextmanager
def _pip_configuration() -> Iterator[list[str]]:
    """Let pip inside do as pip does here: index, certificates, wheels in a folder."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    # PIP_* variables and files alike: `:env:.cert='…'`, `global.cert='…'`.
    options: dict[str, str] = {}
    for line in told.splitlines():
        key, _, value = line.partition("=")
        options.setdefault(key.rpartition(".")[2], value.strip("'"))
    options.setdefault("cert", "/etc/ssl/certs/ca-certificates.crt")
    volumes = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    if Path(links := options.get("find-links", "")).is_absolute() and Path(links).is_dir():
        volumes += ["--volume", f"{links}:{links}:ro"]
    with tempfile.NamedTemporaryFile("w", prefix="blobcache-pip-", suffix=".conf") as file:
        file.write("[global]\n" + "".join(f"{key} = {of}\n" for key, of in options.items()))
        file.flush()
        Path(file.name).chmod(0o644)
        yield [*volumes, "--volume", f"{file.name}:/etc/pip.conf:ro"]


def _hash(seed: str, source: Path) -> str:
    """Return a hash of what goes into the images of a source tree."""
    found = hashlib.sha256(seed.encode())
    for name in _INPUTS:
        top = source / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(str(path.relative_to(source)).encode() + b"\0")
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def _folder() -> Path:
    folder = cache_folder().parent / "e2e"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Hold the lock of the store of images."""
    with (_folder() / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _has(reference: str) -> bool:
    return bool(_buildah("images", "--quiet", "--filter", f"reference={reference}").strip())


def _buildah(*arguments: str) -> str:
    storage = _folder() / "storage"
    where = ["--storage-driver", "overlay", "--root", str(storage), "--runroot", f"{storage}-run"]
    return _run("buildah", *where, *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_SECONDS
    )
    if done.returncode != 0:
        told = (done.stdout + done.stderr)[-4000:]
        raise ImageBuildError(f"'{' '.join(command)}' failed:\n{told}")
    return done.stdout


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)  # noqa: T201
