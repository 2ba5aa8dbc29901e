"""The distribution-spec's own pull tests against the agent's `/v2/`, a real registry behind it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.harness.binaries import locate
from tests.harness.origins import MANIFEST_TYPE, RegistryServer, digest_of
from tests.harness.process import environment
from tests.integration.mirror_world import INDEX_TYPE, descriptor, mirror_of, push_image

pytestmark = [pytest.mark.registry, pytest.mark.conformance]

REPOSITORY = "conformance/images"
_COUNT = re.compile(r"^  (Pass|Skip|FAIL|Error)\.*: +([0-9]+)$", re.MULTILINE)
_PASSED = re.compile(r"^  ([A-Z][a-z ]+)\.*: +Pass$", re.MULTILINE)
_PULL_APIS = (
    "Blob get",
    "Blob head",
    "Manifest get by digest",
    "Manifest get by tag",
    "Manifest head by digest",
    "Manifest head by tag",
    "Ping",
)
DOCKER_LIST_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"


def test_pull(registry_server: RegistryServer, tmp_path: Path) -> None:
    """Images, an index, a Docker list, an empty blob; first as misses, then as hits."""
    registry = registry_server
    image = push_image(registry, REPOSITORY, "image", layer_bytes=(200_000, 10))
    tags, manifests = ["image"], [image.digest]
    for tag, media_type in (("index", INDEX_TYPE), ("list", DOCKER_LIST_TYPE)):
        platform = {"platform": {"architecture": "amd64", "os": "linux"}}
        entry = {**descriptor(MANIFEST_TYPE, image.manifest), **platform}
        body = {"schemaVersion": 2, "mediaType": media_type, "manifests": [entry]}
        data = json.dumps(body).encode()
        manifests.append(registry.push_raw_manifest(REPOSITORY, tag, data, media_type))
        tags.append(tag)
    blobs = [digest_of(layer) for layer in image.layers]
    blobs.append(registry.push_blob(REPOSITORY, b""))
    agent = mirror_of(registry, tmp_path / "agent")
    child = agent.start()
    try:
        for attempt in ("misses", "hits"):
            registry.requests.clear()
            settings = {
                "OCI_REGISTRY": f"127.0.0.1:{agent.port}",
                "OCI_REPO1": REPOSITORY,
                "OCI_RO_DATA_TAGS": " ".join(tags),
                "OCI_RO_DATA_MANIFESTS": " ".join(manifests),
                "OCI_RO_DATA_BLOBS": " ".join(blobs),
                "OCI_RESULTS_DIR": str(tmp_path / attempt),
            }
            check(run(tmp_path, settings), tested=2 * (len(tags) + len(manifests) + len(blobs)))
    finally:
        child.stop()
    prefix = f"/v2/{REPOSITORY}/"
    seen = registry.requests.exchanges(path_prefix=prefix)
    assert not [one for one in seen if one.body_bytes and one.status != 404]


def run(folder: Path, settings: dict[str, str]) -> str:
    """Run the tests and return their report; what a pull-through mirror has not is off."""
    off = ("PUSH", "BLOBS_DELETE", "MANIFESTS_DELETE", "TAGS_DELETE", "TAGS_LIST", "REFERRER")
    env = environment(
        OCI_TLS="disabled", **{f"OCI_API_{name}": "false" for name in off}, **settings
    )
    # Its exit code says nothing here: this version fails to write its result files for a
    # read-only registry, after the report.
    done = subprocess.run(
        [locate("oci-conformance")],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.stdout + done.stderr


def check(report: str, *, tested: int) -> None:
    """See that so much was tested, and that nothing failed or was skipped."""
    assert "OCI Conformance Result: Pass" in report, report
    counts = {name: int(number) for name, number in _COUNT.findall(report)}
    assert (counts["Skip"], counts["FAIL"], counts["Error"]) == (0, 0, 0), report
    assert counts["Pass"] >= tested, report
    assert set(_PULL_APIS) <= set(_PASSED.findall(report)), report
