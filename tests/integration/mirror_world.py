"""What tests of the mirror share: images in a real registry, agents, and containerds."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tests.harness.binaries import locate
from tests.harness.origins import MANIFEST_TYPE, RegistryServer, digest_of
from tests.harness.process import Child, environment
from tests.integration.agent_world import Standalone, config_yaml

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
START_TIMEOUT_SECONDS = 60.0
PULL_TIMEOUT_SECONDS = 100.0
DEBIAN_CONTAINERD = Path("/usr/bin/containerd")
DEBIAN_CTR = Path("/usr/bin/ctr")


@dataclass(frozen=True)
class Image:
    """An image that was pushed."""

    repository: str
    tag: str
    manifest: bytes
    config: bytes
    layers: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        """Of the layers."""
        return sum(map(len, self.layers))

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return digest_of(self.manifest)


def push_image(
    registry: RegistryServer,
    repository: str,
    tag: str = "v1",
    *,
    layer_bytes: Sequence[int] = (300_000,),
) -> Image:
    """Push an image of random files that containerd can unpack."""
    image = build_image(repository, tag, layer_bytes=layer_bytes)
    for blob in (image.config, *image.layers):
        registry.push_blob(repository, blob)
    registry.push_raw_manifest(repository, tag, image.manifest, MANIFEST_TYPE)
    return image


def build_image(repository: str, tag: str = "v1", *, layer_bytes: Sequence[int]) -> Image:
    """Make an image of random files."""
    layers, diff_ids = [], []
    for number, size in enumerate(layer_bytes):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            entry = tarfile.TarInfo(f"file-{number}")
            entry.size = size
            archive.addfile(entry, io.BytesIO(os.urandom(size)))
        diff_ids.append(digest_of(raw.getvalue()))
        layers.append(gzip.compress(raw.getvalue(), 1))
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, config),
            "layers": [descriptor(LAYER_TYPE, layer) for layer in layers],
        }
    ).encode()
    return Image(repository, tag, manifest, config, tuple(layers))


def descriptor(media_type: str, data: bytes) -> dict[str, str | int]:
    """Return an OCI descriptor of some bytes."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


class Registry(Protocol):
    """What is mirrored."""

    @property
    def host(self) -> str:
        """Host and port."""


def mirror_of(
    registry: Registry,
    folder: Path,
    *,
    backend: dict[str, Any] | None = None,
    extra: Sequence[str] = (),
) -> Standalone:
    """Return an agent, not started, whose `default/images` answers for the registry's host."""
    section = {
        "type": "Registry",
        "registry": {"host": registry.host, "scheme": "http"},
        **(backend or {}),
    }
    folder.mkdir(exist_ok=True)
    file = folder / "images.yaml"
    file.write_text(config_yaml("images", section))
    binding = f"--containerd-mirror={registry.host}=default/images"
    return Standalone(folder, [file], extra=[binding, *extra])


@dataclass
class Containerd:
    """A containerd of its own, without CRI: root, state and socket below a folder."""

    folder: Path
    is_debian: bool
    parallel_chunk_bytes: int = 0
    """Fetch layers in parallel ranges of this size (2.1 and later); 0 = in one piece."""
    child: Child | None = field(default=None, init=False)

    @property
    def certs_dir(self) -> Path:
        """Its `certs.d`."""
        return self.folder / "certs.d"

    @property
    def _socket(self) -> str:
        return str(self.folder / "c.sock")

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self.certs_dir.mkdir(exist_ok=True)
        config = self.folder / "config.toml"
        config.write_text(self._config())
        program = DEBIAN_CONTAINERD if self.is_debian else locate("containerd")
        self.child = Child(
            [program, "--config", config], log=self.folder / "containerd.log", env=environment()
        )
        self.child.wait_until(
            lambda: self._ctr("version", timeout=20).returncode == 0, timeout=START_TIMEOUT_SECONDS
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.child is not None
        self.child.stop()

    def _config(self) -> str:
        unwanted = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"]
        unwanted += ["io.containerd.cri.v1.runtime", "io.containerd.snapshotter.v1.zfs"]
        text = f"""version = {2 if self.is_debian else 3}
root = "{self.folder}/root"
state = "{self.folder}/state"
disabled_plugins = {json.dumps(unwanted)}
[grpc]
address = "{self._socket}"
"""
        if not self.is_debian:
            text += f"""[plugins."io.containerd.transfer.v1.local"]
max_concurrent_downloads = 3
concurrent_layer_fetch_buffer = {self.parallel_chunk_bytes}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/amd64"
snapshotter = "native"
"""
        return text

    def _ctr(self, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        program = DEBIAN_CTR if self.is_debian else locate("ctr")
        command = [str(program), "--address", self._socket, *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment(),
        )

    def pull(self, reference: str, *, login: str = "") -> float:
        """Pull and unpack an image by this containerd's `certs.d`; return the seconds it took.

        Raises:
            PullFailed: It did not work; the message is what ctr said.
        """
        user = ["--user", login] if login else []
        began = time.monotonic()
        # ctr takes a name as it is: on 1.6 nothing is done for an image that is there already.
        done = self._ctr(
            *("images", "pull", "--snapshotter", "native", "--platform", "linux/amd64"),
            *("--hosts-dir", str(self.certs_dir), *user, reference),
            timeout=PULL_TIMEOUT_SECONDS,
        )
        if done.returncode != 0:
            raise PullFailed(done.stderr)
        return time.monotonic() - began

    def forget(self, reference: str) -> None:
        """Remove an image and all its content."""
        done = self._ctr("images", "rm", "--sync", reference)
        assert done.returncode == 0, done.stderr
        assert not self._ctr("content", "ls", "-q").stdout.strip()


class PullFailed(Exception):
    """A pull did not work."""


def why_no_containerd() -> str:
    """Return why Debian's containerd cannot be run here, "" if it can."""
    if os.geteuid() != 0:
        return "cannot run here: containerd needs root"
    if not DEBIAN_CONTAINERD.exists() or shutil.which("runc") is None:
        return "cannot run here: Debian's containerd is not installed (apt install containerd)"
    return ""
