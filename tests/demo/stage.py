"""The parts the demo runs on: control plane, origins filled with blobs, operator and agents."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.controlplane import ControlPlane
from tests.harness.installation import AUDIENCE, REPOSITORY_ROOT, Installation
from tests.harness.origins import RegistryServer, S3Credentials, S3Server

MIB = 1024 * 1024
NODES = ("node-a", "node-b", "node-c")
SHARD_BYTES = 64 * MIB
SHARDS = tuple(f"shard-{number}" for number in range(5))
LAYER_BYTES = (48 * MIB, 40 * MIB)
DATASET_BYTES = 96 * MIB
BUCKET = "models"
REPOSITORY = "library/app"
_SEED = 20261124


class Stage:
    """Everything real that the demo needs; leaving it stops it all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("control-plane", "s3", "registry"):
            (folder / part).mkdir()
        self.control_plane = ControlPlane(folder / "control-plane")
        self.s3 = S3Server(folder / "s3")
        self.registry = RegistryServer(folder=folder / "registry")
        self.datasets = folder / "datasets"
        self.installation = Installation(
            self.control_plane,
            NODES,
            folder=folder,
            agent_arguments=(
                "--allow-origin-cidr=127.0.0.0/8",
                f"--allow-localfs=demo={self.datasets}",
                "--min-free=1Gi",
            ),
        )
        self.key: S3Credentials
        self.digests: dict[str, str] = {}
        """sha256 of every blob by its path below `/v1/blobs/`, taken before it was uploaded."""
        self._exits = ExitStack()

    def start_control_plane(self) -> None:
        """Start etcd and kube-apiserver."""
        self._exits.enter_context(self.control_plane)

    def start_origins(self) -> None:
        """Start the S3 server and the registry, and make a key that may only read."""
        self._exits.enter_context(self.s3)
        self._exits.enter_context(self.registry)
        self.s3.create_bucket(BUCKET)
        self.key = self.s3.create_reader("demo", [BUCKET])

    def fill_origins(self) -> int:
        """Upload the blobs; return their bytes."""
        source, total = random.Random(_SEED), 0
        for shard in SHARDS:
            data = source.randbytes(SHARD_BYTES)
            self.s3.put_object(BUCKET, f"llm/{shard}", data)
            total += self._remember(f"demo/models/{shard}", data)
        for size in LAYER_BYTES:
            data = source.randbytes(size)
            digest = self.registry.push_blob(REPOSITORY, data)
            total += self._remember(f"demo/layers/{digest}", data)
        (self.datasets / "public").mkdir(parents=True)
        data = source.randbytes(DATASET_BYTES)
        (self.datasets / "public" / "train.parquet").write_bytes(data)
        return total + self._remember("demo/datasets/train.parquet", data)

    def start_installation(self) -> None:
        """Start the operator and the agents."""
        self._exits.callback(self.installation.stop)
        self.installation.start()

    def example(self, name: str) -> str:
        """Return an example's YAML with this stage's addresses and keys in it."""
        text = (REPOSITORY_ROOT / "examples" / name).read_text()
        text = text.replace("http://127.0.0.1:9000", self.s3.url)
        text = text.replace("127.0.0.1:5000", self.registry.host)
        text = text.replace("/mnt/datasets/public", str(self.datasets / "public"))
        text = re.sub(r"(accessKeyID:) \S+", rf"\1 {self.key.access_key_id}", text)
        secret = json.dumps(self.key.secret_access_key)
        return re.sub(r"(secretAccessKey:) \S+", lambda found: f"{found[1]} {secret}", text)

    def rotate_key(self) -> str:
        """Make a new key for the reader, revoke the old one; return a patch for the Secret."""
        old, self.key = self.key, self.s3.create_another_key("demo")
        self.s3.revoke("demo", old)
        data = {
            "accessKeyID": base64.b64encode(self.key.access_key_id.encode()).decode(),
            "secretAccessKey": base64.b64encode(self.key.secret_access_key.encode()).decode(),
        }
        return json.dumps({"data": data})

    def token(self, namespace: str) -> str:
        """Return a reader's token, as a projected volume would hold it."""
        return self.control_plane.create_token(namespace, "default", audience=AUDIENCE)

    def origin_bytes(self) -> int:
        """Return the bytes both HTTP origins have sent."""
        return self.s3.requests.body_bytes(method="GET") + self.registry.requests.body_bytes(
            method="GET"
        )

    def _remember(self, path: str, data: bytes) -> int:
        self.digests[path] = hashlib.sha256(data).hexdigest()
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exits.close()
