"""Which addresses an origin may have, and that no way leads around the rule."""

from __future__ import annotations

import socket

import pytest
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import ConfigError, OriginRefused
from blobcache_storage.testing.fault_origin import FaultOrigin

METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::ffff:100.100.100.200",
]
NODE = "10.9.8.7"
LOCAL = {
    "loopback": ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"],
    "private": ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1", "fec0::1"],
    "link-local": ["fe80::1", "fe80::1%2"],
    "unspecified": ["0.0.0.0", "::", "::ffff:0.0.0.0"],
    "multicast": ["224.0.0.1", "ff02::1"],
}
PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]


def local(*kinds: str) -> list[str]:
    """Return addresses of these kinds."""
    return [address for kind in kinds for address in LOCAL[kind]]


@pytest.mark.parametrize("address", METADATA)
def test_metadata_is_refused_in_a_cluster_whatever_is_allowed(address: str) -> None:
    """No CIDR of the administrator opens a cloud's metadata service."""
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["0.0.0.0/0", "::/0"])
    with pytest.raises(OriginRefused, match=r"agent\.allowOriginCIDRs.*--allow-origin-cidr"):
        policy.check(address, "origin.test")


@pytest.mark.parametrize("address", METADATA)
def test_metadata_needs_permission_outside_a_cluster(address: str) -> None:
    """A single machine's cache does not walk into metadata by a redirect either."""
    assert AddressPolicy(in_cluster=False).refusal(address) is not None
    assert AddressPolicy(in_cluster=False, allow_cidrs=["::/0", "0.0.0.0/0"]).refusal(address) is (
        None
    )


@pytest.mark.parametrize("address", [NODE, f"::ffff:{NODE}", "2001:db8::7"])
def test_the_clusters_own_are_refused_whatever_is_allowed(address: str) -> None:
    """Nodes and the API server stay out of reach, and the list can change."""
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["0.0.0.0/0", "::/0"])
    assert policy.refusal(address) is None
    policy.replace_denied([NODE, "2001:db8::7"])
    assert policy.refusal(address) is not None
    policy.replace_denied([])
    assert policy.refusal(address) is None


@pytest.mark.parametrize("address", local(*LOCAL))
def test_local_addresses_need_permission_in_a_cluster(address: str) -> None:
    """Loopback, private, link-local, unspecified, multicast: only where permitted."""
    assert AddressPolicy(in_cluster=True).refusal(address) is not None
    everything = AddressPolicy(in_cluster=True, allow_cidrs=["0.0.0.0/0", "::/0"])
    assert everything.refusal(address) is None


@pytest.mark.parametrize("address", local("loopback", "private"))
def test_standalone_reaches_its_own_network(address: str) -> None:
    """Who runs the process is the administrator."""
    assert AddressPolicy(in_cluster=False).refusal(address) is None


@pytest.mark.parametrize("address", local("link-local", "unspecified", "multicast"))
def test_standalone_does_not_reach_the_odd_ones(address: str) -> None:
    """No origin lives there."""
    assert AddressPolicy(in_cluster=False).refusal(address) is not None


@pytest.mark.parametrize("address", PUBLIC)
@pytest.mark.parametrize("in_cluster", [True, False])
def test_public_addresses_are_free(address: str, in_cluster: bool) -> None:
    """The internet needs no permission."""
    assert AddressPolicy(in_cluster=in_cluster).refusal(address) is None


def test_an_allowed_cidr_allows_no_more() -> None:
    """A permission ends at its last address."""
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["10.1.2.0/24"])
    assert policy.refusal("10.1.2.255") is None
    assert policy.refusal("::ffff:10.1.2.1") is None
    assert policy.refusal("10.1.3.0") is not None


def test_what_is_no_address_is_refused() -> None:
    """Nothing unreadable is dialled, and nothing unreadable is configured."""
    assert AddressPolicy(in_cluster=False).refusal("localhost") is not None
    with pytest.raises(ConfigError):
        AddressPolicy(in_cluster=True, allow_cidrs=["10.0.0.0/33"])


CLUSTER = {"policy": AddressPolicy(in_cluster=True)}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "localhost",
        "169.254.169.254",
        "10.0.0.1",
        "0.0.0.0",
    ],
)
async def test_a_refused_host_is_not_dialled(
    host: str, open_proxy: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Literals and names alike are refused before there is a socket."""

    def no_socket(*_: object) -> socket.socket:
        raise AssertionError("a socket was made")

    backend = open_proxy(f"http://{host}:1/x", environment=CLUSTER)
    monkeypatch.setattr("blobcache_storage.backend.connector.socket.socket", no_socket)
    with pytest.raises(OriginRefused):
        await backend.fetch("blob", RangeRequest())


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
async def test_other_spellings_of_loopback_do_not_help(host: str, open_proxy: OpenBackend) -> None:
    """Whatever the system's resolver makes of a number is checked like any address."""
    with pytest.raises(Exception, match=r"refused|not one to connect to|did not resolve"):
        await open_proxy(f"http://{host}:1/x", environment=CLUSTER).fetch("blob", RangeRequest())


async def test_a_name_with_one_good_address_dials_only_that(
    origin: FaultOrigin, open_proxy: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a name's addresses the refused ones are dropped."""
    origin.put("/blob", b"bytes")
    tcp = (socket.AF_INET, socket.IPPROTO_TCP)

    def look_up(host: str, port: int, _: object) -> list[object]:
        return [(*tcp, ("169.254.169.254", port)), (*tcp, ("127.0.0.1", port))]

    monkeypatch.setattr("blobcache_storage.backend.connector._look_up", look_up)
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["127.0.0.1/32"])
    backend = open_proxy(f"http://mixed.test:{origin.port}", environment={"policy": policy})
    assert (await backend.stat("blob")).size_bytes == 5


async def test_the_address_dialled_is_the_one_checked(
    origin: FaultOrigin, open_proxy: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is resolved once a connection: a second answer (rebinding) is never asked for."""
    origin.put("/blob", b"bytes")
    answers = ["127.0.0.1", "169.254.169.254"]

    def look_up(host: str, port: int, _: object) -> list[object]:
        return [(socket.AF_INET, socket.IPPROTO_TCP, (answers.pop(0), port))]

    monkeypatch.setattr("blobcache_storage.backend.connector._look_up", look_up)
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["127.0.0.1/32"])
    backend = open_proxy(f"http://rebinding.test:{origin.port}", environment={"policy": policy})
    assert (await backend.stat("blob")).size_bytes == 5
    assert answers == ["169.254.169.254"]


@pytest.mark.parametrize("to", ["http://169.254.169.254/latest", "http://10.0.0.1/x"])
async def test_redirects_take_the_same_road(
    origin: FaultOrigin, open_proxy: OpenBackend, to: str
) -> None:
    """A permitted origin cannot send us where we may not go."""
    origin.redirects = lambda request: to
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["127.0.0.1/32"])
    with pytest.raises(OriginRefused):
        await open_proxy(origin.url, environment={"policy": policy}).fetch("b", RangeRequest())


async def test_a_kept_connection_is_checked_again(
    origin: FaultOrigin, open_proxy: OpenBackend
) -> None:
    """An address denied while a connection to it is kept serves no more."""
    origin.put("/blob", b"bytes")
    policy = AddressPolicy(in_cluster=True, allow_cidrs=["127.0.0.1/32"])
    backend = open_proxy(origin.url, environment={"policy": policy})
    async with await backend.fetch("blob", RangeRequest()) as stream:
        assert b"".join([piece async for piece in stream]) == b"bytes"
    policy.replace_denied(["127.0.0.1"])
    with pytest.raises(OriginRefused):
        await backend.fetch("blob", RangeRequest())
    assert len(origin.requests) == 1
