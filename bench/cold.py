"""Misses: a cold blob against the origin itself, the first byte, and what sparse reads cost."""

from __future__ import annotations

import random
import time
from collections import defaultdict

from bench.client import Reader
from bench.process import GIB, MIB
from bench.ratios import Row, at_least, at_most, figure_of, percentile, ratio_of, turns
from bench.servers import PREFIX, Bench, agent, origin

LATENCY_SECONDS = 0.02
BYTES_PER_SECOND = 200e6
COLD_BYTES = GIB
COLD_GOAL = 0.98
UNLIMITED_GOAL = 0.3
FIRST_BYTES = 60
FIRST_BYTE_BLOB_BYTES = MIB
FIRST_BYTE_GOAL_MS = 23.0
SPARSE_READS = 500
SPARSE_BLOB_BYTES = GIB
SPARSE_GOAL = 3.4
SEED = 8


def measure(bench: Bench) -> list[Row]:
    """Read 1 GiB that is not cached, from a slow and from an unlimited origin."""
    slow = _cold(bench, "slow", LATENCY_SECONDS, BYTES_PER_SECOND, min(bench.rounds, 5))
    fast = _cold(bench, "unlimited", 0.0, 0.0, bench.rounds)
    return [
        _cold_row("cold-slow", "cold 1 GiB, origin of 200 MB/s and 20 ms", slow, COLD_GOAL),
        _cold_row("cold-unlimited", "cold 1 GiB, unlimited local origin", fast, UNLIMITED_GOAL),
    ]


def _cold(
    bench: Bench, name: str, latency_seconds: float, bytes_per_second: float, rounds: int
) -> dict[str, list[float]]:
    """Return speeds in bytes per second, with and without the cache between."""
    speeds: dict[str, list[float]] = defaultdict(list)
    with origin(
        bench, latency_seconds=latency_seconds, bytes_per_second=bytes_per_second
    ) as source:
        for number, who in turns(["direct", "blobcache"], rounds):
            blob = f"{name}{number}-{COLD_BYTES}"
            if who == "direct":
                with Reader(source.port) as reader:
                    seconds = reader.get("/" + blob).seconds
            else:
                # An agent and a folder of its own: no eviction, and nothing left to write back.
                with agent(bench, source.port) as server, Reader(server.port) as reader:
                    before = server.process.cpu_seconds()
                    seconds = reader.get(PREFIX + blob).seconds
                    spent = server.process.cpu_seconds() - before
                    speeds["cpu"].append(spent / (COLD_BYTES / 1e9))
                    speeds["peak"].append(server.process.memory_mib("VmHWM"))
            speeds[who].append(COLD_BYTES / seconds)
    return speeds


def _cold_row(key: str, title: str, speeds: dict[str, list[float]], goal: float) -> Row:
    direct, mine = (figure_of(speeds[name]).value / 1e6 for name in ("direct", "blobcache"))
    cpu, peak = figure_of(speeds["cpu"]).value, max(speeds["peak"])
    return Row(
        key,
        title,
        ratio_of(speeds["blobcache"], speeds["direct"]),
        "x direct",
        at_least(goal),
        f"direct {direct:,.0f} MB/s, blobcache {mine:,.0f} MB/s; CPU {cpu:.2f} s/GB;"
        f" peak RSS {peak:.0f} MiB",
        {"direct": direct, "blobcache": mine, "cpu_per_gb": cpu, "peak_mib": peak},
    )


def measure_first_byte(bench: Bench) -> list[Row]:
    """Time the first byte of misses over an origin whose answers take 20 ms to begin."""
    times: dict[str, list[float]] = defaultdict(list)
    with (
        origin(bench, latency_seconds=LATENCY_SECONDS) as source,
        agent(bench, source.port) as server,
        Reader(source.port) as direct,
        Reader(server.port) as reader,
    ):
        # The first miss of all connects to the origin.
        reader.get(f"{PREFIX}first-{FIRST_BYTE_BLOB_BYTES}")
        for number, who in turns(["direct", "blobcache"], FIRST_BYTES):
            blob = f"byte{number}-{FIRST_BYTE_BLOB_BYTES}"
            # What the last miss left to write is not this one's.
            time.sleep(0.02)
            answer = direct.get("/" + blob) if who == "direct" else reader.get(PREFIX + blob)
            times[who].append(answer.first_byte_seconds * 1000)
    figure = figure_of(times["blobcache"])
    reference = figure_of(times["direct"])
    slowest = percentile(times["blobcache"], 95)
    return [
        Row(
            "first-byte",
            "first byte of a miss, origin of 20 ms",
            figure,
            "ms",
            at_most(FIRST_BYTE_GOAL_MS),
            f"direct {reference.value:.1f} ms; p95 {slowest:.1f} ms;"
            f" {FIRST_BYTES} misses of blobs of 1 MiB",
            {"direct": reference.value, "p95": slowest},
        )
    ]


def measure_sparse(bench: Bench) -> list[Row]:
    """Read 4 to 64 KiB at random places of a cold blob; count what that costs the origin."""
    return [
        _sparse(bench, "sparse-fast", "unlimited local origin", 0.0, 0.0, SPARSE_GOAL),
        _sparse(
            bench,
            "sparse-slow",
            "origin of 200 MB/s and 20 ms",
            LATENCY_SECONDS,
            BYTES_PER_SECOND,
            None,
        ),
    ]


def _sparse(
    bench: Bench,
    key: str,
    place: str,
    latency_seconds: float,
    bytes_per_second: float,
    goal: float | None,
) -> Row:
    choice = random.Random(SEED)
    asked, seconds = 0, []
    with (
        origin(bench, latency_seconds=latency_seconds, bytes_per_second=bytes_per_second) as source,
        agent(bench, source.port) as server,
        Reader(server.port) as reader,
    ):
        for _ in range(SPARSE_READS):
            length = choice.randrange(4096, 65536 + 1)
            start = choice.randrange(SPARSE_BLOB_BYTES - length)
            answer = reader.get(f"{PREFIX}sparse-{SPARSE_BLOB_BYTES}", (start, start + length))
            asked += answer.length
            seconds.append(answer.seconds * 1000)
        time.sleep(0.5)
        requests, sent = source.counters()
    typical = figure_of(seconds).value
    return Row(
        key,
        f"sparse reads of 4 to 64 KiB, {place}",
        figure_of([sent / asked]),
        "x asked",
        at_most(goal) if goal else None,
        f"{SPARSE_READS} reads of {asked / MIB:.0f} MiB cost {requests} requests and"
        f" {sent / MIB:.0f} MiB; a read takes {typical:.1f} ms",
        {"requests": requests, "asked_bytes": asked, "sent_bytes": sent, "median_ms": typical},
    )
