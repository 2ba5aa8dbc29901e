"""The command line: flags and `BLOBCACHE_AGENT_*` variables to settings, then the daemon.

Exit codes: 0 after a graceful stop; 1 the agent cannot run here; 2 a flag, a variable or a file
must be changed (the message names it); 128 + n after a second signal n.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from blobcache_agent import __version__, parameters
from blobcache_agent.errors import StartError, UsageError
from blobcache_agent.logs import LEVELS, configure_logging
from blobcache_agent.mirror.bindings import Bindings
from blobcache_agent.mirror.hosts_command import containerd_hosts
from blobcache_agent.settings import (
    ANY_NAMESPACE,
    ListenAddress,
    MinFree,
    Network,
    Permissions,
    ServeSettings,
    StandaloneSettings,
)

ENV_PREFIX = "BLOBCACHE_AGENT_"
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

SERVE_EPILOG = """\
\b
Ports   7080  readers: GET /v1/blobs/{namespace}/{name}/{blob-id}; containerd: /v2/
        7081  /healthz /readyz /metrics
        7443  the operator, mutual TLS: /v1/state /v1/report /v1/evictions

Each flag has a variable, for containers; a flag given several times takes values separated by
spaces there. SIGTERM stops: no new readers, reads under way finish (at most 25 s), what was
cached is synced. A restart keeps the cache, and hits are served before the operator is back.
"""

STANDALONE_EPILOG = """\
\b
Example:
  blobcache-agent standalone --cache-root /var/cache/blobs examples/standalone/http.yaml
  curl -i http://127.0.0.1:7080/v1/blobs/default/models/llm/shard-0    # Cache-Status: blobcache; …

FILEs hold BlobCacheConfig and Secret objects, as many as you like, separated by `---`. SIGHUP
reads them again; if anything in them is wrong the agent goes on as before and logs what.
Anyone who can reach --listen may read everything that is configured: keep it on loopback, or
put something that checks readers in front.
"""


def _option(flag: str, *names: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    """Return a click option with its variable, shown in the help."""
    variable = ENV_PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(
        flag, *names, envvar=variable, show_envvar=True, show_default=True, **attributes
    )


def _logging() -> list[Callable[[Any], Any]]:
    """Return the options about the log."""
    return [
        _option(
            "--log-level",
            default="info",
            type=click.Choice(LEVELS),
            help="Least level written; debug adds a line for each hit.",
        ),
        _option(
            "--log-format",
            default="auto",
            type=click.Choice(("auto", "json", "console")),
            help="auto is JSON unless stderr is a terminal.",
        ),
    ]


def _common(listen_default: str) -> Callable[[_Decorated], _Decorated]:
    """Return a decorator with the flags that both commands take."""
    options = [
        _option(
            "--cache-root",
            required=True,
            type=click.Path(path_type=Path, file_okay=False),
            help="Directory for cached bytes, on a local disk; made with mode 0700 if absent.",
        ),
        _option(
            "--listen",
            default=listen_default,
            metavar="HOST:PORT",
            type=parameters.listen_address,
            help="Where readers connect; port 0 takes a free one, which the log names.",
        ),
        _option(
            "--capacity",
            default=None,
            metavar="BYTES",
            type=parameters.byte_size,
            help="Most bytes cached on this node, such as 200Gi. Default: down to --min-free.",
        ),
        _option(
            "--min-free",
            default=None,
            metavar="BYTES|N%",
            type=parameters.min_free,
            help="Space of the file system that stays free. Default: the larger of 20% and 1Gi.",
        ),
        _option(
            "--connections-max",
            default=4096,
            metavar="N",
            type=click.IntRange(1, 65_536),
            help="Readers connected at a time; one more gets 503.",
        ),
        _option(
            "--allow-ambient-credentials",
            multiple=True,
            metavar="NAMESPACE",
            type=parameters.namespace,
            help="S3 configurations of this namespace that name no Secret sign with this "
            "machine's own credentials (environment, files, instance metadata). '*' for all.",
        ),
        _option(
            "--containerd-mirror",
            "mirrored",
            multiple=True,
            metavar="HOST[@REGISTRY]=NAMESPACE/NAME",
            type=parameters.mirror_binding,
            callback=parameters.mirror_bindings,
            help="Answer containerd's pulls from registry HOST at /v2/ by this configuration, "
            "which must name HOST as its registry, or REGISTRY where HOST's images are there.",
        ),
        *_logging(),
    ]

    def decorate(command: _Decorated) -> _Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="blobcache-agent")
def cli() -> None:
    """Cache immutable blobs on this machine's disk, verified, and serve them over HTTP.

    `serve` is one node of a Kubernetes cluster, told by the operator what to cache;
    `standalone` is the same engine on one machine, told by YAML files.
    """


@cli.command(epilog=SERVE_EPILOG)
@_common(":7080")
@_option(
    "--health-listen",
    default=":7081",
    metavar="HOST:PORT",
    type=parameters.listen_address,
    help="Where kubelet and Prometheus ask.",
)
@_option(
    "--control-listen",
    default=":7443",
    metavar="HOST:PORT",
    type=parameters.listen_address,
    help="Where the operator connects, by mutual TLS.",
)
@_option(
    "--tls-dir",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory with ca.crt, tls.crt and tls.key; read again when they change.",
)
@_option(
    "--node-name",
    required=True,
    metavar="NODE",
    type=parameters.node_name,
    help="Name of this machine's Node object.",
)
@_option(
    "--pod-uid",
    default="",
    metavar="UID",
    help="uid of the agent's pod, by which the operator tells a successor from a ghost.",
)
@_option(
    "--allow-origin-cidr",
    multiple=True,
    metavar="CIDR",
    type=parameters.network,
    help="Private or loopback network where origins may be. Others of that kind are refused.",
)
@_option(
    "--allow-localfs",
    multiple=True,
    metavar="NAMESPACE=DIR",
    type=parameters.namespace_directory,
    help="LocalFS configurations of this namespace may read below DIR. '*' for all.",
)
@_option(
    "--allow-insecure-tls",
    multiple=True,
    metavar="NAMESPACE",
    type=parameters.namespace,
    help="Configurations of this namespace may set insecureSkipVerify. '*' for all.",
)
def serve(
    *,
    cache_root: Path,
    listen: ListenAddress,
    health_listen: ListenAddress,
    control_listen: ListenAddress,
    tls_dir: Path,
    node_name: str,
    pod_uid: str,
    capacity: int | None,
    min_free: MinFree | None,
    connections_max: int,
    allow_origin_cidr: tuple[Network, ...],
    allow_localfs: tuple[tuple[str, str], ...],
    allow_ambient_credentials: tuple[str, ...],
    allow_insecure_tls: tuple[str, ...],
    mirrored: Bindings,
    log_level: str,
    log_format: Literal["auto", "json", "console"],
) -> None:
    """Run as one node of a cluster; the operator says what to cache."""
    from blobcache_agent.daemon import run_serve

    settings = ServeSettings(
        cache_root=cache_root,
        listen=listen,
        health_listen=health_listen,
        control_listen=control_listen,
        tls_dir=tls_dir,
        node_name=node_name,
        pod_uid=pod_uid,
        capacity_bytes=capacity,
        min_free=min_free or MinFree(),
        connections_max=connections_max,
        allowed_origin_networks=allow_origin_cidr,
        mirrored=mirrored,
        permissions=Permissions(
            localfs_roots=_group(allow_localfs),
            ambient_namespaces=frozenset(allow_ambient_credentials),
            insecure_tls_namespaces=frozenset(allow_insecure_tls),
        ),
    )
    configure_logging(log_level, log_format)
    _run(lambda: run_serve(settings))


@cli.command(epilog=STANDALONE_EPILOG)
@_common("127.0.0.1:7080")
@_option(
    "--health-listen",
    default=None,
    metavar="HOST:PORT",
    type=parameters.listen_address,
    help="Where /healthz, /readyz and /metrics are served. Default: nowhere.",
)
@_option(
    "--allow-localfs",
    multiple=True,
    metavar="DIR",
    type=parameters.directory,
    help="LocalFS configurations may read below DIR.",
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path, dir_okay=False),
)
def standalone(
    *,
    cache_root: Path,
    listen: ListenAddress,
    health_listen: ListenAddress | None,
    capacity: int | None,
    min_free: MinFree | None,
    connections_max: int,
    allow_localfs: tuple[str, ...],
    allow_ambient_credentials: tuple[str, ...],
    files: tuple[Path, ...],
    mirrored: Bindings,
    log_level: str,
    log_format: Literal["auto", "json", "console"],
) -> None:
    """Run on one machine, without a cluster, from YAML files."""
    from blobcache_agent.daemon import run_standalone

    settings = StandaloneSettings(
        cache_root=cache_root,
        listen=listen,
        health_listen=health_listen,
        capacity_bytes=capacity,
        min_free=min_free or MinFree(),
        connections_max=connections_max,
        permissions=Permissions(
            localfs_roots={ANY_NAMESPACE: allow_localfs},
            ambient_namespaces=frozenset(allow_ambient_credentials),
            # Who runs it is the administrator.
            insecure_tls_namespaces=frozenset({ANY_NAMESPACE}),
        ),
        files=files,
        mirrored=mirrored,
    )
    configure_logging(log_level, log_format)
    _run(lambda: run_standalone(settings))


cli.add_command(containerd_hosts)


@cli.command(name="remove-cache")
@_option(
    "--cache-root",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The directory; what is in it and was not made by an agent stays, and then so does it.",
)
@_option(
    "--wait-seconds",
    default=120.0,
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=3600),
    help="How long to wait for an agent that still uses it.",
)
def remove_cache(*, cache_root: Path, wait_seconds: float) -> None:
    """Remove the cached bytes of this machine, after the last agent has ended."""
    from blobcache_agent import removal

    def remove() -> None:
        done = removal.remove_cache(cache_root, wait_seconds=wait_seconds)
        if done.foreign:
            names = ", ".join(done.foreign)
            click.echo(f"'{cache_root}' was kept: no agent made these in it: {names}", err=True)
        elif not done.was_there:
            click.echo(f"'{cache_root}' is not there")
        else:
            click.echo(
                f"'{cache_root}' is {'gone' if done.is_gone else 'empty, a disk is mounted'}"
            )

    _run(remove)


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    grouped: dict[str, tuple[str, ...]] = {}
    for namespace, directory in pairs:
        grouped[namespace] = (*grouped.get(namespace, ()), directory)
    return grouped


def _run(body: Callable[[], None]) -> None:
    """Run the daemon; what stops it is printed for a person, not as a traceback."""
    try:
        body()
    except (UsageError, StartError) as error:
        for line in str(error).splitlines():
            click.echo(f"Error: {line}", err=True)
        sys.exit(error.exit_code)


def main() -> None:
    """Console script."""
    cli(prog_name="blobcache-agent")
