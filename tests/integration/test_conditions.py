"""What goes wrong with an origin or a disk, as `kubectl` shows it: reason, remedy, and its end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.faults.blob_reader import Outcome, first_wrong, read_blob
from tests.faults.origin_rules import (
    Inject,
    Scene,
    all_answers,
    change_certificate,
    stop_listening,
)
from tests.faults.origin_stages import Blob, HTTPProxyStage, Trust
from tests.harness.controlplane import ControlPlane
from tests.harness.installation import AUDIENCE, Installation, as_list
from tests.harness.process import poll_until

from blobcache_storage.testing.fault_origin import Answer, Misbehaviour
from blobcache_storage.testing.oracle import ByteOracle

NODE = "node-1"
NAMESPACE = "demo"
NAME = "files"
SIZE = 300_000
MIB = 1024 * 1024
DISK_BYTES = 64 * MIB
MIN_FREE_BYTES = 16 * MIB
WAIT_SECONDS = 60.0

pytestmark = [pytest.mark.xdist_group("conditions"), pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Trouble:
    """What goes wrong, and how it must be told."""

    inject: Inject
    reason: str
    remedy: str


TROUBLES = {
    "denied": Trouble(
        all_answers(lambda _: Misbehaviour(answer=Answer(403))),
        "OriginDenied",
        "the credentials must permit reading it",
    ),
    "unreachable": Trouble(
        stop_listening, "OriginUnreachable", "it must run, and this node must reach it"
    ),
    "throttled": Trouble(
        all_answers(lambda _: Misbehaviour(answer=Answer(503, {"Retry-After": "9"}))),
        "OriginThrottled",
        "`bytesPerSecondLimit` must ask for less",
    ),
    "TLS": Trouble(change_certificate, "OriginUnreachable", "`tls.caBundle` must hold"),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the installation; its node's cache has a small disk of its own."""
    folder = tmp_path_factory.mktemp("conditions")
    if os.geteuid() != 0:
        pytest.skip("cannot run here: mounting a small disk needs root")
    cache = folder / NODE / "cache"
    cache.mkdir(parents=True, mode=0o700)
    options = f"size={DISK_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "blobcache-conditions", str(cache)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot run here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


@pytest.fixture(scope="module")
def installation(disk: Path) -> Iterator[Installation]:
    """An operator and one agent over an API server of their own."""
    arguments = ("--allow-origin-cidr=127.0.0.0/16", f"--min-free={MIN_FREE_BYTES}")
    with (
        ControlPlane() as control_plane,
        Installation(control_plane, [NODE], agent_arguments=arguments, folder=disk) as made,
    ):
        kubectl = control_plane.kubectl
        kubectl("create", "namespace", NAMESPACE)
        kubectl("create", "serviceaccount", "reader", "-n", NAMESPACE)
        yield made


class World:
    """An installation whose one configuration reads from one origin."""

    def __init__(self, installation: Installation, stage: HTTPProxyStage) -> None:
        self.installation = installation
        self.stage = stage
        self._token = installation.control_plane.create_token(
            NAMESPACE, "reader", audience=AUDIENCE
        )
        self._blobs = 0

    async def apply(self) -> None:
        """Apply configuration and Secret, and wait until the node runs it."""
        values = {k: base64.b64encode(v.encode()).decode() for k, v in self._login().items()}
        labels = {"blobcache.dev/credentials": "true"}
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "credentials", "namespace": NAMESPACE, "labels": labels},
            "data": values,
        }
        backend = self.stage.backend(timeoutSeconds=2, retryLimit=0)
        config = {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheConfig",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {"backend": backend, "cache": {"chunkSize": "16Ki"}},
        }
        objects = json.dumps(as_list([secret, config]))
        kubectl = self.installation.control_plane.kubectl
        await asyncio.to_thread(kubectl, "apply", "-f", "-", input=objects)
        wait = self.installation.wait_for_condition
        await asyncio.to_thread(wait, NAMESPACE, NAME, "Ready")

    def _login(self) -> dict[str, str]:
        return dict(self.stage.credentials)

    def put(self) -> Blob:
        """Store a blob nobody has read yet."""
        self._blobs += 1
        blob = Blob(f"blob-{self._blobs}", SIZE)
        self.stage.put(blob)
        return blob

    async def read(self, blob: Blob, **span: int) -> Outcome:
        """Read a blob; what is served must be right."""
        port = self.installation.agents[NODE].data_port
        path = f"{NAMESPACE}/{NAME}/{blob.name}"
        outcome = await read_blob(port, path, token=self._token, **span)
        if outcome.is_served:
            assert first_wrong(outcome, self.stage.oracle, blob.name, blob.version) is None
        return outcome

    async def wait_for(
        self, kind: str, condition: str, status: str, reason: str, says: str = ""
    ) -> None:
        """Wait until a condition of the configuration or of the node is so."""
        where = {"bcc": (NAME, NAMESPACE), "bcn": (NODE, None)}[kind]
        found: dict[str, Any] = {}

        def is_so() -> bool:
            conditions = self.installation.get(kind, *where).get("status", {}).get("conditions", [])
            found.update(next((c for c in conditions if c["type"] == condition), {}))
            has_reason = (found.get("status"), found.get("reason")) == (status, reason)
            return has_reason and says in found["message"]

        in_time = await asyncio.to_thread(poll_until, is_so, timeout=WAIT_SECONDS)
        assert in_time, f"{condition} is not {status}, {reason}, '{says}': {found}"

    async def wait_until_well(self) -> None:
        """Wait until nothing fails."""
        await self.wait_for("bcc", "Degraded", "False", "AsExpected")
        await self.wait_for("bcn", "OriginReachable", "True", "NoErrors")


@pytest.fixture
async def world(installation: Installation) -> AsyncIterator[World]:
    """The configuration is applied anew for an origin of its own, and all is well."""
    trust = await asyncio.to_thread(Trust)
    async with HTTPProxyStage(ByteOracle(11), trust) as stage:
        made = await asyncio.to_thread(World, installation, stage)
        await made.apply()
        assert (await made.read(made.put())).is_whole
        await made.wait_until_well()
        yield made


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
async def test_an_origin_in_trouble_is_told_until_it_is_well(
    world: World, trouble: Trouble
) -> None:
    """Degraded and OriginReachable give reason and remedy, and go back once a read succeeds."""

    async def nothing_more() -> None:
        """Nobody names digests."""

    blob = world.put()
    await trouble.inject(Scene(world.stage, blob, "cold", nothing_more))
    assert (await world.read(blob)).code == trouble.reason
    await world.wait_for("bcc", "Degraded", "True", trouble.reason, trouble.remedy)
    await world.wait_for("bcn", "OriginReachable", "False", trouble.reason, trouble.remedy)
    await world.stage.heal()
    assert (await world.read(blob)).is_whole
    await world.wait_until_well()


async def test_a_changed_blob_degrades_nothing(world: World) -> None:
    """The read that meets the change begins anew and succeeds; there is nothing to mend."""
    blob = world.put()
    assert (await world.read(blob, first=0, last=SIZE // 2)).is_whole
    blob.version = 2
    world.stage.put(blob)
    outcome = await world.read(blob)
    assert outcome.is_whole
    assert outcome.headers["etag"] == world.stage.etag(blob, 2)
    await world.wait_until_well()


async def test_a_full_disk_is_told_until_there_is_room(world: World, disk: Path) -> None:
    """DiskPressure says what to do; readers get their bytes meanwhile."""
    filler = disk / NODE / "cache" / "filler"
    await world.wait_for("bcn", "DiskPressure", "False", "EnoughFree")
    await asyncio.to_thread(filler.write_bytes, bytes(DISK_BYTES - MIN_FREE_BYTES))
    try:
        await world.wait_for("bcn", "DiskPressure", "True", "TooLittleFree", "--min-free")
        blob = world.put()
        for _ in range(2):
            assert (await world.read(blob)).is_whole
    finally:
        await asyncio.to_thread(filler.unlink)
    await world.wait_for("bcn", "DiskPressure", "False", "EnoughFree")
    assert (await world.read(world.put())).cache_status == "fwd=miss; stored"
