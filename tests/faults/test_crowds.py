"""Crowds of unfair clients at a real agent: others are served, and nothing is left afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobcache_storage.testing.oracle import ByteOracle
from tests.faults import scale
from tests.faults.crowds import CONFIG, DRIP_EACH_SECONDS
from tests.faults.worker import ROOT
from tests.harness.process import Child, environment, free_port, is_listening, poll_until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(300),
]

MIB = 1024 * 1024
LARGE_BLOBS, LARGE_BYTES = 4, 8 * MIB
SMALL_BLOBS, SMALL_BYTES = 1500, 20_000
HEALTHY_BLOBS = 50
SLOW_READERS = 500
DRIPPING_CLIENTS = 5000
FEW_DESCRIPTORS = 1024
MANY_DESCRIPTORS = 20_000
READ_SECONDS_MAX = 20.0
"""A reader who is refused asks again; one who is not served in this time counts as shut out."""
ASK_AGAIN_SECONDS = 0.2
GROWN_BYTES_MAX = 128 * MIB
DESCRIPTORS_LEFT_MAX = 16
"""More than at the start, beside two for each blob that may stay open."""


class Agent:
    """A standalone agent in a process of its own, with a limit of open files.

    Args:
        folder: Holds everything.
        descriptors: The limit, soft and hard.
    """

    def __init__(self, folder: Path, descriptors: int) -> None:
        self.oracle = ByteOracle(scale.seed())
        self.port, self.health_port = free_port(), free_port()
        origin = folder / "origin"
        origin.mkdir()
        for number in range(LARGE_BLOBS):
            name = f"large-{number}"
            (origin / name).write_bytes(self.oracle.blob(name, 1, LARGE_BYTES))
        for number in range(SMALL_BLOBS):
            name = f"small-{number}"
            (origin / name).write_bytes(self.oracle.blob(name, 1, SMALL_BYTES))
        namespace, name = CONFIG.split("/")
        config = folder / "config.yaml"
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "blobcache.dev/v1alpha1",
                    "kind": "BlobCacheConfig",
                    "metadata": {"namespace": namespace, "name": name},
                    "spec": {"backend": {"type": "LocalFS", "localFS": {"directory": str(origin)}}},
                }
            )
        )
        command = [
            "sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh",
            sys.executable, "-m", "blobcache_agent", "standalone",
            f"--cache-root={folder}/cache", "--min-free=1Mi", f"--allow-localfs={origin}",
            f"--listen=127.0.0.1:{self.port}", f"--health-listen=127.0.0.1:{self.health_port}",
            str(config),
        ]  # fmt: skip
        self.child = Child(command, log=folder / "agent.log", env=environment(), cwd=ROOT)
        self.child.wait_until(lambda: is_listening(self.port), timeout=60)

    def get(self, port: int, path: str) -> tuple[int, bytes]:
        """Ask once."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as link:
            link.request("GET", path)
            answer = link.getresponse()
            return answer.status, answer.read()

    def figures(self) -> dict[str, float]:
        """Return open descriptors and resident bytes, as the agent's own metrics say."""
        status, body = self.get(self.health_port, "/metrics")
        assert status == 200
        pairs = (line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#")
        found = {name: float(value) for name, value in pairs if name.startswith("process_")}
        return {
            "descriptors": found["process_open_fds"],
            "bytes": found["process_resident_memory_bytes"],
        }


class Healthy:
    """A reader as others are: one blob after the other, on a connection each, all checked."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.seconds: list[float] = []
        self.refused: Counter[str] = Counter()

    def read(self, number: int) -> None:
        """Read until served."""
        blob_id = f"small-{number % HEALTHY_BLOBS}"
        begun = time.monotonic()
        while True:
            try:
                status, body = self._agent.get(self._agent.port, f"/v1/blobs/{CONFIG}/{blob_id}")
            except (OSError, http.client.HTTPException) as error:
                self.refused[type(error).__name__] += 1
            else:
                if status == 200:
                    break
                self.refused[str(status)] += 1
            assert time.monotonic() - begun < READ_SECONDS_MAX, f"shut out: {self.refused}"
            time.sleep(ASK_AGAIN_SECONDS)
        assert body == self._agent.oracle.blob(blob_id, 1, SMALL_BYTES), "WRONG BYTES"
        self.seconds.append(time.monotonic() - begun)

    def read_for(self, seconds: float) -> None:
        """Read again and again, the probes in between."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read(len(self.seconds))
            if len(self.seconds) % 50 == 0:
                assert self._agent.get(self._agent.health_port, "/readyz")[0] == 200
            time.sleep(0.01)

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        shares = ((0.5, "median"), (0.99, "p99"), (1.0, "most"))
        times = [
            f"{name} {1000 * ordered[int((len(ordered) - 1) * share)]:.1f} ms"
            for share, name in shares
        ]
        return f"{len(ordered)} reads, {', '.join(times)}, refused {dict(self.refused)}"


class Crowd:
    """A crowd in a process of its own, from here until `end`."""

    def __init__(self, agent: Agent, kind: str, count: int, *arguments: str) -> None:
        command = [
            sys.executable, "-m", "tests.faults.crowds", kind, f"--port={agent.port}",
            f"--count={count}", f"--seed={scale.seed()}", *arguments,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline())
        if "cannot" in said:
            self._process.communicate()
            pytest.skip(f"cannot run here: {said['cannot']}")
        self.connected: int = said["connected"]

    def end(self) -> dict[str, Any]:
        """Have all of it leave, and return what it saw."""
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        print(found)  # noqa: T201
        assert not found.pop("problems found"), found
        return found


@contextlib.contextmanager
def watched(folder: Path, descriptors: int) -> Iterator[tuple[Agent, Healthy]]:
    """Run an agent; after the block it must be well, quiet, and hold nothing of anybody."""
    agent = Agent(folder, descriptors)
    with agent.child:
        healthy = Healthy(agent)
        for number in range(HEALTHY_BLOBS):
            healthy.read(number)
        alone = Healthy(agent)
        alone.read_for(1)
        before = agent.figures()
        healthy = Healthy(agent)
        yield agent, healthy
        kept = 2 * (LARGE_BLOBS + 256) + DESCRIPTORS_LEFT_MAX

        def is_back() -> bool:
            return agent.figures()["descriptors"] <= before["descriptors"] + kept

        assert poll_until(is_back, timeout=30), f"left open: {agent.figures()}, before {before}"
        after = agent.figures()
        print(f"alone {alone}\namid the crowd {healthy}\n{before} -> {after}")  # noqa: T201
        assert after["bytes"] - before["bytes"] < GROWN_BYTES_MAX
        assert agent.child.is_running()
        assert "Traceback" not in agent.child.log_text()
        agent.child.stop(timeout=30)
        assert agent.child.returncode == 0


def test_slow_readers_keep_nobody_waiting(tmp_path: Path) -> None:
    """500 who take a few hundred bytes at a time; all bytes of all are right."""
    with watched(tmp_path, MANY_DESCRIPTORS) as (agent, healthy):
        crowd = Crowd(agent, "slow", SLOW_READERS, f"--blobs={LARGE_BLOBS}")
        healthy.read_for(6)
        found = crowd.end()
        assert found["members at the end"] == SLOW_READERS, "a slow reader was cut off"
        assert found["sips"] >= 5 * SLOW_READERS, "void: too little was read"
        assert not healthy.refused
        assert len(healthy.seconds) >= 50, "void: too few others"


def test_dripping_clients_keep_nobody_out(tmp_path: Path) -> None:
    """5,000 who send a byte a second and come again, more than there are places."""
    with watched(tmp_path, MANY_DESCRIPTORS) as (agent, healthy):
        crowd = Crowd(
            agent, "drip", DRIPPING_CLIENTS, f"--blobs={LARGE_BLOBS}", "--come-again"
        )  # fmt: skip
        seconds = 12
        healthy.read_for(seconds)
        found = crowd.end()
        assert found["members at most"] >= 0.7 * DRIPPING_CLIENTS, "void: the crowd was small"
        assert found["drips"] >= DRIPPING_CLIENTS * seconds / DRIP_EACH_SECONDS * 0.2, "void"
        assert len(healthy.seconds) >= 50, "void: too few others"
        assert healthy.refused.total() <= max(5, len(healthy.seconds) // 50)


def test_descriptors_never_run_out(tmp_path: Path) -> None:
    """1,024 of them, and more clients, busy readers and blobs than that."""
    with watched(tmp_path, FEW_DESCRIPTORS) as (agent, healthy):
        crowds = [
            Crowd(agent, "slow", 150, f"--blobs={LARGE_BLOBS}"),
            Crowd(agent, "idle", SMALL_BLOBS, f"--blobs={SMALL_BLOBS}", "--prefix=small-"),
            Crowd(agent, "drip", 1000, f"--blobs={LARGE_BLOBS}", "--come-again"),
        ]
        healthy.read_for(6)
        most = agent.figures()["descriptors"]
        slow, idle, drip = (crowd.end() for crowd in crowds)
        assert most < FEW_DESCRIPTORS
        assert idle["tries"] >= SMALL_BLOBS
        refused = idle["answered 503"] + idle.get("idler closed after its answer", 0)
        assert refused >= SMALL_BLOBS // 4, "void: there was room for all"
        assert idle.get("cut off: ConnectionResetError", 0) <= SMALL_BLOBS // 20
        assert slow["members at the end"] >= 100, "void: few places were taken for long"
        assert drip["drips"] >= 300, "void: nobody dripped"
        assert len(healthy.seconds) >= 50, "void: too few others"
        assert "could not be accepted" not in agent.child.log_text()
