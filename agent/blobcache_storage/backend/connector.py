"""The one way to an origin: resolve, check, and dial the very address that was checked.

Blobs, tokens and redirects all go through `open_connector`, so that a name which resolves to
another address a moment later (DNS rebinding), a redirect, or an address written as a host meet
the same rule. The rule is asked twice: for each resolved address, which drops the refused ones,
and again for the address a socket is made for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from typing_extensions import override

from blobcache_storage.errors import ConfigError, OriginRefused

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

ALLOW_REMEDY: Final = "chart value `agent.allowOriginCIDRs`, flag --allow-origin-cidr"

RESOLVER_THREADS: Final = 2
"""Per backend, so that names which hang hold up nobody else's."""
DNS_CACHE_SECONDS: Final = 10
KEEPALIVE_SECONDS: Final = 30.0
ADDRESSES_PER_NAME_MAX: Final = 32

METADATA_NETWORKS: Final[tuple[IPNetwork, ...]] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",  # link-local; AWS, Azure, GCP, OpenStack, ECS task roles
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure's wire server
        "192.0.0.192/32",  # Oracle Cloud
        "fd00:ec2::254/128",  # AWS over IPv6
    )
)

# Networks whose addresses carry an IPv4 address that a translator or tunnel would reach.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


def _forms(address: IPAddress) -> tuple[IPAddress, ...]:
    """Return an address and the IPv4 addresses hidden in it (mapped, 6to4, NAT64, Teredo)."""
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    hidden = [address.sixtofour, *(address.teredo or ())]
    low = int(address) & 0xFFFFFFFF
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and low > 1):
        hidden.append(ipaddress.IPv4Address(low))
    return (address, *(found for found in hidden if found is not None))


def _networks(texts: Iterable[str], what: str) -> tuple[IPNetwork, ...]:
    networks = []
    for text in texts:
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            raise ConfigError(f"{what} must be an IP address or CIDR, not '{text}'") from None
    return tuple(networks)


def _contains(networks: Iterable[IPNetwork], address: IPAddress) -> bool:
    return any(address.version == net.version and address in net for net in networks)


def _kind(address: IPAddress) -> str:
    """Return what an address is besides public: "" if it is public."""
    kinds = (
        ("unspecified", address.is_unspecified),
        ("loopback", address.is_loopback),
        ("link-local", address.is_link_local),
        ("multicast", address.is_multicast),
        ("private", not address.is_global or getattr(address, "is_site_local", False)),
    )
    return next((kind for kind, is_so in kinds if is_so), "")


class AddressPolicy:
    """Which addresses an origin may have. Safe to change while in use, from the loop's thread.

    Args:
        in_cluster: Private, loopback, link-local, unspecified and multicast addresses need
            `allow_cidrs`. Outside a cluster loopback and private ones are free, as the
            administrator is who runs the process; the rest still needs `allow_cidrs`.
        allow_cidrs: Addresses permitted by the administrator.
        denied: The cluster's nodes and API server: never permitted, whatever `allow_cidrs` says.

    Raises:
        ConfigError: A CIDR cannot be read.
    """

    def __init__(
        self, *, in_cluster: bool, allow_cidrs: Iterable[str] = (), denied: Iterable[str] = ()
    ) -> None:
        self.in_cluster = in_cluster
        self._allowed = _networks(allow_cidrs, "--allow-origin-cidr")
        self._denied = _networks(denied, "a denied address")

    def replace_denied(self, denied: Iterable[str]) -> None:
        """Set the addresses that are never permitted (nodes, API server)."""
        self._denied = _networks(denied, "a denied address")

    def refusal(self, address: str) -> str | None:
        """Return why an address may not be dialled, or None if it may."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return "it is not an IP address"
        forms = _forms(parsed)
        if any(_contains(self._denied, form) for form in forms):
            return f"it is the cluster's own (a node, the API server); no {ALLOW_REMEDY} permits it"
        if self.in_cluster and any(_contains(METADATA_NETWORKS, form) for form in forms):
            return f"it is a cloud's metadata service; no {ALLOW_REMEDY} permits it"
        if any(_contains(self._allowed, form) for form in forms):
            return None
        if any(_contains(METADATA_NETWORKS, form) for form in forms):
            return f"it is a cloud's metadata service; the {ALLOW_REMEDY} may permit it"
        for form in forms:
            kind = _kind(form)
            if kind and (self.in_cluster or kind not in ("loopback", "private")):
                return f"it is {kind}; the {ALLOW_REMEDY} may permit it"
        return None

    def check(self, address: str, host: str) -> None:
        """Check the address of a host.

        Raises:
            OriginRefused: It may not be dialled; the message says what may be done.
        """
        why = self.refusal(address)
        if why is not None:
            raise OriginRefused(f"the address {address} of origin '{host}' is refused: {why}")


class RefusedAddressError(OSError):
    """A socket was asked for an address that the policy refuses.

    An OSError because that is what connection racing knows how to carry; the HTTP road turns it
    into OriginRefused.
    """


class CheckedResolver(AbstractResolver):
    """Resolves names through the system and drops refused addresses.

    Args:
        timeout_seconds: For one look-up; the thread that hangs stays within the resolver's own.
    """

    def __init__(self, policy: AddressPolicy, timeout_seconds: float) -> None:
        self._policy = policy
        self.timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="origin-dns")

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.timeout_seconds):
            infos = await loop.run_in_executor(self._threads, _look_up, host, port, family)
        permitted, refusals = [], []
        for found_family, proto, sockaddr in infos:
            address = _address_text(sockaddr)
            why = self._policy.refusal(address)
            if why is not None:
                refusals.append((address, why))
                continue
            permitted.append(
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=port,
                    family=found_family,
                    proto=proto,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not permitted and refusals:
            address, why = refusals[0]
            raise OriginRefused(f"the address {address} of origin '{host}' is refused: {why}")
        return permitted

    @override
    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(
    host: str, port: int, family: socket.AddressFamily
) -> list[tuple[socket.AddressFamily, int, tuple[object, ...]]]:
    """Return family, protocol and socket address of each address of a name; blocks."""
    infos = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    return [(info[0], info[2], info[4]) for info in infos[:ADDRESSES_PER_NAME_MAX]]


def _address_text(sockaddr: tuple[object, ...]) -> str:
    """Return the address of a socket address, with the zone of a link-local IPv6 one."""
    host = str(sockaddr[0])
    zone = sockaddr[3] if len(sockaddr) > 3 else 0
    return f"{host}%{zone}" if zone and "%" not in host else host


class CheckedConnector(aiohttp.TCPConnector):
    """Checks a connection once more as it is handed out: a kept one may be older than a denial."""

    policy: AddressPolicy

    @override
    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        transport = connection.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not peer:
            return connection
        why = self.policy.refusal(str(peer[0]))
        if why is not None:
            connection.close()
            raise OriginRefused(
                f"the address {peer[0]} of origin '{req.url.host}' is refused: {why}"
            )
        return connection


def open_connector(
    policy: AddressPolicy, resolver: CheckedResolver, tls: ssl.SSLContext
) -> CheckedConnector:
    """Return a connector that dials permitted addresses only; needs a running loop.

    It bounds nothing by itself: how many connections an origin gets is `manners`' business, which
    knows whom to serve first.
    """

    def make_socket(info: tuple[object, ...]) -> socket.socket:
        family, kind, proto, _, sockaddr = info
        assert isinstance(sockaddr, tuple)
        address = str(sockaddr[0])
        why = policy.refusal(address)
        if why is not None:
            raise RefusedAddressError(f"the address {address} is refused: {why}")
        assert isinstance(family, int)
        assert isinstance(kind, int)
        assert isinstance(proto, int)
        return socket.socket(family, kind, proto)

    connector = CheckedConnector(
        resolver=resolver,
        socket_factory=make_socket,
        ssl=tls,
        limit=0,
        ttl_dns_cache=DNS_CACHE_SECONDS,
        keepalive_timeout=KEEPALIVE_SECONDS,
    )
    connector.policy = policy
    return connector
