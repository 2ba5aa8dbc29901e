"""Readers of command-line values: each refuses with what must change, never with a traceback.

Plain functions, for `type=` of click options; click adds the name of the flag and its variable.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import click

from blobcache_agent.mirror.bindings import Binding, Bindings, parse_binding
from blobcache_agent.settings import ANY_NAMESPACE, ListenAddress, MinFree, Network
from blobcache_api.quantity import parse_quantity

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PERCENT = re.compile(r"([0-9]{1,3})%")
_PORT = re.compile(r"[0-9]{1,5}")
PORT_MAX = 65_535
MIN_FREE_PERCENT_MAX = 95


def listen_address(value: str) -> ListenAddress:
    """Read `host:port`, `:port` or `[v6]:port`."""
    host, separator, port = value.rpartition(":")
    if not separator or not _PORT.fullmatch(port) or int(port) > PORT_MAX:
        raise click.BadParameter(f"'{value}' must be HOST:PORT or :PORT, port 0 to {PORT_MAX}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise click.BadParameter(f"'{value}' must have brackets around IPv6: [::1]:7080")
    return ListenAddress(host, int(port))


def byte_size(value: str) -> int:
    """Read a Kubernetes quantity of at least one byte."""
    try:
        size = parse_quantity(value)
    except ValueError as error:
        raise click.BadParameter(
            f"'{value}' must be a quantity of bytes such as 100Gi: {error}"
        ) from error
    if size < 1:
        raise click.BadParameter(f"'{value}' must be at least 1 byte")
    return size


def min_free(value: str) -> MinFree:
    """Read a quantity of bytes, or a percentage of the file system."""
    if match := _PERCENT.fullmatch(value):
        percent = int(match[1])
        if percent > MIN_FREE_PERCENT_MAX:
            raise click.BadParameter(f"'{value}' must be at most {MIN_FREE_PERCENT_MAX}%")
        return MinFree(percent=percent, bytes=0)
    try:
        return MinFree(percent=0, bytes=parse_quantity(value))
    except ValueError as error:
        raise click.BadParameter(
            f"'{value}' must be bytes such as 10Gi or a percentage such as 20%: {error}"
        ) from error


def network(value: str) -> Network:
    """Read an IP network."""
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise click.BadParameter(
            f"'{value}' must be a network such as 10.20.0.0/16: {error}"
        ) from error


def namespace(value: str) -> str:
    """Read a Kubernetes namespace, or `*`."""
    if value != ANY_NAMESPACE and not _NAMESPACE.fullmatch(value):
        raise click.BadParameter(f"'{value}' must be a Kubernetes namespace, or '*' for all")
    return value


def directory(value: str) -> str:
    """Read an absolute directory without dot segments."""
    if not value.startswith("/") or {".", ".."} & set(value.split("/")) or "\0" in value:
        raise click.BadParameter(f"'{value}' must be an absolute directory without '.' or '..'")
    return str(Path(value))


def namespace_directory(value: str) -> tuple[str, str]:
    """Read `NAMESPACE=DIR`."""
    left, separator, right = value.partition("=")
    if not separator:
        raise click.BadParameter(f"'{value}' must be NAMESPACE=DIR")
    return namespace(left), directory(right)


def mirror_binding(value: str) -> Binding:
    """Read `HOST[@REGISTRY]=NAMESPACE/NAME`."""
    try:
        return parse_binding(value)
    except ValueError as error:
        raise click.BadParameter(f"'{value}' {error}") from error


def mirror_bindings(
    context: click.Context, parameter: click.Parameter, given: tuple[Binding, ...]
) -> Bindings:
    """Join all of them."""
    try:
        return Bindings(given)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def node_name(value: str) -> str:
    """Read the name of a Kubernetes node."""
    if not _NODE_NAME.fullmatch(value):
        raise click.BadParameter(f"'{value}' must be the name of a Kubernetes node")
    return value
