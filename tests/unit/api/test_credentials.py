"""Which credentials a Secret holds for which backend."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.crd_cases import HTTP_PROXY, LOCAL_FS, OSS, REGISTRY

from blobcache_api.agent import PushedCredentials
from blobcache_api.credentials import (
    CredentialsProblem,
    find_label_problem,
    resolve_credentials,
)
from blobcache_api.v1alpha1.backend import BackendSpec

SECRET = "s3cr3t-value"
S3 = {"type": "S3", "s3": {"endpoint": "https://s3.test", "bucket": "models"}}
ACCESS_KEY = {"accessKeyID": b"AK", "secretAccessKey": SECRET.encode()}
BASIC = {"username": b"user", "password": SECRET.encode()}
TOKEN = {"token": SECRET.encode()}


def _backend(body: dict[str, Any], **section: str) -> BackendSpec:
    name = next(key for key in body if key != "type")
    return BackendSpec.model_validate(
        {**body, name: {**body[name], **section}, "credentialsSecretRef": {"name": "keys"}}
    )


def _resolve(
    data: dict[str, bytes], body: dict[str, Any], secret_type: str = "Opaque", **section: str
) -> PushedCredentials | CredentialsProblem:
    return resolve_credentials(secret_type, data, _backend(body, **section), namespace="team-a")


def _docker_config(**auths: Any) -> dict[str, bytes]:
    return {".dockerconfigjson": json.dumps({"auths": auths}).encode()}


def _entry(user: str = "user", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("body", "permitted"),
    [
        (S3, [ACCESS_KEY]),
        (OSS, [ACCESS_KEY]),
        (REGISTRY, [BASIC, TOKEN]),
        (HTTP_PROXY, [BASIC, TOKEN]),
        (LOCAL_FS, []),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_sets_that_backends_take(body: dict[str, Any], permitted: list[dict[str, bytes]]) -> None:
    """Each backend takes its own sets and tells of the others what does not fit."""
    for data in (ACCESS_KEY, BASIC, TOKEN):
        found = _resolve(data, body)
        if data in permitted:
            assert isinstance(found, PushedCredentials)
            assert SECRET in found.secret_values()
        else:
            assert isinstance(found, CredentialsProblem)
            assert found.reason == "SecretKeysUnfit"


def test_temporary_keys_and_line_ends() -> None:
    """A session token comes along; the line's end of a file is no part of a value."""
    found = _resolve({**ACCESS_KEY, "accessKeyID": b"AK\n", "sessionToken": b"T\r\n"}, S3)
    assert isinstance(found, PushedCredentials)
    assert found.access_key_id == "AK"
    assert found.secret_values()[1] == "T"


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        ({}, "SecretKeysMissing", "`accessKeyID` and `secretAccessKey`"),
        ({"note": b"x"}, "SecretKeysMissing", "`accessKeyID` and `secretAccessKey`"),
        ({"accessKeyID": b"AK"}, "SecretKeysMissing", "`secretAccessKey`"),
        ({"sessionToken": b"T"}, "SecretKeysMissing", "`accessKeyID`"),
        ({**ACCESS_KEY, **TOKEN}, "SecretKeysAmbiguous", "`token`"),
        ({**ACCESS_KEY, "accessKeyID": b""}, "SecretMalformed", "`accessKeyID`"),
        ({**ACCESS_KEY, "secretAccessKey": b"\xff" + SECRET.encode()}, "SecretMalformed", "Key`"),
        ({**ACCESS_KEY, "secretAccessKey": b"a\nb"}, "SecretMalformed", "`secretAccessKey`"),
        ({**ACCESS_KEY, "secretAccessKey": b"x" * 16385}, "SecretMalformed", "16384"),
    ],
)
def test_problems_name_key_and_remedy(data: dict[str, bytes], reason: str, words: str) -> None:
    """A problem names the key and the command that mends it, and no value."""
    found = _resolve(data, S3)
    assert isinstance(found, CredentialsProblem)
    assert found.reason == reason
    assert words in found.message
    assert "kubectl -n team-a create secret generic keys --from-literal=" in found.message
    assert SECRET not in found.message
    assert len(found.message) <= 1024


def test_service_account_tokens_are_refused() -> None:
    """A cluster's own token is never sent to an origin, whatever its keys."""
    found = _resolve(TOKEN, REGISTRY, "kubernetes.io/service-account-token")
    assert isinstance(found, CredentialsProblem)
    assert found.reason == "SecretRefused"


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("registry.test", "registry.test"),
        ("registry.test", "https://registry.test/v2/"),
        ("registry.test", "registry.test:443"),
        ("registry.test:5000", "REGISTRY.test:5000"),
        ("docker.io", "https://index.docker.io/v1/"),
        ("registry-1.docker.io", "docker.io"),
        ("index.docker.io", "https://index.docker.io/v1/"),
    ],
)
def test_docker_configuration_serves_its_host(host: str, key: str) -> None:
    """The entry of the registry's own host is found, also by Docker Hub's other names."""
    data = _docker_config(**{"other.test": _entry("other", "x"), key: _entry()})
    found = _resolve(data, REGISTRY, "kubernetes.io/dockerconfigjson", host=host)
    assert isinstance(found, PushedCredentials)
    assert found.username == "user"


@pytest.mark.parametrize("key", ["registry.test:5000", "evil-registry.test", "test", "http://["])
def test_docker_configuration_serves_no_other_host(key: str) -> None:
    """Credentials of another host, port or suffix are not sent."""
    found = _resolve(_docker_config(**{key: _entry()}), REGISTRY)
    assert isinstance(found, CredentialsProblem)
    assert found.reason == "RegistryHostMissing"
    assert "docker-registry keys --docker-server=" in found.message


def test_docker_configuration_by_path() -> None:
    """The longest path that covers the repository wins; a path covers whole segments only."""
    auths = {
        "registry.test": _entry("host"),
        "registry.test/team": _entry("team"),
        "registry.test/tea": _entry("tea"),
    }
    for repository, user in {"team/app": "team", "team": "team", "teams/app": "host"}.items():
        found = _resolve(_docker_config(**auths), REGISTRY, repository=repository)
        assert isinstance(found, PushedCredentials)
        assert found.username == user


@pytest.mark.parametrize(
    ("entry", "is_usable"),
    [
        ({"username": "u", "password": SECRET}, True),
        ({"registrytoken": SECRET}, True),
        (_entry("u", "a:b"), True),
        ({"identitytoken": SECRET}, False),
        ({"auth": "!"}, False),
        ({"auth": base64.b64encode(b"nocolon").decode()}, False),
        ({"username": 1, "password": 2}, False),
        ({}, False),
    ],
)
def test_docker_configuration_entries(entry: dict[str, Any], is_usable: bool) -> None:
    """User and password in both forms, or a token; anything else is told."""
    found = _resolve(_docker_config(**{"registry.test": entry}), REGISTRY)
    assert isinstance(found, PushedCredentials) == is_usable
    if isinstance(found, CredentialsProblem):
        assert found.reason == "SecretMalformed"
        assert SECRET not in found.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"auths": []}', b"\xff", b"[" * 100_000])
def test_docker_configuration_that_is_none(raw: bytes) -> None:
    """What is no docker configuration is told by its key."""
    found = _resolve({".dockerconfigjson": raw}, REGISTRY)
    assert isinstance(found, CredentialsProblem)
    assert found.reason == "SecretMalformed"
    assert "`.dockerconfigjson`" in found.message


@given(st.dictionaries(st.sampled_from([*ACCESS_KEY, *BASIC, "token", "x"]), st.binary(max_size=9)))
def test_any_data_is_resolved_or_told(data: dict[str, bytes]) -> None:
    """Whatever a Secret holds, there are credentials or one problem with a remedy."""
    for body in (S3, REGISTRY):
        found = _resolve(data, body)
        assert isinstance(found, PushedCredentials) or "kubectl" in found.message


def test_label_opens_a_secret() -> None:
    """Only the label's value `true` counts; the message is the command."""
    assert (
        find_label_problem({"blobcache.dev/credentials": "true"}, namespace="a", name="b") is None
    )
    for labels in ({}, {"blobcache.dev/credentials": "false"}):
        problem = find_label_problem(labels, namespace="a", name="b")
        assert problem is not None
        assert problem.reason == "SecretNotLabelled"
        assert "kubectl -n a label secret b blobcache.dev/credentials=true" in problem.message
