"""Many blobs: how long a start takes with 10,000 of them, and how much memory they need.

The caches are made with the engine's own code: data files are holes, and their maps say so
honestly (the checksum of zeros, sealed for its place), so that what is read verifies.
"""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path

from crc32c import crc32c

from bench.client import Reader
from bench.process import GIB, MIB, Process, free_port, running
from bench.ratios import Row, at_most, figure_of
from bench.servers import HIT, PREFIX, Bench, agent_command, write_config
from blobcache_agent.settings import Permissions
from blobcache_agent.standalone import load
from blobcache_agent.translate import translate
from blobcache_storage.cache.budget import on_disk
from blobcache_storage.cache.chunk_map import encode_header, encode_slots, seal_slot, slot_offset
from blobcache_storage.cache.folder import Folder
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.device import BlobVersion, Validator

BLOBS = 10_000
START_BYTES = 100 * GIB
MEMORY_BYTES = 1024 * GIB
CHUNK_BYTES = 64 * 1024
START_GOAL_SECONDS = 2.0
MEMORY_GOAL_MIB = 128.0
INDEX = "v1/index.json"


def measure(bench: Bench) -> list[Row]:
    """Start an agent on 10,000 blobs; then have it serve each of them once."""
    config = write_config(bench.folder, free_port())
    return [*_start_rows(bench, config), _memory_row(bench, config)]


def blob_name(number: int, size: int) -> str:
    """Return a blob's id."""
    return f"many/{number:05d}-{size}"


def build(root: Path, config: Path, total_bytes: int) -> int:
    """Fill a cache root; return the size of each blob."""
    size = total_bytes // BLOBS // CHUNK_BYTES * CHUNK_BYTES
    (wanted,) = load([config], Permissions())
    settings = translate(wanted.resource, wanted.credentials, Permissions(), str(root))
    opened = CacheRoot.open(str(root), StorageRuntime())
    folder = opened.adopt(settings)
    zeros_crc = crc32c(bytes(CHUNK_BYTES))
    for number in range(BLOBS):
        _add_blob(folder, blob_name(number, size), size, zeros_crc)
    opened.save_index()()
    opened.close()
    return size


def _add_blob(folder: Folder, blob_id: str, size: int, zeros_crc: int) -> None:
    token = f'"{blob_id}"'
    version = BlobVersion(size, Validator.ETAG, token, token, None)
    entry = folder.new_entry(blob_id, version, CHUNK_BYTES, now=time.time())
    header = folder.header_of(entry)
    count = header.chunk_count
    slots = array("Q", (seal_slot(entry.generation, at, zeros_crc) for at in range(count)))
    directory = folder.made_directory()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    map_fd = os.open(f"{entry.stem}.map", flags, 0o600, dir_fd=directory)
    os.pwrite(map_fd, encode_header(header), 0)
    os.pwrite(map_fd, encode_slots(slots), slot_offset(0))
    os.close(map_fd)
    data_fd = os.open(f"{entry.stem}.data", flags, 0o600, dir_fd=directory)
    os.ftruncate(data_fd, size)
    os.close(data_fd)
    entry.bytes = on_disk(header.map_size_bytes)
    entry.complete = True
    folder.entries[blob_id] = entry


def _start_rows(bench: Bench, config: Path) -> list[Row]:
    root, empty = bench.folder / "many-start", bench.folder / "many-empty"
    size = build(root, config, START_BYTES)
    path = PREFIX + blob_name(BLOBS // 2, size)
    indexed, plain, bare = [], [], []
    for _ in range(bench.rounds):
        bare.append(_start(bench, config, empty, None)[0])
        indexed.append(_start(bench, config, root, path)[0])
        index = root / INDEX
        kept = index.read_bytes()
        index.unlink()
        plain.append(_start(bench, config, root, path)[0])
        # The killed agent wrote none; the next round begins as this one did.
        index.write_bytes(kept)
    base = figure_of(bare).value
    return [
        Row(
            "start",
            "start with 10,000 blobs, 100 GiB cached, to the first hit",
            figure_of(indexed),
            "s",
            at_most(START_GOAL_SECONDS),
            f"with nothing cached {base:.2f} s to listening",
            {"empty": base},
        ),
        Row(
            "start-unindexed",
            "the same without the index (lost in a crash)",
            figure_of(plain),
            "s",
            at_most(START_GOAL_SECONDS),
        ),
    ]


def _start(bench: Bench, config: Path, root: Path, path: str | None) -> tuple[float, float]:
    """Start an agent and kill it; return seconds to ready and its memory then."""
    port = free_port()
    begun = time.monotonic()
    with running("agent-start", agent_command(config, root, port), bench.folder) as process:
        process.wait_listening(port)
        if path is not None:
            _require_hit(port, path)
        seconds = time.monotonic() - begun
        memory = process.memory_mib()
        process.hang_up()
    return seconds, memory


def _require_hit(port: int, path: str) -> None:
    with Reader(port) as reader:
        answer = reader.get(path, (0, 4096))
    if answer.cache_status != HIT:
        raise AssertionError(f"the cache that was made is not believed: {answer.cache_status}")


def _memory_row(bench: Bench, config: Path) -> Row:
    root = bench.folder / "many-memory"
    size = build(root, config, MEMORY_BYTES)
    port = free_port()
    with running("agent-memory", agent_command(config, root, port), bench.folder) as process:
        process.wait_listening(port)
        started = process.memory_mib()
        seconds = _serve_all(process, port, size)
        memory, peak = process.memory_mib(), process.memory_mib("VmHWM")
    return Row(
        "memory",
        "RSS with 10,000 blobs of 1 TiB together, after a read of each",
        figure_of([memory]),
        "MiB",
        at_most(MEMORY_GOAL_MIB),
        f"{started:.0f} MiB after the start, peak {peak:.0f} MiB;"
        f" opening, verifying and serving one takes {seconds / BLOBS * 1000:.2f} ms",
        {"started_mib": started, "peak_mib": peak, "blobs": BLOBS},
    )


def _serve_all(process: Process, port: int, size: int) -> float:
    """Read a little of every blob, and much of one; return seconds."""
    begun = time.monotonic()
    with Reader(port) as reader:
        for number in range(BLOBS):
            reader.get(PREFIX + blob_name(number, size), (CHUNK_BYTES, CHUNK_BYTES + 4096))
        seconds = time.monotonic() - begun
        reader.get(PREFIX + blob_name(0, size), (0, 64 * MIB))
    process.require_alive()
    return seconds
