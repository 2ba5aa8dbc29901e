"""What `helm test` runs, against a real agent."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.harness.binaries import locate

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "blobcache"
pytestmark = [pytest.mark.helm]


def _objects() -> dict[str, dict[str, Any]]:
    command = [locate("helm"), "template", "b", str(CHART), "-n", "system"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    wanted = ("ConfigMap", "Pod", "BlobCacheConfig", "DaemonSet")
    bodies = [body for body in yaml.safe_load_all(done.stdout) if body]
    return {body["kind"]: body for body in bodies if body["kind"] in wanted}


def test_pod_config_and_daemonset_agree() -> None:
    """Blob, digest, folder and path are the same in all four objects."""
    objects = _objects()
    blob = objects["ConfigMap"]["data"]["blob"].encode()
    assert len(blob) > 64 * 1024
    _, url, digest, token, _ = objects["Pod"]["spec"]["containers"][0]["args"]
    assert digest == hashlib.sha256(blob).hexdigest()
    assert url == "http://blobcache-agent.system:7080/v1/blobs/system/blobcache-selftest/blob"
    assert token == "/var/run/blobcache/token"
    folder = objects["BlobCacheConfig"]["spec"]["backend"]["localFS"]["directory"]
    container = objects["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]
    assert f"--allow-localfs=system={folder}" in container["args"]
    (mount,) = (one for one in container["volumeMounts"] if one["name"] == "selftest")
    assert mount["mountPath"] == f"{folder}/blob"
    assert mount["subPath"] == "blob"


def _address(log: Path, agent: subprocess.Popen[bytes]) -> str:
    """Return where the agent listens, once its log says so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            said = json.loads(line)
            if said.get("event") == "Listens for readers":
                return f"127.0.0.1:{said['port']}"
        assert agent.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize(
    ("digest", "failure"), [("right", "a reader without a token"), ("0" * 64, "the digest is")]
)
def test_the_script_reads_and_compares(tmp_path: Path, digest: str, failure: str) -> None:
    """A standalone agent asks for no token, which the script notices last; a digest first."""
    blob = b"blob" * 50_000
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "blob").write_bytes(blob)
    (tmp_path / "token").write_text("token\n")
    config = _objects()["BlobCacheConfig"]
    config["spec"]["backend"]["localFS"]["directory"] = str(tmp_path / "origin")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "blobcache_agent", "standalone",
        f"--cache-root={tmp_path / 'cache'}", "--listen=127.0.0.1:0", "--log-format=json",
        "--min-free=0", f"--allow-localfs={tmp_path / 'origin'}", str(tmp_path / "config.yaml"),
    ]  # fmt: skip
    with log.open("wb") as output:
        agent = subprocess.Popen(command, stderr=output, stdout=output, env=dict(os.environ))
    try:
        address = _address(log, agent)
        right = hashlib.sha256(blob).hexdigest() if digest == "right" else digest
        done = subprocess.run(
            [
                sys.executable, str(CHART / "files" / "read_blob.py"),
                f"http://{address}/v1/blobs/system/blobcache-selftest/blob",
                right, str(tmp_path / "token"), "30",
            ],
            capture_output=True, text=True, check=False, timeout=90,
        )  # fmt: skip
    finally:
        agent.terminate()
        agent.wait(60)
    assert done.returncode == 1
    assert failure in done.stderr
    assert f"read {len(blob)} bytes" in done.stdout
