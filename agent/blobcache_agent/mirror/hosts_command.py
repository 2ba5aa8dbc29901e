"""`blobcache-agent containerd-hosts`: the node's containerd is told of the mirror, and untold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from blobcache_agent.mirror.bindings import parse_host
from blobcache_agent.mirror.hosts_files import HostsFiles, Outcome
from blobcache_agent.mirror.hosts_toml import (
    DIAL_TIMEOUT_DEFAULT,
    Entry,
    parse_dial_timeout,
    parse_url,
)


def _url(value: str) -> str:
    try:
        return parse_url(value)
    except ValueError as error:
        raise click.BadParameter(f"'{value}' {error}") from error


def _dial_timeout(value: str) -> str:
    try:
        return parse_dial_timeout(value)
    except ValueError as error:
        raise click.BadParameter(f"'{value}' {error}") from error


def _host(value: str) -> tuple[str, str]:
    host, equals, server = value.partition("=")
    try:
        return parse_host(host), parse_url(server) if equals else ""
    except ValueError as error:
        raise click.BadParameter(f"'{value}' {error}") from error


_certs_dir = click.option(
    "--certs-dir",
    required=True,
    envvar="BLOBCACHE_AGENT_CERTS_DIR",
    show_envvar=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="containerd's `config_path`, usually /etc/containerd/certs.d; its parent must exist.",
)


@click.group("containerd-hosts")
def containerd_hosts() -> None:
    """Have this node's containerd pull through the agent, or as before.

    containerd reads these files at each pull; it needs no restart, but `config_path` must name
    the directory. Exit codes: 0 done, also where a host was left alone because somebody else
    changed its file (a line on stderr says so); 1 the directory cannot be written.
    """


@containerd_hosts.command()
@_certs_dir
@click.option(
    "--mirror",
    required=True,
    metavar="URL",
    envvar="BLOBCACHE_AGENT_MIRROR",
    show_envvar=True,
    type=_url,
    help="The agent's data port as the node sees it, such as http://127.0.0.1:7080.",
)
@click.option(
    "--host",
    "hosts",
    required=True,
    multiple=True,
    metavar="HOST[=SERVER]",
    envvar="BLOBCACHE_AGENT_HOST",
    show_envvar=True,
    type=_host,
    help="A registry as image references name it; SERVER is its URL where containerd, or the "
    "file that is there, does not know it. Hosts not named any more are restored.",
)
@click.option(
    "--dial-timeout",
    default=DIAL_TIMEOUT_DEFAULT,
    metavar="DURATION",
    envvar="BLOBCACHE_AGENT_DIAL_TIMEOUT",
    show_envvar=True,
    show_default=True,
    type=_dial_timeout,
    help="For how long containerd tries to reach the agent before it goes upstream; at most 1s.",
)
def write(
    certs_dir: Path, mirror: str, hosts: tuple[tuple[str, str], ...], dial_timeout: str
) -> None:
    """Write our entry first into each HOST's hosts.toml; keep what was there."""
    entries = [(host, Entry(mirror, dial_timeout, server)) for host, server in hosts]
    try:
        outcomes = HostsFiles(certs_dir.absolute()).write(entries)
    except OSError as error:
        _fail(certs_dir, error)
    _tell(outcomes)


@containerd_hosts.command()
@_certs_dir
def restore(certs_dir: Path) -> None:
    """Put back exactly what was there before `write`."""
    try:
        outcomes = HostsFiles(certs_dir.absolute()).restore()
    except OSError as error:
        _fail(certs_dir, error)
    _tell(outcomes)


def _tell(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        click.echo(f"{outcome.host}: {outcome.message}", err=outcome.is_left_alone)


def _fail(certs_dir: Path, error: OSError) -> NoReturn:
    click.echo(f"Error: --certs-dir {certs_dir}: {error}", err=True)
    sys.exit(1)
