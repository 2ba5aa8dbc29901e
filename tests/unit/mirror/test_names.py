"""Bindings, media types and ids: the small grammars of the mirror."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from blobcache_agent import daemon
from blobcache_agent.cli import cli
from blobcache_agent.data.rejection import Rejection
from blobcache_agent.mirror.bindings import Bindings, parse_binding
from blobcache_agent.mirror.manifests import media_type_of
from blobcache_agent.mirror.oci_path import parse_host_asked, parse_oci_path
from blobcache_agent.settings import ServeSettings
from blobcache_storage.backend.blob_id import parse_registry_id
from blobcache_storage.errors import InvalidBlobId

DIGEST = "sha256:" + "a" * 64
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"


def test_binding() -> None:
    """The host of image references, and where its registry is."""
    plain = parse_binding("GHCR.example:5000=team/images")
    assert (plain.host, plain.registry, plain.config_id) == (
        "ghcr.example:5000",
        "ghcr.example:5000",
        "team/images",
    )
    elsewhere = parse_binding("hub.example@registry-1.hub.example=team/hub")
    assert elsewhere.fits("Registry-1.hub.example:443", "https")
    assert not elsewhere.fits("Registry-1.hub.example:443", "http")
    assert not elsewhere.fits("hub.example", "https")
    assert parse_binding("[::1]:5000=a/b").fits("[::1]:5000", "http")


NO_BINDINGS = """
a a=b a=b/ a=/b =a/b a@=b/c @a=b/c a/b=c/d a=b/c/d a=B/c http://a=b/c a:=b/c a:123456=b/c
"""


@pytest.mark.parametrize("text", [*NO_BINDINGS.split(), "", "a b=c/d", "x" * 256 + "=a/b"])
def test_no_binding(text: str) -> None:
    """Each is refused, as a flag with exit 2."""
    with pytest.raises(ValueError, match="must be"):
        parse_binding(text)
    arguments = ["standalone", "--cache-root", "/x", "--containerd-mirror", text, "file"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 2
    assert "--containerd-mirror" in refused.output


def test_one_configuration_per_host() -> None:
    """Bound twice is refused; which host is meant need not be said if there is one."""
    one, two = parse_binding("a=x/y"), parse_binding("b=x/z")
    with pytest.raises(ValueError, match="once"):
        Bindings([one, parse_binding("A=x/z")])
    assert Bindings([one]).find(None) == one
    assert Bindings([one, two]).find(None) is None
    assert Bindings([one, two]).find("B") == two
    with pytest.raises(ValueError, match="at most"):
        Bindings(parse_binding(f"h{number}=a/b") for number in range(65))


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        ({"mediaType": DOCKER_LIST, "manifests": []}, DOCKER_LIST),
        ({"manifests": []}, "application/vnd.oci.image.index.v1+json"),
        ({"config": {}, "layers": []}, "application/vnd.oci.image.manifest.v1+json"),
        ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+json"),
        (
            {"schemaVersion": 1, "signatures": []},
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
        ),
        ({"mediaType": "a/b\r\nX: y"}, "application/octet-stream"),
        ({"mediaType": 7}, "application/octet-stream"),
        ([], "application/octet-stream"),
    ],
)
def test_media_types(body: object, media_type: str) -> None:
    """A manifest tells what it is."""
    assert media_type_of(json.dumps(body).encode()) == media_type


@given(st.binary(max_size=200) | st.just(b"[" * 100_000))
def test_any_bytes_have_a_media_type(body: bytes) -> None:
    """Without an error, and fit for a header line."""
    assert media_type_of(body).isprintable()


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=80))
def test_any_path(rest: str) -> None:
    """It names something within the grammar, or is refused with a client's error."""
    for path in (f"/v2/{rest}", f"/v2/a/manifests/{rest}", f"/v2/{rest}/blobs/{DIGEST}"):
        status = 0
        try:
            found = parse_oci_path(path)
            parse_host_asked(path, None)
        except Rejection as refused:
            status, found = refused.status, None
        assert status in (0, 400, 404)
        assert found is None or ".." not in found.repository.split("/")


def test_manifest_ids() -> None:
    """A manifest's id is never a blob's, whatever the repository is called."""
    tricky = "a/manifests"
    manifest = parse_registry_id(f"{tricky}@{DIGEST}", "")
    blob = parse_registry_id(f"{tricky}/{DIGEST}", "")
    assert (manifest.is_manifest, blob.is_manifest) == (True, False)
    assert (str(manifest), str(blob)) == (f"{tricky}@{DIGEST}", f"{tricky}/{DIGEST}")
    assert str(parse_registry_id("a" * 64, "only")) == DIGEST
    assert parse_registry_id(f"only@{DIGEST}", "only").is_manifest
    for wrong in (f"other@{DIGEST}", f"@{DIGEST}", f"only@{DIGEST}x", "only@v1", f"o@p@{DIGEST}"):
        with pytest.raises(InvalidBlobId):
            parse_registry_id(wrong, "only")


def test_bindings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a chart gives them: several, separated by spaces."""
    started: list[ServeSettings] = []
    monkeypatch.setattr(daemon, "run_serve", started.append)
    variables = {
        "BLOBCACHE_AGENT_CONTAINERD_MIRROR": "a.example=team/a b.example@c.example=team/b",
        "BLOBCACHE_AGENT_CACHE_ROOT": "/c",
        "BLOBCACHE_AGENT_TLS_DIR": "/t",
        "BLOBCACHE_AGENT_NODE_NAME": "node",
    }
    assert CliRunner().invoke(cli, ["serve"], env=variables).exit_code == 0
    assert [(one.host, one.registry) for one in started[0].mirrored] == [
        ("a.example", "a.example"),
        ("b.example", "c.example"),
    ]
