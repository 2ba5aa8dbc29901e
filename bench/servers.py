"""The servers that take turns: agent, nginx, Varnish, and the origin behind them."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.client import Reader
from bench.process import GIB, MIB, BenchError, Process, free_port, running, temporary_folder

DATA_BYTES = GIB
DATA_NAME = "data.bin"
HIT = "blobcache; hit"
WARM_SECONDS_MAX = 60.0
PREFIX = "/v1/blobs/default/bench/"
"""Where the agent serves a blob of the only configuration."""

_NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log warn;
{user}
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    open_file_cache max=1000 inactive=600s;
    open_file_cache_valid 600s;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port} backlog=1024; root {folder}; }}
}}
"""

_VARNISH = """
vcl 4.1;
backend origin {{ .host = "127.0.0.1"; .port = "{origin_port}"; }}
sub vcl_backend_response {{ set beresp.ttl = 1d; }}
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a run share."""

    folder: Path
    """For everything that is written; removed at the end."""
    rounds: int
    seconds: int
    """Of one load with wrk."""

    @property
    def data(self) -> Path:
        """One file of random bytes, which all blobs begin with."""
        return self.folder / DATA_NAME

    def make_data(self) -> None:
        """Write the data file."""
        with self.data.open("wb") as output:
            for _ in range(DATA_BYTES // (16 * MIB)):
                output.write(os.urandom(16 * MIB))
            output.flush()
            os.fsync(output.fileno())
        self.data.chmod(0o644)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    process: Process
    port: int

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"


class OriginServer:
    """An origin that runs; see `bench.origin`."""

    def __init__(self, server: Server) -> None:
        self.port = server.port
        self.process = server.process

    def counters(self) -> tuple[int, int]:
        """Return requests and bytes so far."""
        with Reader(self.port) as reader:
            requests, sent = reader.get("/counters", keep_body=True).body.split()
        return int(requests), int(sent)


@contextlib.contextmanager
def origin(
    bench: Bench, *, latency_seconds: float = 0.0, bytes_per_second: float = 0.0
) -> Iterator[OriginServer]:
    """Run an origin for the time of a block."""
    port = free_port()
    options = [str(bench.data), str(port), str(latency_seconds), str(bytes_per_second)]
    command = [sys.executable, str(Path(__file__).with_name("origin.py")), *options]
    with running(f"origin-{port}", command, bench.folder) as process:
        process.wait_listening(port)
        yield OriginServer(Server(process, port))


def write_config(folder: Path, origin_port: int) -> Path:
    """Write the agent's configuration; JSON is YAML."""
    path = folder / f"config-{origin_port}.yaml"
    spec = {
        "backend": {
            "type": "HTTPProxy",
            "httpProxy": {"address": f"http://127.0.0.1:{origin_port}"},
        },
        "cache": {"type": "FileCache", "capacity": "4Ti"},
    }
    document = {
        "apiVersion": "blobcache.dev/v1alpha1",
        "kind": "BlobCacheConfig",
        "metadata": {"name": "bench"},
        "spec": spec,
    }
    path.write_text(json.dumps(document))
    return path


def agent_command(config: Path, root: Path, port: int) -> list[str]:
    """Return how the agent of this checkout is started."""
    program = Path(sys.executable).with_name("blobcache-agent")
    if not program.exists():
        raise BenchError(f"{program} is missing: run `make bench`, which installs it")
    return [
        *(str(program), "standalone", "--cache-root", str(root), "--min-free", "1Gi"),
        *("--listen", f"127.0.0.1:{port}", "--log-level", "warning", str(config)),
    ]


@contextlib.contextmanager
def agent(bench: Bench, origin_port: int, root: Path | None = None) -> Iterator[Server]:
    """Run an agent for the time of a block, with a cache of its own unless a root is given."""
    with contextlib.ExitStack() as stack:
        if root is None:
            root = stack.enter_context(temporary_folder(bench.folder)) / "root"
        port = free_port()
        command = agent_command(write_config(bench.folder, origin_port), root, port)
        process = stack.enter_context(running(f"agent-{port}", command, bench.folder))
        process.wait_listening(port)
        yield Server(process, port)


def warm(server: Server, path: str) -> None:
    """Read a blob until it is a hit from end to end, and what was cached is synced."""
    deadline = time.monotonic() + WARM_SECONDS_MAX
    with Reader(server.port) as reader:
        while reader.get(path).cache_status != HIT:
            if time.monotonic() > deadline:
                raise BenchError(f"{path} did not become a hit in {WARM_SECONDS_MAX:g} s")
        # Until its sync a chunk is served from checked memory: not the state to be measured.
        time.sleep(3.0)
        reader.get(path)


@contextlib.contextmanager
def nginx(bench: Bench) -> Iterator[Server]:
    """Run nginx with one worker and sendfile, serving the data file."""
    require("nginx")
    port = free_port()
    config = bench.folder / "nginx.conf"
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(folder=bench.folder, port=port, user=user))
    command = ["nginx", "-p", str(bench.folder), "-c", str(config)]
    with running("nginx", command, bench.folder) as process:
        process.wait_listening(port)
        yield Server(process, port)


@contextlib.contextmanager
def varnish(bench: Bench, origin_port: int) -> Iterator[Server]:
    """Run Varnish with file storage, if it is there."""
    port = free_port()
    config = bench.folder / "varnish.vcl"
    config.write_text(_VARNISH.format(origin_port=origin_port))
    storage = f"file,{bench.folder}/varnish.bin,1G"
    command = [
        *("varnishd", "-F", "-a", f"127.0.0.1:{port}", "-f", str(config), "-s", storage),
        *("-n", str(bench.folder / "varnish"), "-j", "none"),
    ]
    with running("varnish", command, bench.folder) as process:
        process.wait_listening(port)
        yield Server(process, port)


def require(program: str) -> str:
    """Return where a program is.

    Raises:
        BenchError: It is not installed; the message says how it is.
    """
    found = shutil.which(program)
    if found is None:
        raise BenchError(f"{program} is not installed: apt install nginx-light wrk (and varnish)")
    return found
