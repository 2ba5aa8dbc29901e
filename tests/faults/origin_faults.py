"""The matrix of origin faults: real agents, real protocols, an origin that does each thing wrong.

One agent for each kind of origin; each cell has a configuration, an origin and blobs of its own,
so that no cell's breaker or budget is another's. Agents run as in a cluster: told by a pretended
operator over mutual TLS, read with tokens, private addresses refused unless permitted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from blobcache_storage.testing.oracle import ByteOracle
from tests.faults.blob_reader import Outcome, first_wrong, read_blob
from tests.faults.loop_volume import die_with_parent
from tests.faults.origin_rules import (
    HALF_BYTES,
    KINDS,
    PHASES,
    RETRY_LIMIT,
    SIZE_BYTES,
    TIMEOUT_SECONDS,
    Broken,
    Cell,
    Expected,
    OneVersion,
    Phase,
    Refused,
    Right,
    Scene,
    all_cells,
)
from tests.faults.origin_stages import PERMITTED_NETWORK, STAGES, Blob, Stage, Trust
from tests.harness.installation import AgentProcess
from tests.integration.agent_world import Operator, pushed

NAMESPACE: Final = "faults"
CELLS_AT_ONCE: Final = 16
"""Of one kind: more would keep two cores from answering within the time-outs."""
READ_SECONDS_MAX: Final = 40.0
"""The longest a reader may wait for anything, on a machine with other work; most wait 4 to 9 s."""
RETRY_SECONDS: Final = 0.25
NEEDED_FACTOR: Final = 1.1
REQUESTS_PER_FAULT: Final = 3


@dataclass(slots=True)
class Story:
    """What happened in a cell."""

    cell: str
    problems: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    faults: int = 0
    requests: int = 0
    bytes_checked: int = 0
    hits: int = 0
    healed_in_seconds: float = 0.0


class FaultyAgent:
    """One agent and the stages of all cells of one kind."""

    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir()
        self.kind = kind
        self._operator = Operator(folder, kind, lambda: self._agent.control_port)
        self._agent = AgentProcess(
            kind,
            folder / "node",
            self._operator.tls_dir,
            [f"--allow-origin-cidr={PERMITTED_NETWORK}", "--min-free=1Mi"],
        )
        self.token = self._operator.readers.token(NAMESPACE)
        self._configs: dict[str, dict[str, Any]] = {}
        self._revision = 0
        self._pushing = asyncio.Lock()

    async def start(self) -> None:
        """Start the agent."""
        await asyncio.to_thread(self._agent.start)

    async def stop(self) -> None:
        """End it."""
        await asyncio.to_thread(self._agent.stop)

    @property
    def data_port(self) -> int:
        """Where it is read."""
        return self._agent.data_port

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._agent.child is not None
        return self._agent.child.pid

    def metrics(self) -> dict[str, float]:
        """Return all samples it exposes. Blocking."""
        return self._agent.metrics()

    async def push(self, name: str, config: dict[str, Any]) -> None:
        """Have the agent take a new or changed configuration, beside those it has."""
        async with self._pushing:
            self._configs[name] = config
            self._revision += 1
            status, body = await asyncio.to_thread(
                self._operator.push, 1, self._revision, *self._configs.values()
            )
        assert status == 200, body
        found = next(result for result in body["configs"] if result["name"] == name)
        assert found["applied"], found

    async def read(self, name: str, blob_id: str, **span: int) -> Outcome:
        """Read a blob, or the first bytes of it."""
        return await read_blob(
            self.data_port,
            f"{NAMESPACE}/{name}/{blob_id}",
            token=self.token,
            timeout_seconds=READ_SECONDS_MAX,
            **span,
        )


class CellRun:
    """One cell, from its first blob to the last check."""

    def __init__(self, agent: FaultyAgent, stage: Stage, cell: Cell, number: int) -> None:
        self._agent = agent
        self._stage = stage
        self._cell = cell
        self._name = f"cell-{number}"
        self._blobs: list[Blob] = []
        self.story = Story(str(cell))

    async def run(self, turns: asyncio.Semaphore) -> None:
        """Go through all phases; what goes wrong unexpectedly is a problem, too."""
        try:
            await self._agent.push(self._name, self._config())
            async with turns:
                primer = self._put("primer")
                self._expect("primer", await self._read(primer), Right(), primer)
            for name in PHASES:
                phase = self._cell.fault.phase(name)
                # A hot blob is not asked for: one phase tells as much as two.
                if phase and (self._cell.state != "hot" or name == "lasting" or not self._last):
                    await self._run_phase(name, phase, turns)
        except (OSError, AssertionError, TimeoutError) as error:
            self._problem(f"{type(error).__name__}: {error}")
        self.story.problems += self._stage.leaks()

    @property
    def _last(self) -> bool:
        return self._cell.fault.lasting is not None

    async def _run_phase(self, name: str, phase: Phase, turns: asyncio.Semaphore) -> None:
        """Read under the fault, end it, read again."""
        state, stage = self._cell.state, self._stage
        async with turns:
            blob = self._put(name)
            await self._prepare(blob)
            scene = Scene(stage, blob, state, self._declare_digests)
            requests, faults = stage.requests, stage.faults
            if state == "hot":
                outcome = await self._read_hot(scene, phase)
            else:
                await phase.inject(scene)
                outcome = await self._read(blob)
                self._expect(name, outcome, phase.expected(self._cell.kind, state), blob)
            await self._stage.heal()
        await self._read_until_right(blob, turns)
        met = stage.faults - faults + scene.events
        reads = 2 if not (outcome.is_served and outcome.is_whole) else 1
        self._check_requests(name, stage.requests - requests, met, reads)
        async with turns:
            await self._read_again(blob)
        self.story.faults += met
        self.story.requests += stage.requests - requests

    async def _read_hot(self, scene: Scene, phase: Phase) -> Outcome:
        """Read the hot blob under the fault, and a cold one that proves it was there."""
        blob, witness = scene.blob, self._put("witness")
        scene.blob, scene.state = witness, "cold"
        await phase.inject(scene)
        before = self._stage.requests_for(blob)
        outcome = await self._read(blob)
        self._expect("hot", outcome, Right("hit"), blob)
        if self._stage.requests_for(blob) != before:
            self._problem("a hit cost requests")
        expected = phase.expected(self._cell.kind, "cold")
        self._expect("witness", await self._read(witness), expected, witness)
        return outcome

    async def _prepare(self, blob: Blob) -> None:
        """Have as much cached as the state says."""
        if self._cell.state == "half":
            outcome = await self._read(blob, first=0, last=HALF_BYTES - 1)
            self._expect("first half", outcome, Right(), blob, HALF_BYTES)
        elif self._cell.state == "hot":
            self._expect("first", await self._read(blob), Right(), blob)

    async def _read_until_right(self, blob: Blob, turns: asyncio.Semaphore) -> None:
        begun = time.monotonic()
        deadline = begun + self._cell.fault.heals_in_seconds
        while True:
            async with turns:
                outcome = await self._read(blob)
            if not self._problems_with(outcome, Right(), blob):
                break
            if time.monotonic() > deadline:
                self._expect("healed", outcome, Right(), blob)
                break
            await asyncio.sleep(RETRY_SECONDS)
        healed = round(time.monotonic() - begun, 1)
        self.story.healed_in_seconds = max(healed, self.story.healed_in_seconds)

    async def _read_again(self, blob: Blob) -> None:
        """What was read once more is cached by now."""
        before = self._stage.requests_for(blob)
        outcome = await self._read(blob)
        is_stored = self._cell.fault.is_stored_after or self._cell.kind == "registry"
        self._expect("again", outcome, Right("hit" if is_stored else ""), blob)
        if is_stored and self._stage.requests_for(blob) != before:
            self._problem("a hit after the fault cost requests")

    def _check_requests(self, phase: str, requests: int, faults: int, reads: int) -> None:
        cell, stage = self._cell, self._stage
        needed = {"cold": stage.requests_cold, "half": 1, "hot": stage.requests_cold}[cell.state]
        if cell.state == "hot":
            reads = 1  # the witness's
        allowed = NEEDED_FACTOR * needed * reads + REQUESTS_PER_FAULT * faults
        if requests > allowed:
            self._problem(f"{phase}: {requests} requests, {faults} faults, {allowed:.1f} allowed")
        if not faults and cell.fault.is_seen_by_origin and cell.fault.name != "none":
            self._problem(f"{phase}: void: no fault was met")

    # -- reading and judging -----------------------------------------------------------------------

    async def _read(self, blob: Blob, **span: int) -> Outcome:
        outcome = await self._agent.read(self._name, self._stage.blob_id(blob), **span)
        self.story.hits += outcome.cache_status == "hit"
        return outcome

    def _expect(
        self,
        what: str,
        outcome: Outcome,
        expected: Expected,
        blob: Blob,
        length: int = SIZE_BYTES,
    ) -> None:
        self.story.outcomes.append(f"{what}: {outcome}")
        for problem in self._problems_with(outcome, expected, blob, length):
            self._problem(f"{what}: {problem}: {outcome}; expected {expected}")

    def _problems_with(
        self, outcome: Outcome, expected: Expected, blob: Blob, length: int = SIZE_BYTES
    ) -> list[str]:
        if outcome.is_served:
            return self._problems_with_bytes(outcome, expected, blob, length)
        match expected:
            case Right():
                return ["an error in place of the bytes"]
            case Refused(status, code, says, retry_after):
                given = outcome.headers.get("retry-after")
                is_right = (outcome.status, outcome.code, given) == (status, code, retry_after)
                return [] if is_right and says in outcome.message else ["another error"]
            case Broken(code):
                return [] if outcome.code == code else ["another error"]
            case OneVersion():
                return [] if outcome.code == "BlobChanged" else ["another error"]

    def _problems_with_bytes(
        self, outcome: Outcome, expected: Expected, blob: Blob, length: int
    ) -> list[str]:
        found = []
        version = self._version_of(outcome, blob)
        if outcome.length != length:
            found.append("another length announced")
        if len(outcome.body) > outcome.length:
            found.append("more bytes than announced")
        self.story.bytes_checked += len(outcome.body)
        is_excused = isinstance(expected, Broken) and expected.as_sent and not outcome.is_whole
        if (
            not is_excused
            and first_wrong(outcome, self._stage.oracle, blob.name, version) is not None
        ):
            found.append(f"a wrong byte of version {version}")
        match expected:
            case Right(cache_status, seconds_min):
                if not outcome.is_whole:
                    found.append("cut short")
                if version != blob.version and cache_status != "hit":
                    found.append(f"version {version} instead of {blob.version}")
                if cache_status and outcome.cache_status != cache_status:
                    found.append("another cache status")
                if outcome.seconds < seconds_min:
                    found.append("asked again too early")
            case Refused():
                found.append("bytes in place of an error")
            case Broken():
                found += ["all of it"] if outcome.is_whole else []
            case OneVersion():
                pass
        return found

    def _version_of(self, outcome: Outcome, blob: Blob) -> int:
        """Return which version the answer says it is; the origin's present one if it says none."""
        etag = outcome.headers.get("etag")
        if etag is None or isinstance(self._stage, STAGES["registry"]):
            return blob.version
        known = [n for n in (1, 2) if self._stage.etag(blob, n) == etag]
        return known[0] if known else -1

    def _problem(self, text: str) -> None:
        self.story.problems.append(text)

    # -- blobs and configurations ------------------------------------------------------------------

    def _put(self, name: str) -> Blob:
        blob = Blob(f"{self._name}/{name}", SIZE_BYTES)
        self._stage.put(blob)
        self._blobs.append(blob)
        return blob

    def _config(self, **spec: Any) -> dict[str, Any]:
        backend = self._stage.backend(
            timeoutSeconds=TIMEOUT_SECONDS,
            connectTimeoutSeconds=TIMEOUT_SECONDS,
            retryLimit=RETRY_LIMIT,
        )
        return pushed(
            self._name,
            backend,
            namespace=NAMESPACE,
            spec={"cache": {"chunkSize": "16Ki"}, **spec},
            credentials=self._stage.credentials,
            credentialsState="Present",
        )

    async def _declare_digests(self) -> None:
        """Name the digests of all blobs; a registry's blobs are named by them already."""
        if self._cell.kind == "registry":
            return
        listed = [
            {
                "id": self._stage.blob_id(blob),
                "size": blob.size_bytes,
                "digest": self._stage.oracle.digest(blob.name, 1, blob.size_bytes),
            }
            for blob in self._blobs
        ]
        await self._agent.push(self._name, self._config(prefetch={"blobs": listed}))


async def run_kind(folder: Path, kind: str, cells: Sequence[Cell], seed: int) -> list[Story]:
    """Run all cells of one kind against one agent."""
    agent, trust = FaultyAgent(folder, kind), Trust()
    turns, runs = asyncio.Semaphore(CELLS_AT_ONCE), []
    await agent.start()
    try:
        async with contextlib.AsyncExitStack() as stages:
            for number, cell in enumerate(cells):
                oracle = ByteOracle(seed)
                stage = STAGES[kind](oracle, trust if cell.fault.tls else None)
                await stages.enter_async_context(stage)
                runs.append(CellRun(agent, stage, cell, number))
            await asyncio.gather(*(run.run(turns) for run in runs))
    finally:
        await agent.stop()
    return [run.story for run in runs]


async def run(only: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run all cells whose names hold a text, each kind in a folder of its own."""
    begun = time.monotonic()
    cells = [cell for cell in all_cells() if only in str(cell)]
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    found = await asyncio.gather(
        *(
            run_kind(folder / kind, kind, [cell for cell in cells if cell.kind == kind], seed)
            for kind in kinds
        )
    )
    stories = [story for of_kind in found for story in of_kind]
    return {
        "seed": seed,
        "cells": len(stories),
        "failed": [story.cell for story in stories if story.problems],
        "faults": sum(story.faults for story in stories),
        "requests": sum(story.requests for story in stories),
        "hits": sum(story.hits for story in stories),
        "bytes_checked": sum(story.bytes_checked for story in stories),
        "seconds": round(time.monotonic() - begun, 1),
        "stories": [asdict(story) for story in stories],
    }


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Reads through agents whose origins misbehave.")
    parser.add_argument("--only", default="", help="cells whose names hold this: 's3: 500'")
    parser.add_argument("--seed", type=int, default=1, help="of the bytes")
    arguments = parser.parse_args()
    die_with_parent()
    folder = Path(tempfile.mkdtemp(prefix="blobcache-origin-faults-"))
    try:
        found = asyncio.run(run(arguments.only, arguments.seed, folder))
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
