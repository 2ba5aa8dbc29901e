"""WWW-Authenticate is read to the letter, and realms are trusted by their name alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from blobcache_storage.backend.challenge import (
    Challenge,
    is_realm_trusted,
    parse_challenges,
    registrable_domain,
)

GOOD = {
    'Bearer realm="https://a.test/token",service="s",scope="repository:x:pull"': [
        ("bearer", {"realm": "https://a.test/token", "service": "s", "scope": "repository:x:pull"})
    ],
    'BEARER REALM="r" , service=plain': [("bearer", {"realm": "r", "service": "plain"})],
    'Basic realm="say \\"hi\\", please"': [("basic", {"realm": 'say "hi", please'})],
    "Negotiate": [("negotiate", {})],
    "Bearer realm=": [("bearer", {})],
    "Negotiate YWJj==": [("negotiate", {})],
    'Negotiate YWJj, Basic realm="x"': [("negotiate", {}), ("basic", {"realm": "x"})],
    'Negotiate, Bearer realm="x", service="y", Basic realm="z"': [
        ("negotiate", {}),
        ("bearer", {"realm": "x", "service": "y"}),
        ("basic", {"realm": "z"}),
    ],
    ' , Basic realm="" ,, ': [("basic", {"realm": ""})],
    "": [],
}
BAD = [
    'Bearer realm="unclosed',
    'Bearer realm="a" service="b"',
    'Bearer realm="a",realm="b"',
    'Bearer realm="a",Realm="b"',
    'Bearer realm="a\nb"',
    'Bearer realm="a\\\nb"',
    'realm="no scheme"',
    '="x"',
    "Bearer @@@",
    'Bearer realm="ü"',
    "Bearer " + ",".join(f'p{n}="x"' for n in range(17)),
    "x, " * 20,
    "Bearer " + "x" * 9000,
]


@pytest.mark.parametrize("value", GOOD, ids=lambda text: text[:40])
def test_well_formed_headers(value: str) -> None:
    """Schemes and parameters come out as the grammar says."""
    assert parse_challenges([value]) == [Challenge(*wanted) for wanted in GOOD[value]]


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_malformed_headers(value: str) -> None:
    """A header that breaks the grammar gives nothing at all."""
    with pytest.raises(ValueError, match="challenge"):
        parse_challenges([value])


def test_several_headers_add_up() -> None:
    """Each header may hold challenges."""
    found = parse_challenges(['Basic realm="a"', 'Bearer realm="b"'])
    assert [challenge.scheme for challenge in found] == ["basic", "bearer"]


TOKENS = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=10)
PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)


@given(st.dictionaries(TOKENS.map(str.lower), PRINTABLE, min_size=1, max_size=8))
def test_what_is_quoted_comes_back(parameters: dict[str, str]) -> None:
    """Any printable value survives quoting and parsing."""
    quoted = {n: v.replace("\\", "\\\\").replace('"', '\\"') for n, v in parameters.items()}
    header = "Bearer " + ", ".join(f'{name}="{text}"' for name, text in quoted.items())
    assert parse_challenges([header]) == [Challenge("bearer", parameters)]


@given(st.text(max_size=200))
def test_anything_at_all_parses_or_is_refused(value: str) -> None:
    """No header makes the parser do anything but answer or refuse."""
    try:
        parse_challenges([value])
    except ValueError:
        return


@pytest.mark.parametrize(
    ("registry", "realm", "trusted"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token", True),
        ("https://ghcr.io", "https://ghcr.io/token", True),
        ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", True),
        ("https://git.example.com:5050", "https://git.example.com/jwt/auth", True),
        (
            "https://registry.cn-hangzhou.aliyuncs.com",
            "https://dockerauth.cn-hangzhou.aliyuncs.com/auth",
            True,
        ),
        ("http://10.0.0.1:5000", "http://10.0.0.1:5000/token", True),
        ("http://localhost:5000", "http://localhost:5000/token", True),
        ("http://registry.test", "https://auth.registry.test/token", True),
        ("https://registry.test", "http://registry.test/token", False),
        ("https://registry.test", "https://evil.test/token", False),
        ("https://registry.test", "https://registry.test.evil.com/token", False),
        ("https://registry.test", "https://evilregistry.test/token", False),
        ("https://shop.co.uk", "https://evil.co.uk/token", False),
        ("https://a.com.cn", "https://b.com.cn/token", False),
        ("https://me.azurecr.io", "https://evil.azurecr.io/token", False),
        ("https://x.s3.amazonaws.com", "https://evil.execute-api.amazonaws.com/", False),
        ("http://10.0.0.1:5000", "http://10.0.0.1:80/token", False),
        ("http://10.0.0.1:5000", "http://10.0.0.2:5000/token", False),
        ("http://registry:5000", "http://metadata/token", False),
        ("http://localhost:5000", "http://localhost:80/token", False),
        ("https://registry.test", "https://user@registry.test/token", False),
        ("https://registry.test", "ftp://registry.test/token", False),
        ("https://registry.test", "/token", False),
        ("https://registry.test", "", False),
        ("https://registry.test", "https://%00.registry.test/token", False),
        ("https://registry.test", "https://evil.test%2f.registry.test/token", False),
        ("http://[::1]:5000", "http://[::1]:5000/token", True),
    ],
)
def test_trust_in_realms(registry: str, realm: str, trusted: bool) -> None:
    """Credentials go to the registry's own host or domain, and from https only to https."""
    assert is_realm_trusted(URL(registry), URL(realm, encoded=True)) is trusted


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("a.b.example.com", "example.com"),
        ("example.com.", "example.com"),
        ("shop.co.uk", "shop.co.uk"),
        ("co.uk", None),
        ("me.azurecr.io", "me.azurecr.io"),
        ("azurecr.io", None),
        ("localhost", None),
        ("10.0.0.1", None),
        ("::1", None),
        ("a..b", None),
    ],
)
def test_registrable_domains(host: str, domain: str | None) -> None:
    """In doubt one label more is compared."""
    assert registrable_domain(host) == domain
