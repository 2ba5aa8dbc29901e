"""Hits: the agent against nginx (and Varnish), serving the same ranges of the same bytes."""

from __future__ import annotations

import contextlib
import random
import time
from collections import defaultdict

from bench.client import WRK_CONNECTIONS, Load, wrk
from bench.process import MIB
from bench.ratios import Row, at_least, at_most, figure_of, ratio_of, turns
from bench.servers import (
    DATA_NAME,
    PREFIX,
    Bench,
    Server,
    agent,
    nginx,
    origin,
    require,
    varnish,
    warm,
)

BLOB_BYTES = 256 * MIB
BLOB = f"hit-{BLOB_BYTES}"
SIZES = {"4 KiB": 4096, "256 KiB": 256 * 1024, "1 MiB": MIB, "16 MiB": 16 * MIB}
OFFSETS = 512
SEED = 6
SPEED_GOALS = {"4 KiB": 0.9}
SPEED_GOAL = 1.0
CPU_GOAL = 1.2

Samples = dict[str, list[float]]


def offsets_of(length: int) -> list[int]:
    """Return where ranges of a length begin: anywhere in the blob, at multiples of 4 KiB."""
    choice = random.Random(SEED)
    return [choice.randrange(0, (BLOB_BYTES - length) // 4096 + 1) * 4096 for _ in range(OFFSETS)]


def measure(bench: Bench) -> list[Row]:
    """Measure throughput, processor time per GB and memory for each size of range."""
    require("nginx")
    require("wrk")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(origin(bench))
        servers = {
            "nginx": (stack.enter_context(nginx(bench)), "/" + DATA_NAME),
            "blobcache": (stack.enter_context(agent(bench, source.port)), PREFIX + BLOB),
        }
        with contextlib.suppress(Exception):
            require("varnishd")
            servers["varnish"] = (stack.enter_context(varnish(bench, source.port)), "/" + BLOB)
        warm(servers["blobcache"][0], PREFIX + BLOB)
        rows = []
        for label, length in SIZES.items():
            rows += _measure_size(bench, servers, label, length)
        mine, reference = servers["blobcache"][0], servers["nginx"][0]
        memory = mine.process.memory_mib()
        note = f"nginx {_worker_mib(reference):.0f} MiB; after all of the hits above"
        rows.append(Row("hit-rss", "RSS after hits", figure_of([memory]), "MiB", note=note))
        return rows


def _worker_mib(server: Server) -> float:
    return max(server.process.memory_mib(pid=pid) for pid in server.process.pids())


def _measure_size(
    bench: Bench, servers: dict[str, tuple[Server, str]], label: str, length: int
) -> list[Row]:
    offsets = offsets_of(length)
    for server, path in servers.values():
        wrk(server.url(path), offsets, length, 1, bench.folder)
    speed: Samples = defaultdict(list)
    cpu: Samples = defaultdict(list)
    for _, name in turns(list(servers), bench.rounds):
        server, path = servers[name]
        load, seconds = _timed(bench, server, path, offsets, length)
        speed[name].append(load.requests_per_second)
        cpu[name].append(seconds / (load.bytes / 1e9))
    absolute = {name: figure_of(values).value for name, values in speed.items()}
    cpu_absolute = {name: figure_of(values).value for name, values in cpu.items()}
    key = label.replace(" ", "")
    note = ", ".join(f"{name} {value:,.0f}/s" for name, value in absolute.items())
    if "varnish" in speed:
        against = ratio_of(speed["blobcache"], speed["varnish"]).value
        note += f"; {against:.2f}x Varnish"
    cpu_note = ", ".join(f"{name} {value:.2f} s/GB" for name, value in cpu_absolute.items())
    return [
        Row(
            f"hit-{key}",
            f"hits, ranges of {label}",
            ratio_of(speed["blobcache"], speed["nginx"]),
            "x nginx",
            at_least(SPEED_GOALS.get(label, SPEED_GOAL)),
            note,
            {**absolute, "connections": WRK_CONNECTIONS},
        ),
        Row(
            f"cpu-{key}",
            f"server's CPU per GB, ranges of {label}",
            ratio_of(cpu["blobcache"], cpu["nginx"]),
            "x nginx",
            at_most(CPU_GOAL),
            cpu_note,
            cpu_absolute,
        ),
    ]


def _timed(
    bench: Bench, server: Server, path: str, offsets: list[int], length: int
) -> tuple[Load, float]:
    """Return what wrk measured and the processor time the server spent on it."""
    before = server.process.cpu_seconds()
    load = wrk(server.url(path), offsets, length, bench.seconds, bench.folder)
    # Answers under way when wrk hung up are worked off first.
    time.sleep(0.05)
    return load, server.process.cpu_seconds() - before
