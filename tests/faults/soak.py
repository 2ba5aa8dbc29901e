"""An agent under steady reading while its origins misbehave in one way after another.

`python -m tests.faults.soak --minutes 10 --seed 1`. Readers are paced, so that it may run beside
other tests: it takes about a fifth of a core. Blobs are replaced at their origins as it goes, and
do not all fit, so that they are evicted and fetched again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blobcache_storage.testing.fault_origin import Misbehaviour
from blobcache_storage.testing.oracle import ByteOracle
from tests.faults.blob_reader import Outcome, read_blob
from tests.faults.loop_volume import die_with_parent
from tests.faults.origin_faults import NAMESPACE, FaultyAgent
from tests.faults.origin_rules import FAULTS, PHASES, SIZE_BYTES, Scene
from tests.faults.origin_stages import STAGES, Blob, RegistryStage, Stage, Trust
from tests.integration.agent_world import pushed

BLOBS: Final = 24
"""Of each kind of origin; some two thirds of them fit."""
CAPACITY: Final = "5Mi"
READ_OFTEN: Final = 0.09
"""Rate of the exponential distribution of the number of the blob that is read: 11 on average."""
READERS: Final = 2
"""Of each kind of origin."""
PAUSE_SECONDS: Final = (0.05, 0.4)
"""Between a reader's reads."""
FAULT_SECONDS: Final = (1.0, 4.0)
GOOD_SECONDS: Final = (1.0, 5.0)
SAMPLE_SECONDS: Final = 1.0
WINDOW_FRACTION: Final = 0.05
"""Of the run: what is compared at half time and at the end is the median of so long a while."""
READ_SECONDS_MAX: Final = 60.0
OWN_WAYS: Final = ("none", "ETag change mid-blob", "redirect to another host",
                   "wrong data of the same length")  # fmt: skip
"""Rows of the table that speak of one blob: here they happen to all blobs of an origin."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The agent's process at one moment."""

    seconds: float
    rss_bytes: int
    descriptors: int
    threads: int


def sample(pid: int, seconds: float) -> Sample:
    """Look at a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    rss = int(fields["VmRSS"].split()[0]) * 1024
    return Sample(seconds, rss, descriptors, int(fields["Threads"]))


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


class OriginSoak:
    """One kind of origin: its readers, and what goes wrong with it."""

    def __init__(self, agent: FaultyAgent, stage: Stage, seed: int, counts: Counter[str]) -> None:
        self._agent = agent
        self._stage = stage
        self._rng = random.Random(f"{seed}/{stage.kind}")
        self._counts = counts
        self._blobs = [Blob(f"{stage.kind}/{n}", SIZE_BYTES - n) for n in range(BLOBS)]
        self.wrong: list[str] = []
        for blob in self._blobs:
            stage.put(blob)

    def leaks(self) -> list[str]:
        """Return what reached others and should not have."""
        return self._stage.leaks()

    def config(self) -> dict[str, Any]:
        """Return the configuration."""
        return pushed(
            self._stage.kind,
            self._stage.backend(timeoutSeconds=1, connectTimeoutSeconds=1, retryLimit=1),
            namespace=NAMESPACE,
            spec={"cache": {"chunkSize": "16Ki", "capacity": CAPACITY}},
            credentials=self._stage.credentials,
            credentialsState="Present",
        )

    # -- what goes wrong ---------------------------------------------------------------------------

    async def misbehave(self) -> None:
        """Have one fault after another, with good times between, until cancelled."""
        rows = [row for row in FAULTS if self._stage.kind not in row.meaningless]
        rows = [row for row in rows if row.name != "none" and (self._stage.trust or not row.tls)]
        while True:
            self._rng.shuffle(rows)
            for row in rows:
                await asyncio.sleep(self._rng.uniform(*GOOD_SECONDS))
                if row.name in OWN_WAYS:
                    self._happen_to_all(row.name)
                else:
                    phases = [found for name in PHASES if (found := row.phase(name))]
                    scene = Scene(self._stage, self._blobs[0], "half", self._nothing_to_declare)
                    await self._rng.choice(phases).inject(scene)
                self._counts[f"fault {row.name}"] += 1
                await asyncio.sleep(self._rng.uniform(*FAULT_SECONDS))
                await self._stage.heal()
                self._stage.store.redirects = lambda request: None

    async def _nothing_to_declare(self) -> None:
        """Digests are the registry's alone here."""

    def _happen_to_all(self, name: str) -> None:
        stage, is_registry = self._stage, isinstance(self._stage, RegistryStage)
        if name == "redirect to another host":
            for blob in self._blobs:
                stage.put(blob, stage.stranger)
            stage.store.redirects = lambda request: f"{stage.stranger.url}{request.target}"
        elif name == "wrong data of the same length" and is_registry:
            # Nobody could tell without a digest: other kinds' blobs have none here.
            stage.store.always = Misbehaviour(corrupt_at=SIZE_BYTES // 2)
        elif name == "ETag change mid-blob" and not is_registry:
            for blob in self._rng.sample(self._blobs, BLOBS // 4):
                blob.version += 1
                stage.put(blob)

    # -- readers -----------------------------------------------------------------------------------

    async def read(self, number: int, until: float) -> None:
        """Be one reader: mostly of few blobs, whole or in part."""
        rng = random.Random(f"{self._rng.random()}/{number}")
        while time.monotonic() < until:
            blob = self._blobs[min(int(rng.expovariate(READ_OFTEN)), BLOBS - 1)]
            span = {}
            if rng.random() < 0.5 and not isinstance(self._stage, RegistryStage):
                # A range of a blob that lies is passed on as it is sent; the whole is not.
                span["first"] = rng.randrange(blob.size_bytes)
                span["last"] = rng.randrange(span["first"], blob.size_bytes)
            outcome = await read_blob(
                self._agent.data_port,
                f"{NAMESPACE}/{self._stage.kind}/{self._stage.blob_id(blob)}",
                token=self._agent.token,
                timeout_seconds=READ_SECONDS_MAX,
                **span,
            )
            self._judge(blob, outcome)
            await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))

    def _judge(self, blob: Blob, outcome: Outcome) -> None:
        counts = self._counts
        counts["reads"] += 1
        if not outcome.is_served:
            counts[f"error {outcome.code}"] += 1
            counts["errors"] += 1
            return
        counts["hits" if outcome.cache_status == "hit" else "misses"] += 1
        counts["fills"] += outcome.cache_status.endswith("; stored")
        counts["cut short"] += not outcome.is_whole
        if isinstance(self._stage, RegistryStage) and not outcome.is_whole:
            return  # of a digest-named blob the end is held back, not what came before
        body = outcome.body
        if (outcome.status, outcome.cache_status) == (200, "fwd=miss"):
            # Relayed whole, in one answer: an origin that appends to it says that it is longer.
            body = body[: blob.size_bytes]
        counts["bytes checked"] += len(body)
        etag = outcome.headers.get("etag")
        versions = [v for v in range(1, blob.version + 1) if self._stage.etag(blob, v) == etag]
        if etag is None:  # relayed: it is the present version, or was a moment ago
            versions = [v for v in (blob.version, blob.version - 1) if v]
        oracle, start = self._stage.oracle, outcome.start
        if all(oracle.first_wrong(blob.name, v, start, body) is not None for v in versions):
            self.wrong.append(f"{blob.name} {etag} of {versions}: {outcome}")


async def run(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Soak an agent and return what was seen."""
    counts: Counter[str] = Counter()
    oracle, trust = ByteOracle(seed), Trust()
    agent = FaultyAgent(folder / "soak", "soak")
    await agent.start()
    try:
        async with contextlib.AsyncExitStack() as stages:
            soaks = []
            for kind, make in STAGES.items():
                stage = make(oracle, trust if kind == "http" else None)
                await stages.enter_async_context(stage)
                soaks.append(OriginSoak(agent, stage, seed, counts))
                await agent.push(kind, soaks[-1].config())
            samples = await _soak(agent, soaks, minutes * 60)
            leaks = [leak for soak in soaks for leak in soak.leaks()]
        metrics = await asyncio.to_thread(agent.metrics)
        taken = cpu_seconds(agent.pid) + time.process_time()
    finally:
        await agent.stop()
    return {
        "seed": seed,
        "minutes": minutes,
        "wrong": [wrong for soak in soaks for wrong in soak.wrong],
        "leaks": leaks,
        "evicted_blobs": _sum(metrics, "blobcache_agent_config_evicted_blobs_total"),
        "origin_bytes": _sum(metrics, "blobcache_agent_config_origin_bytes_total"),
        "faults": sum(n for what, n in counts.items() if what.startswith("fault ")),
        "cores": round(taken / samples[-1].seconds, 3),
        **_compare(samples),
        "counts": dict(sorted(counts.items())),
    }


async def _soak(agent: FaultyAgent, soaks: Sequence[OriginSoak], seconds: float) -> list[Sample]:
    """Read under faults for so long; return samples of the agent's process."""
    samples, begun = [], time.monotonic()
    until = begun + seconds
    faults = [asyncio.create_task(soak.misbehave()) for soak in soaks]
    readers = [asyncio.create_task(soak.read(n, until)) for soak in soaks for n in range(READERS)]
    try:
        while time.monotonic() < until:
            samples.append(sample(agent.pid, time.monotonic() - begun))
            for task in (*faults, *readers):
                if task.done():
                    task.result()
            await asyncio.sleep(SAMPLE_SECONDS)
        await asyncio.gather(*readers)
    finally:
        for task in (*faults, *readers):
            task.cancel()
        await asyncio.gather(*faults, *readers, return_exceptions=True)
    return samples


def _compare(samples: Sequence[Sample]) -> dict[str, int]:
    """Return the figures at half time and at the end, and the highest ones."""
    end = samples[-1].seconds
    window = max(5.0, end * WINDOW_FRACTION)
    half = [s for s in samples if end / 2 - window <= s.seconds <= end / 2]
    last = [s for s in samples if end - window <= s.seconds]
    found = {"threads_max": max(s.threads for s in samples)}
    for name in ("rss_bytes", "descriptors"):
        for label, some in (("half", half), ("end", last)):
            found[f"{name}_{label}"] = int(statistics.median(getattr(s, name) for s in some))
        found[f"{name}_max"] = max(getattr(s, name) for s in samples)
    return found


def _sum(metrics: dict[str, float], name: str) -> int:
    return int(sum(value for label, value in metrics.items() if label.startswith(name)))


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Soaks an agent in origin faults.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    die_with_parent()
    folder = Path(tempfile.mkdtemp(prefix="blobcache-soak-"))
    try:
        found = asyncio.run(run(arguments.minutes, arguments.seed, folder))
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
